"""Reads the system, the processor, the memory and the disks from /proc and /sys below a root folder."""

import os
import platform
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from megatrain.doctor.facts import CpuFacts, Disk, Limit, MemoryFacts, NumaNode, StorageFacts, SystemFacts
from megatrain.doctor.files import count_in_list, list_folder, read_chosen, read_number, read_text
from megatrain.memory.limits import group_folders, host_memory_limits, read_fields

# flags of /proc/cpuinfo by the name to show; those that the host's kernels and bf16 arithmetic gain from
_INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX512-BF16",
    "amx_tile": "AMX",
    "amx_bf16": "AMX-BF16",
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "BF16",
}


# -- system ---------------------------------------------------------------------------------------------------


def read_system(root: Path, environment: Mapping[str, str]) -> SystemFacts:
    kernel = read_text(root / "proc/sys/kernel/osrelease")
    return SystemFacts(
        kernel=kernel,
        architecture=platform.machine() or None,
        libc=_libc(root),
        wsl=_wsl(kernel),
        container=_container(root, environment),
        open_files_limit=_limit(root, "Max open files"),
        oom_score=read_number(root / "proc/self/oom_score"),
        oom_score_adj=read_number(root / "proc/self/oom_score_adj"),
    )


def _libc(root: Path) -> str | None:
    try:
        glibc = os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, OSError, ValueError):  # not glibc, or not Unix
        glibc = None
    return glibc or ("musl" if list_folder(root / "lib", r"ld-musl-.*") else None)


def _wsl(kernel: str | None) -> int | None:
    """WSL 1 calls itself 4.4.0-19041-Microsoft, WSL 2 5.15.90.1-microsoft-standard-WSL2."""
    name = (kernel or "").lower()
    if "microsoft" not in name:
        return None
    return 2 if "microsoft-standard" in name or "wsl2" in name else 1


def _container(root: Path, environment: Mapping[str, str]) -> str | None:
    if "KUBERNETES_SERVICE_HOST" in environment:
        return "kubernetes"
    if "APPTAINER_CONTAINER" in environment or "SINGULARITY_CONTAINER" in environment:
        return "apptainer"
    for path, name in ((".dockerenv", "docker"), ("run/.containerenv", "podman")):
        if os.path.exists(root / path):
            return name
    if environment.get("container"):  # set by systemd-nspawn, lxc and others
        return environment["container"]
    found = re.search(r"docker|kubepods|lxc|containerd", read_text(root / "proc/1/cgroup") or "")
    return found[0] if found else None


def _limit(root: Path, name: str) -> Limit:
    """A soft limit of this process, `Max open files  1024  4096  files`."""
    found = re.search(rf"^{name}\s+(\d+|unlimited)\s", read_text(root / "proc/self/limits") or "", re.MULTILINE)
    if found is None:
        return None
    return "unlimited" if found[1] == "unlimited" else int(found[1])


# -- processor ------------------------------------------------------------------------------------------------


def read_cpu(root: Path) -> CpuFacts:
    info = read_text(root / "proc/cpuinfo") or ""
    topology = [path / "topology" for path in list_folder(root / "sys/devices/system/cpu", r"cpu\d+")]
    cores = {read_text(path / "thread_siblings_list") for path in topology} - {None}
    sockets = {read_text(path / "physical_package_id") for path in topology} - {None}
    return CpuFacts(
        name=_cpu_field(info, "model name"),
        sockets=len(sockets) or None,
        physical_cores=len(cores) or None,
        logical_cores=len(re.findall(r"^processor\s*:", info, re.MULTILINE)) or None,
        usable_cores=_usable_cores(root),
        quota_cores=_quota_cores(root),
        instruction_sets=_instruction_sets(info),
    )


def _cpu_field(info: str, *names: str) -> str | None:
    found = re.search(rf"^(?:{'|'.join(names)})\s*:[ \t]*(.+)$", info, re.MULTILINE)
    return found[1].strip() if found else None


def _instruction_sets(info: str) -> tuple[str, ...] | None:
    flags = _cpu_field(info, "flags", "Features")  # the latter on ARM
    if flags is None:
        return None
    present = set(flags.split())
    return tuple(name for flag, name in _INSTRUCTION_SETS.items() if flag in present)


def _usable_cores(root: Path) -> int | None:
    found = re.search(r"^Cpus_allowed_list:\s*(\S+)", read_text(root / "proc/self/status") or "", re.MULTILINE)
    return count_in_list(found[1]) if found else None


def _quota_cores(root: Path) -> float | None:
    """The tightest quota of the enclosing control groups, in cores."""
    quotas = [_group_quota(folder, v2) for folder, v2 in group_folders(root, "cpu")]
    return min((quota for quota in quotas if quota is not None), default=None)


def _group_quota(folder: Path, v2: bool) -> float | None:
    if v2:
        words = (read_text(folder / "cpu.max") or "").split()  # `max 100000` for no quota
        numbers = [int(word) for word in words if word.isdigit()]
    else:  # -1 for no quota
        numbers = [read_number(folder / f"cpu.cfs_{name}_us") or 0 for name in ("quota", "period")]
    return numbers[0] / numbers[1] if len(numbers) == 2 and min(numbers) > 0 else None


# -- memory ---------------------------------------------------------------------------------------------------


def read_memory(root: Path) -> MemoryFacts:
    limits = host_memory_limits(root)
    fields = read_fields(root / "proc/meminfo")
    swap, swap_free = fields.get("SwapTotal"), fields.get("SwapFree")
    return MemoryFacts(
        total_bytes=limits.total_bytes,
        available_bytes=limits.available_bytes,
        cgroup_limit_bytes=limits.cgroup_limit_bytes,
        cgroup_used_bytes=limits.cgroup_used_bytes,
        free_bytes=limits.free_bytes,
        nodes=tuple(_node(path) for path in list_folder(root / "sys/devices/system/node", r"node\d+")),
        swap_total_bytes=swap,
        swap_used_bytes=None if swap is None or swap_free is None else swap - swap_free,
        locked_limit=_limit(root, "Max locked memory"),
        huge_pages=read_chosen(root / "sys/kernel/mm/transparent_hugepage/enabled"),
        overcommit_mode=read_number(root / "proc/sys/vm/overcommit_memory"),
        commit_limit_bytes=fields.get("CommitLimit"),
        committed_bytes=fields.get("Committed_AS"),
    )


def _node(folder: Path) -> NumaNode:
    """Its meminfo has lines such as `Node 0 MemTotal:  24684096 kB`."""
    lines = re.findall(r"^Node \d+ (\S+):\s+(\d+)(?: kB)?", read_text(folder / "meminfo") or "", re.MULTILINE)
    fields = {name: int(number) * 1024 for name, number in lines}
    free = None
    if "MemFree" in fields:  # a node has no MemAvailable
        free = sum(fields.get(name, 0) for name in ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable"))
    return NumaNode(
        number=int(folder.name.removeprefix("node")),
        total_bytes=fields.get("MemTotal"),
        free_bytes=free,
        cores=read_text(folder / "cpulist") or None,
    )


# -- disks ----------------------------------------------------------------------------------------------------


def read_storage(root: Path, folder: str | None) -> StorageFacts:
    """`folder`: where runs are saved; None where it is unknown (a working directory that was deleted)."""
    nvme = tuple(_disk(path) for path in list_folder(root / "sys/block", r"nvme\d+n\d+"))
    if folder is None:
        return StorageFacts(nvme=nvme)
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        usage = None
    return StorageFacts(
        folder=folder,
        total_bytes=usage.total if usage else None,
        free_bytes=usage.free if usage else None,
        filesystem=_filesystem(root, folder),
        nvme=nvme,
    )


def _disk(folder: Path) -> Disk:
    sectors = read_number(folder / "size")  # of 512 bytes, whatever the disk's own are
    return Disk(folder.name, read_text(folder / "device/model") or None, sectors * 512 if sectors else None)


def _filesystem(root: Path, folder: str) -> str | None:
    """Type of the innermost mount that holds `folder`; of two at one place the later lies on top."""
    best, kind = -1, None
    for line in (read_text(root / "proc/self/mountinfo") or "").splitlines():
        mount, dash, source = line.partition(" - ")
        words = mount.split()
        if not dash or len(words) < 5 or not source:
            continue
        # spaces and the like are written as octal numbers
        place = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), words[4]))
        if Path(folder).is_relative_to(place) and len(place.parts) >= best:
            best, kind = len(place.parts), source.split()[0]
    return kind
