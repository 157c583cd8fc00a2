"""Checks of memory, processors and disks."""

from collections.abc import Iterator

from megatrain.doctor.facts import Facts
from megatrain.doctor.finding import Finding
from megatrain.sizes import GIB, format_bytes

# weights and optimizer state: 12 without remainders and gradients (fp32), 14 in bf16 with clipping
BYTES_PER_PARAMETER = (12, 14)
_SMALL_MODEL = 1_000_000_000
_SAVED_BYTES = 2  # per parameter, in bf16
_MUCH_SWAP = GIB
# another node is roomier where it has this much more free: nodes are never quite equal
_ROOMIER = 1.25
# worth a note only where the training state is large
_MANY_PAGES = 64 * GIB
_IN_MEMORY = ("tmpfs", "ramfs")
_NETWORK = (
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "gpfs", "beegfs"),
    *("fuse.sshfs", "fuse.gcsfuse", "fuse.s3fs", "fuse.rclone", "fuse.glusterfs", "fuse.ceph"),
)


def parameters_that_fit(free_bytes: int) -> dict[int, float]:
    """Parameters whose state fits, by bytes per parameter; a step's own buffers come on top."""
    return {each: free_bytes / each for each in BYTES_PER_PARAMETER}


def fit_text(free_bytes: int) -> str:
    few, many = parameters_that_fit(free_bytes).items()
    return f"up to {few[1] / 1e9:.1f} billion parameters at {few[0]} bytes each, {many[1] / 1e9:.1f} at {many[0]}"


# -- memory ---------------------------------------------------------------------------------------------------


def little_memory(facts: Facts) -> Iterator[Finding]:
    """Less than the GPU has itself, or, without one, too little for a model worth the trouble."""
    free = facts.memory.free_bytes
    if free is None:
        return
    largest = max((device.memory_bytes or 0 for device in facts.gpu.torch.devices), default=0)
    if free >= largest and free >= _SMALL_MODEL * max(BYTES_PER_PARAMETER):
        return
    less = f", less than the GPU's {format_bytes(largest)}" if free < largest else ""
    yield Finding(
        "warning",
        f"{format_bytes(free)} of host memory are free{less}; they hold {fit_text(free)}",
        "end other programs, raise the container's limit, or train a smaller model; weights and moments live there",
    )


def cgroup_memory(facts: Facts) -> Iterator[Finding]:
    limit, total = facts.memory.cgroup_limit_bytes, facts.memory.total_bytes
    if limit is not None and total is not None and limit < total / 2:
        yield Finding(
            "warning",
            f"this container or job may use {format_bytes(limit)} of the machine's {format_bytes(total)} of memory",
            "raise it: docker --memory, Slurm --mem, Kubernetes resources.limits.memory, systemd MemoryMax",
        )


def locked_memory(facts: Facts) -> Iterator[Finding]:
    limit, total = facts.memory.locked_limit, facts.memory.total_bytes
    if facts.gpu.hardware and isinstance(limit, int) and total is not None and limit < total:
        yield Finding(
            "note",
            f"locked memory is limited to {format_bytes(limit)}; NVIDIA's Linux driver does not count what it locks",
            "if page-locking fails: `ulimit -l unlimited`, docker --ulimit memlock=-1, systemd LimitMEMLOCK=infinity",
        )


def wsl_locked_memory(facts: Facts) -> Iterator[Finding]:
    total = facts.memory.total_bytes
    if facts.system.wsl == 2 and facts.gpu.hardware and total is not None:
        yield Finding(
            "warning",
            f"WSL 2 lets a GPU lock at most half of the memory ({format_bytes(total / 2)}), on some drivers far less",
            "give WSL more (memory= in .wslconfig), or train on Linux itself",
        )


def numa(facts: Facts) -> Iterator[Finding]:
    nodes = {node.number: node.free_bytes for node in facts.memory.nodes if node.free_bytes is not None}
    for gpu in facts.gpu.gpus:
        here = nodes.get(gpu.numa_node) if gpu.numa_node is not None else None
        if here is None:
            continue
        roomiest = max(nodes, key=lambda number: nodes[number] or 0)
        there = nodes[roomiest] or 0
        if there > _ROOMIER * here:
            yield Finding(
                "warning",
                f"{gpu.label} is on NUMA node {gpu.numa_node} with {format_bytes(here)} free; most free memory "
                f"({format_bytes(there)}) is on node {roomiest}, across the link between processors",
                f"free memory on node {gpu.numa_node} and start with numactl --preferred={gpu.numa_node} "
                f"--cpunodebind={gpu.numa_node}",
            )


def swap(facts: Facts) -> Iterator[Finding]:
    used = facts.memory.swap_used_bytes
    if used:
        yield Finding(
            "warning" if used >= _MUCH_SWAP else "note",
            f"{format_bytes(used)} are swapped out: this machine has run out of memory before",
            "end what needs the memory, then `sudo swapoff -a && sudo swapon -a`",
        )


def strict_overcommit(facts: Facts) -> Iterator[Finding]:
    memory = facts.memory
    if memory.overcommit_mode != 2 or memory.commit_limit_bytes is None or memory.available_bytes is None:
        return
    room = max(0, memory.commit_limit_bytes - (memory.committed_bytes or 0))
    if room < memory.available_bytes:
        yield Finding(
            "warning",
            f"vm.overcommit_memory is 2: {format_bytes(room)} can be allocated, {format_bytes(memory.available_bytes)}"
            " are free",
            "`sudo sysctl vm.overcommit_memory=0`, or raise vm.overcommit_ratio",
        )


def huge_pages(facts: Facts) -> Iterator[Finding]:
    """Training memory is not marked for huge pages, so `madvise` is as good as `never`."""
    mode, total = facts.memory.huge_pages, facts.memory.total_bytes
    if facts.gpu.hardware and mode in ("never", "madvise") and total is not None and total >= _MANY_PAGES:
        yield Finding(
            "note",
            f"transparent huge pages are '{mode}': large memory is allocated and page-locked in small pages",
            "to try: `echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled`",
        )


# -- processors -----------------------------------------------------------------------------------------------


def cpu_quota(facts: Facts) -> Iterator[Finding]:
    quota, usable = facts.cpu.quota_cores, facts.cpu.usable_cores
    if quota is not None and usable is not None and quota < usable:
        yield Finding(
            "warning",
            f"this container or job may use {quota:g} of {usable} cores' time; more threads than that are paused",
            f"raise it (docker --cpus, Kubernetes limits.cpu), or set OMP_NUM_THREADS={max(1, int(quota))}",
        )


# -- disks ----------------------------------------------------------------------------------------------------


def saving_to_memory(facts: Facts) -> Iterator[Finding]:
    if facts.storage.filesystem in _IN_MEMORY:
        yield Finding(
            "warning",
            f"{facts.storage.folder} is in memory ({facts.storage.filesystem}): what is saved there takes memory from "
            "training and is gone after a restart",
            "set output: to a folder on a disk",
        )


def saving_over_network(facts: Facts) -> Iterator[Finding]:
    if facts.storage.filesystem in _NETWORK:
        yield Finding(
            "note",
            f"{facts.storage.folder} is on a network or shared filesystem ({facts.storage.filesystem}): loading and "
            "saving go at its speed",
            "keep models and output: on a local disk",
        )


def little_disk(facts: Facts) -> Iterator[Finding]:
    """Too little for the largest model that fits in memory, saved once."""
    disk, memory = facts.storage.free_bytes, facts.memory.free_bytes
    if disk is None or memory is None:
        return
    needed = memory / min(BYTES_PER_PARAMETER) * _SAVED_BYTES
    if disk < needed:
        yield Finding(
            "warning",
            f"{format_bytes(disk)} are free in {facts.storage.folder}; the largest model that fits in memory takes "
            f"{format_bytes(needed)} to save in bf16",
            "free space, or set output: to a folder on a larger disk",
        )


HOST_CHECKS = (
    little_memory,
    cgroup_memory,
    locked_memory,
    wsl_locked_memory,
    numa,
    swap,
    strict_overcommit,
    huge_pages,
    cpu_quota,
    saving_to_memory,
    saving_over_network,
    little_disk,
)
