"""How much host memory this process may use: the machine's, its control group's, and what is resident now.

All sizes are bytes. The control group (cgroup) is what a container or a job scheduler limits; its limit, not
the machine's, decides when the kernel kills a process. The files of `/proc` and `/sys/fs/cgroup` are read
where they exist, `psutil` answers elsewhere. Every reader takes the root folder, so that tests can hand in a
made-up tree.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_ROOT = Path("/")
# cgroup v1 writes "no limit" as the largest page-aligned 64-bit number; no machine comes near this
_UNLIMITED = 1 << 60


@dataclass(frozen=True, slots=True)
class HostLimits:
    """Host memory as one process sees it, in bytes."""

    total_bytes: int
    """Physical memory of the machine."""
    available_bytes: int
    """What the machine can still hand out without swapping, reclaimable caches included."""
    cgroup_limit_bytes: int | None = None
    """The limit of the tightest enclosing control group; None where no group has one."""
    cgroup_used_bytes: int | None = None
    """What that group holds now, less file cache that the kernel would drop first."""

    @property
    def free_bytes(self) -> int:
        """Bytes that this process may still allocate before swap or the out-of-memory killer."""
        if self.cgroup_limit_bytes is None:
            return self.available_bytes
        room = self.cgroup_limit_bytes - (self.cgroup_used_bytes or 0)
        return max(0, min(self.available_bytes, room))


def host_memory_limits(root: Path = _ROOT) -> HostLimits:
    """The machine's and the tightest control group's memory, read now."""
    total, available = _machine_memory(root)
    group = _tightest_group(root)
    if group is None:
        return HostLimits(total, available)
    return HostLimits(total, available, cgroup_limit_bytes=group[0], cgroup_used_bytes=group[1])


def resident_bytes(root: Path = _ROOT) -> int:
    """Resident memory of this process: anonymous, mapped file and shared pages together.

    Mapped file pages (a safetensors file being read) count here although the kernel can drop them at any
    time.
    """
    fields = read_fields(root / "proc/self/status")
    parts = [fields.get(name) for name in ("RssAnon", "RssFile", "RssShmem")]
    if parts[0] is None:
        return int(psutil.Process().memory_info().rss)
    return sum(part or 0 for part in parts)


def swapped_bytes(root: Path = _ROOT) -> int:
    """Of this process, on a disk; 0 where unknown."""
    return read_fields(root / "proc/self/status").get("VmSwap", 0)


def peak_resident_bytes(root: Path = _ROOT) -> int:
    """The most that was ever resident, or since `reset_peak_resident`; what is resident now where unknown."""
    peak = read_fields(root / "proc/self/status").get("VmHWM")
    if peak is not None:
        return peak
    info = psutil.Process().memory_info()
    return int(getattr(info, "peak_wset", info.rss))


def reset_peak_resident(root: Path = _ROOT) -> bool:
    """Start a new peak at what is resident now. False where the system does not let us."""
    try:
        (root / "proc/self/clear_refs").write_text("5")  # 5: reset VmHWM only, leave the referenced bits alone
    except OSError:
        return False
    return True


def read_fields(path: Path) -> dict[str, int]:
    """The numbers of a `Name: 123 kB` or `name 123` file, in bytes; empty where the file cannot be read."""
    fields: dict[str, int] = {}
    for line in (_read(path) or "").splitlines():
        words = line.replace(":", " ").split()
        if len(words) >= 2 and words[1].isdigit():
            fields[words[0]] = int(words[1]) * (1024 if words[2:] == ["kB"] else 1)
    return fields


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return None


def _machine_memory(root: Path) -> tuple[int, int]:
    """(total, available) bytes of the machine."""
    fields = read_fields(root / "proc/meminfo")
    if "MemTotal" in fields and "MemAvailable" in fields:
        return fields["MemTotal"], fields["MemAvailable"]
    memory = psutil.virtual_memory()
    return int(memory.total), int(memory.available)


def _tightest_group(root: Path) -> tuple[int, int] | None:
    """(limit, used) of the enclosing group that leaves the least room; None where no group has a limit."""
    groups = [
        (limit, used)
        for folder, v2 in group_folders(root)
        if (limit := _group_limit(folder, v2)) is not None and (used := _group_used(folder, v2)) is not None
    ]
    return min(groups, key=lambda group: group[0] - group[1], default=None)


def group_folders(root: Path, controller: str = "memory") -> Iterator[tuple[Path, bool]]:
    """Folders of this process's groups, innermost first, each with whether it is cgroup v2.

    `controller`: what the groups limit, such as `memory` or `cpu`; v2 has one tree for all.

    In a container the path in `/proc/self/cgroup` may be the host's while only the container's own group is
    mounted, at the mount point itself; folders that do not exist are therefore skipped, and the mount point
    is always read.
    """
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        v2 = number == "0" and not controllers
        if v2:
            # beside v1 groups ("hybrid"), v2 is mounted at `unified` and carries no limits of v1's controllers
            mount = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / controller
        else:
            continue
        # a path that leaves the mount ("/../x": a group outside our namespace) cannot be read from here
        parts = [part for part in name.split("/") if part]
        if ".." in parts:
            parts = []
        for depth in range(len(parts), -1, -1):
            folder = mount.joinpath(*parts[:depth])
            if folder.is_dir():
                yield folder, v2


def _group_limit(folder: Path, v2: bool) -> int | None:
    """Hard limit of one group in bytes; None for no limit."""
    text = (_read(folder / ("memory.max" if v2 else "memory.limit_in_bytes")) or "").strip()
    if not text.isdigit() or int(text) >= _UNLIMITED:
        return None
    return int(text)


def _group_used(folder: Path, v2: bool) -> int | None:
    """Bytes that one group holds, less its inactive file cache, which the kernel drops first."""
    text = (_read(folder / ("memory.current" if v2 else "memory.usage_in_bytes")) or "").strip()
    if not text.isdigit():
        return None
    stat = read_fields(folder / "memory.stat")
    # v1's plain `inactive_file` leaves out child groups, which `usage_in_bytes` includes
    cache = stat.get("inactive_file", 0) if v2 else stat.get("total_inactive_file", stat.get("inactive_file", 0))
    return max(0, int(text) - cache)
