"""What a machine offers for training, as data. None is unknown, or none where the field says so. Sizes are bytes."""

import re
from dataclasses import dataclass, field
from typing import Literal

Limit = int | Literal["unlimited"] | None


def release(version: str | None) -> tuple[int, ...]:
    """The numbers that a version begins with: 2.11.0rc1+cu130 -> (2, 11, 0); empty where it is unknown."""
    found = re.match(r"\d+(\.\d+)*", version or "")
    return tuple(int(part) for part in found[0].split(".")) if found else ()


@dataclass(frozen=True, slots=True)
class SystemFacts:
    kernel: str | None = None
    architecture: str | None = None
    libc: str | None = None
    """Such as 'glibc 2.36' or 'musl'."""
    wsl: int | None = None
    """1 or 2: a Windows Subsystem for Linux of that version; None outside."""
    container: str | None = None
    """What runs the container; None where there is no sign of one."""
    open_files_limit: Limit = None
    oom_score: int | None = None
    oom_score_adj: int | None = None


@dataclass(frozen=True, slots=True)
class CpuFacts:
    name: str | None = None
    sockets: int | None = None
    physical_cores: int | None = None
    logical_cores: int | None = None
    usable_cores: int | None = None
    """Logical cores that this process may run on (its affinity)."""
    quota_cores: float | None = None
    """Processor time that the control group may use, in cores; None where it has no quota."""
    instruction_sets: tuple[str, ...] | None = None

    @property
    def threads(self) -> int | None:
        """Threads that can run at once: the affinity, or the quota where that is less."""
        if self.usable_cores is None or self.quota_cores is None:
            return self.usable_cores
        return max(1, min(self.usable_cores, int(self.quota_cores)))


@dataclass(frozen=True, slots=True)
class NumaNode:
    number: int
    total_bytes: int | None = None
    free_bytes: int | None = None
    """Free pages, and caches that the kernel drops for whoever asks."""
    cores: str | None = None


@dataclass(frozen=True, slots=True)
class MemoryFacts:
    total_bytes: int | None = None
    available_bytes: int | None = None
    cgroup_limit_bytes: int | None = None
    """None where no control group has a limit."""
    cgroup_used_bytes: int | None = None
    free_bytes: int | None = None
    """What this process may still allocate, control groups included."""
    nodes: tuple[NumaNode, ...] = ()
    swap_total_bytes: int | None = None
    swap_used_bytes: int | None = None
    locked_limit: Limit = None
    huge_pages: str | None = None
    """Mode of transparent huge pages: always, madvise or never."""
    overcommit_mode: int | None = None
    """0 heuristic, 1 always, 2 never beyond the commit limit."""
    commit_limit_bytes: int | None = None
    committed_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Disk:
    name: str
    model: str | None = None
    total_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class StorageFacts:
    folder: str | None = None
    """The working directory: runs are saved below it."""
    total_bytes: int | None = None
    free_bytes: int | None = None
    filesystem: str | None = None
    nvme: tuple[Disk, ...] = ()


@dataclass(frozen=True, slots=True)
class GpuProcess:
    pid: int | None = None
    name: str | None = None
    used_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU of the machine, whether PyTorch can use it or not."""

    index: int
    name: str | None = None
    pci_address: str | None = None
    numa_node: int | None = None
    memory_bytes: int | None = None
    used_bytes: int | None = None
    compute_capability: str | None = None
    native_bf16: bool | None = None
    pcie_generation: int | None = None
    pcie_generation_max: int | None = None
    """Of this GPU in this machine, where nvidia-smi told; else of the GPU alone."""
    pcie_width: int | None = None
    pcie_width_max: int | None = None
    performance_state: str | None = None
    """P0 is full speed; an idle GPU is at P8 or so."""
    persistence_mode: bool | None = None
    power_limit_watts: float | None = None
    power_default_watts: float | None = None
    processes: tuple[GpuProcess, ...] = ()

    @property
    def label(self) -> str:
        return f"GPU {self.index}" + (f" ({self.name})" if self.name else "")


@dataclass(frozen=True, slots=True)
class DriverFacts:
    version: str | None = None
    cuda: str | None = None
    """The newest CUDA that the driver can run, as the driver's own library says."""
    loaded: bool = False
    """Whether its kernel module is."""
    device_files: tuple[str, ...] = ()
    denied_files: tuple[str, ...] = ()
    """Those of them that this user may not open."""
    nvidia_smi_error: str | None = None


@dataclass(frozen=True, slots=True)
class TorchDevice:
    name: str
    memory_bytes: int | None = None
    compute_capability: str | None = None


@dataclass(frozen=True, slots=True)
class TorchFacts:
    """What PyTorch says when it is asked to use a GPU."""

    version: str | None = None
    import_error: str | None = None
    cuda: str | None = None
    """The CUDA that it was built for; None in a build for the CPU alone or for AMD."""
    rocm: str | None = None
    architectures: tuple[str, ...] = ()
    """What its kernels were compiled for, such as sm_90."""
    devices: tuple[TorchDevice, ...] = ()
    unusable_because: str | None = None


@dataclass(frozen=True, slots=True)
class GpuFacts:
    gpus: tuple[Gpu, ...] = ()
    driver: DriverFacts = field(default_factory=DriverFacts)
    torch: TorchFacts = field(default_factory=TorchFacts)

    @property
    def hardware(self) -> bool:
        """Whether there is any sign of a GPU that training could use, if all were well."""
        return bool(self.gpus or self.driver.loaded or self.driver.device_files or self.torch.devices)


@dataclass(frozen=True, slots=True)
class SoftwareFacts:
    megatrain: str | None = None
    python: str | None = None
    packages: dict[str, str | None] = field(default_factory=dict)
    """Installed versions by name; None where it is not installed."""
    required: dict[str, str] = field(default_factory=dict)
    """Least versions that megatrain asks for."""
    encoding: str | None = None
    """Of text, as the locale says."""
    numba_cache_folders: tuple[str, ...] = ()
    """Where numba would keep machine code, in its order."""
    numba_cache: str | None = None
    """The first of them that can be written; None where none can."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables that steer threads, numba, CUDA and PyTorch."""


@dataclass(frozen=True, slots=True)
class Facts:
    system: SystemFacts = field(default_factory=SystemFacts)
    cpu: CpuFacts = field(default_factory=CpuFacts)
    memory: MemoryFacts = field(default_factory=MemoryFacts)
    storage: StorageFacts = field(default_factory=StorageFacts)
    gpu: GpuFacts = field(default_factory=GpuFacts)
    software: SoftwareFacts = field(default_factory=SoftwareFacts)
