"""Reading memory limits from made-up /proc and /sys trees, and from this process."""

from pathlib import Path

import pytest
import torch

from megatrain.memory import limits
from megatrain.memory.limits import HostLimits, host_memory_limits

GIB = 1024**3


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine of 64 GiB with 40 GiB available and no control groups."""
    kib = 1024 * 1024
    write(tmp_path, {"proc/meminfo": f"MemTotal: {64 * kib} kB\nMemFree: 5 kB\nMemAvailable: {40 * kib} kB\n"})
    return tmp_path


def test_machine_without_groups(root: Path) -> None:
    found = host_memory_limits(root)
    assert found == HostLimits(64 * GIB, 40 * GIB)
    assert found.free_bytes == 40 * GIB


def test_v2_tightest_enclosing_group_and_its_cache(root: Path) -> None:
    base = "sys/fs/cgroup/"
    write(
        root,
        {
            "proc/self/cgroup": "0::/job/step\n",
            base + "job/memory.max": f"{16 * GIB}\n",
            base + "job/memory.current": f"{10 * GIB}\n",
            base + "job/memory.stat": f"anon 1\ninactive_file {3 * GIB}\nactive_file 7\n",
            base + "job/step/memory.max": f"{12 * GIB}\n",
            base + "job/step/memory.current": f"{2 * GIB}\n",
            base + "job/step/memory.stat": "inactive_file 0\n",
        },
    )
    found = host_memory_limits(root)
    # the outer group has the larger limit but less room: 16 - (10 - 3) = 9 against 12 - 2 = 10
    assert (found.cgroup_limit_bytes, found.cgroup_used_bytes) == (16 * GIB, 7 * GIB)
    assert found.free_bytes == 9 * GIB


def test_v2_group_without_limit(root: Path) -> None:
    write(root, {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "max\n"})
    assert host_memory_limits(root).cgroup_limit_bytes is None


def test_v2_container_sees_only_its_mount_point(root: Path) -> None:
    files = {"memory.max": f"{8 * GIB}", "memory.current": f"{GIB}"}
    write(root, {"proc/self/cgroup": "0::/../host/pod\n"} | {f"sys/fs/cgroup/{k}": v for k, v in files.items()})
    assert host_memory_limits(root).free_bytes == 7 * GIB


def test_v1_counts_children_cache_and_knows_no_limit(root: Path) -> None:
    base = "sys/fs/cgroup/memory/"
    write(
        root,
        {
            "proc/self/cgroup": "12:cpu,cpuacct:/x\n5:memory:/docker/abc\n0::/unified\n",
            base + "memory.limit_in_bytes": "9223372036854771712\n",
            base + "memory.usage_in_bytes": "5\n",
            base + "docker/abc/memory.limit_in_bytes": f"{4 * GIB}\n",
            base + "docker/abc/memory.usage_in_bytes": f"{5 * GIB}\n",
            base + "docker/abc/memory.stat": f"inactive_file 0\ntotal_inactive_file {2 * GIB}\n",
        },
    )
    found = host_memory_limits(root)
    assert (found.cgroup_limit_bytes, found.cgroup_used_bytes) == (4 * GIB, 3 * GIB)


def test_group_over_its_limit_leaves_nothing() -> None:
    assert HostLimits(10, 10, cgroup_limit_bytes=5, cgroup_used_bytes=7).free_bytes == 0


def test_missing_trees_fall_back(tmp_path: Path) -> None:
    found = host_memory_limits(tmp_path)
    assert 0 < found.available_bytes <= found.total_bytes
    assert found.cgroup_limit_bytes is None
    assert limits.resident_bytes(tmp_path) > 1 << 20
    assert limits.peak_resident_bytes(tmp_path) > 1 << 20
    assert limits.reset_peak_resident(tmp_path) is False


def test_status_fields(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/status": "VmHWM:\t 9 kB\nRssAnon:\t 4 kB\nRssFile:\t 2 kB\nRssShmem:\t 1 kB\n"})
    assert limits.resident_bytes(tmp_path) == 7 * 1024
    assert limits.peak_resident_bytes(tmp_path) == 9 * 1024


def test_peak_follows_an_allocation_and_resets() -> None:
    if not limits.reset_peak_resident():
        pytest.skip("the system does not let a process reset its peak")
    before = limits.peak_resident_bytes()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    del block
    assert limits.peak_resident_bytes() - before > 60 << 20
    assert limits.reset_peak_resident()
    assert limits.peak_resident_bytes() - before < 40 << 20
