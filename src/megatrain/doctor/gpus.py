"""Reads the GPUs, their driver and what PyTorch makes of them."""

import contextlib
import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from megatrain.doctor import torch_probe
from megatrain.doctor.facts import DriverFacts, Gpu, GpuFacts, GpuProcess, TorchFacts
from megatrain.doctor.files import list_folder, read_number, read_text

Run = Callable[[Sequence[str]], tuple[int, str] | None]
"""Runs a command; (exit code, output), or None where there is no such command."""

_MIB = 1024**2
_NVIDIA_SMI = ("nvidia-smi", "/usr/lib/wsl/lib/nvidia-smi")  # WSL2 does not always put it on the path
_SECONDS = 20  # a healthy nvidia-smi without persistence mode takes several; one on a hung driver never ends
_TORCH_SECONDS = 120  # PyTorch on a slow disk
_GPU_FIELDS = (
    *("index", "uuid", "name", "pci.bus_id", "driver_version", "memory.total", "memory.used", "compute_cap"),
    *("pcie.link.gen.current", "pcie.link.gen.max", "pcie.link.width.current", "pcie.link.width.max"),
    *("pstate", "persistence_mode", "power.limit", "power.default_limit"),
)
_PROCESS_FIELDS = ("gpu_uuid", "pid", "used_memory", "process_name")  # a name may hold commas: last
_PCIE_GENERATIONS = {"2.5": 1, "5.0": 2, "5": 2, "8.0": 3, "8": 3, "16.0": 4, "16": 4, "32.0": 5, "32": 5, "64.0": 6}


def run_command(command: Sequence[str], seconds: int = _SECONDS) -> tuple[int, str] | None:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 124, f"{command[0]} did not answer within {seconds} s"
    except OSError:
        return None
    return done.returncode, done.stdout.decode(errors="replace")


def read_gpus(
    root: Path,
    run: Run = run_command,
    run_python: Run | None = None,
    driver_cuda: Callable[[], str | None] | None = None,
) -> GpuFacts:
    """PyTorch is asked last: what it holds on a GPU would otherwise look like another process's."""
    rows, error = _query(run, "gpu", _GPU_FIELDS)
    processes, _ = _query(run, "compute-apps", _PROCESS_FIELDS) if rows else ([], None)
    gpus = [_gpu(root, index, row, processes) for index, row in enumerate(rows)]
    if not gpus:
        gpus = [_with_sysfs(root, Gpu(index, pci_address=at)) for index, at in enumerate(_pci_addresses(root))]
    driver = _driver(root, rows, error, (driver_cuda or newest_driver_cuda)())
    return GpuFacts(tuple(gpus), driver, ask_torch(run_python or partial(run_command, seconds=_TORCH_SECONDS)))


# -- nvidia-smi -----------------------------------------------------------------------------------------------


def _query(run: Run, what: str, fields: Sequence[str]) -> tuple[list[dict[str, str]], str | None]:
    """(rows, error). Fields that this nvidia-smi does not know are left out."""
    fields = list(fields)
    for program in _NVIDIA_SMI:
        while answer := run([program, f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits"]):
            code, output = answer
            if code == 0:
                rows = [[word.strip() for word in line.split(",", len(fields) - 1)] for line in output.splitlines()]
                return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)], None
            unknown = re.search(r'Field "([^"]+)" is not a valid field', output)
            if unknown is None or unknown[1] not in fields or len(fields) == 1:
                return [], next(iter(output.strip().splitlines()), f"exit code {code}")
            fields.remove(unknown[1])
    return [], None


def _gpu(root: Path, index: int, row: dict[str, str], processes: list[dict[str, str]]) -> Gpu:
    number, capability = _whole(row.get("index")), _known(row.get("compute_cap"))
    gpu = Gpu(
        index=index if number is None else number,
        name=_known(row.get("name")),
        pci_address=_sysfs_address(row.get("pci.bus_id")),
        memory_bytes=_mib(row.get("memory.total")),
        used_bytes=_mib(row.get("memory.used")),
        compute_capability=capability,
        native_bf16=_native_bf16(capability),
        pcie_generation=_whole(row.get("pcie.link.gen.current")),
        pcie_generation_max=_whole(row.get("pcie.link.gen.max")),
        pcie_width=_whole(row.get("pcie.link.width.current")),
        pcie_width_max=_whole(row.get("pcie.link.width.max")),
        performance_state=_known(row.get("pstate")),
        persistence_mode={"Enabled": True, "Disabled": False}.get(row.get("persistence_mode", "")),
        power_limit_watts=_number(row.get("power.limit")),
        power_default_watts=_number(row.get("power.default_limit")),
        processes=tuple(_process(other) for other in processes if other.get("gpu_uuid") == row.get("uuid", "none")),
    )
    return _with_sysfs(root, gpu)


def _process(row: dict[str, str]) -> GpuProcess:
    return GpuProcess(_whole(row.get("pid")), _known(row.get("process_name")), _mib(row.get("used_memory")))


def _known(text: str | None) -> str | None:
    """nvidia-smi writes [N/A], [Not Supported], [Unknown Error] and the like."""
    return None if not text or text.startswith("[") or text in ("N/A", "Unknown") else text


def _number(text: str | None) -> float | None:
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text or "") and text else None


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


def _mib(text: str | None) -> int | None:
    number = _number(text)
    return None if number is None else int(number * _MIB)


def _native_bf16(capability: str | None) -> bool | None:
    """As PyTorch decides it: from compute capability 8.0 on."""
    major = (capability or "").partition(".")[0]
    return int(major) >= 8 if major.isdecimal() else None


# -- /sys and /proc -------------------------------------------------------------------------------------------


def _sysfs_address(text: str | None) -> str | None:
    """nvidia-smi writes 00000000:3B:00.0 for what /sys calls 0000:3b:00.0."""
    found = re.fullmatch(r"([0-9a-f]+):([0-9a-f]{2}:[0-9a-f]{2}\.\d)", (text or "").lower())
    return f"{int(found[1], 16):04x}:{found[2]}" if found else None


def _pci_addresses(root: Path) -> list[str]:
    """NVIDIA's display and 3D controllers, whether a driver is loaded or not."""
    return [
        path.name
        for path in list_folder(root / "sys/bus/pci/devices")
        if read_text(path / "vendor") == "0x10de" and (read_text(path / "class") or "").startswith("0x03")
    ]


def _with_sysfs(root: Path, gpu: Gpu) -> Gpu:
    """With the NUMA node, and with the link where nvidia-smi did not tell."""
    if gpu.pci_address is None:
        return gpu
    folder = root / "sys/bus/pci/devices" / gpu.pci_address
    node = read_number(folder / "numa_node")
    gpu = replace(gpu, numa_node=None if node is None or node < 0 else node)  # -1: the firmware does not say
    if gpu.pcie_width is not None:
        return gpu
    return replace(
        gpu,
        pcie_generation=_generation(folder / "current_link_speed"),
        pcie_generation_max=_generation(folder / "max_link_speed"),
        pcie_width=_lanes(folder / "current_link_width"),
        pcie_width_max=_lanes(folder / "max_link_width"),
    )


def _generation(path: Path) -> int | None:
    """Of `16.0 GT/s PCIe`; virtual machines say `Unknown`."""
    return _PCIE_GENERATIONS.get((read_text(path) or "").partition(" ")[0])


def _lanes(path: Path) -> int | None:
    lanes = read_number(path)
    return lanes if lanes is not None and 0 < lanes <= 32 else None  # 0 and 255 stand for unknown


def _driver(root: Path, rows: list[dict[str, str]], error: str | None, cuda: str | None) -> DriverFacts:
    module = read_text(root / "proc/driver/nvidia/version")
    version = next((known for row in rows if (known := _known(row.get("driver_version")))), None)
    if version is None and module is not None:
        found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", module)
        version = found[1] if found else None
    nodes = [str(path) for path in list_folder(root / "dev", r"nvidia\d+")]
    return DriverFacts(
        version=version,
        cuda=cuda,
        loaded=module is not None,
        device_files=tuple(nodes),
        denied_files=tuple(node for node in nodes if not os.access(node, os.R_OK | os.W_OK)),
        nvidia_smi_error=error,
    )


def newest_driver_cuda() -> str | None:
    """The newest CUDA that the installed driver can run; None without its library."""
    try:
        library, number = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
        if library.cuDriverGetVersion(ctypes.byref(number)) != 0 or number.value <= 0:
            return None
    except (OSError, AttributeError):
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


# -- PyTorch --------------------------------------------------------------------------------------------------


def ask_torch(run: Run) -> TorchFacts:
    """In a process of its own: what a broken installation or driver does to it (crash, hang) is then a fact too."""
    # where it looks for modules is what this process does, and not the working directory
    program = f"import sys; sys.path[:] = {sys.path!r}; from {torch_probe.__name__} import main; main()"
    code, output = run([sys.executable, "-c", program]) or (1, "cannot start Python")
    lines = output.strip().splitlines()
    if code == 0 and lines:
        with contextlib.suppress(ValueError):  # something else was printed last
            return torch_probe.from_json(lines[-1])
    return TorchFacts(import_error=lines[0] if lines else f"its process ended with exit code {code}")
