"""`megatrain doctor`: prints the facts and the findings."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from megatrain.doctor.facts import CpuFacts, Facts, Gpu, Limit, MemoryFacts
from megatrain.doctor.finding import LEVELS, Finding
from megatrain.doctor.findings import find
from megatrain.doctor.host_checks import fit_text
from megatrain.doctor.read import read_facts
from megatrain.sizes import format_bytes

_UNKNOWN = "unknown"


def doctor(environment: Mapping[str, str], *, as_json: bool) -> bool:
    """Print what this machine offers and what will bite; returns whether there is no problem."""
    facts = read_facts(environment)
    findings = find(facts)
    print(json.dumps(as_data(facts, findings), indent=2) if as_json else as_text(facts, findings))
    return not any(finding.level == "problem" for finding in findings)


def as_data(facts: Facts, findings: list[Finding]) -> dict[str, Any]:
    return {"facts": asdict(facts), "findings": [asdict(finding) for finding in findings]}


def as_text(facts: Facts, findings: list[Finding]) -> str:
    rows = [(name, text) for name, text in _rows(facts) if text]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {text}" for name, text in rows]
    lines.append("")
    for finding in findings:
        lines += [f"{finding.level + ':':<9}{finding.what}", f"{'':<9}-> {finding.remedy}"]
    counts = [(sum(finding.level == level for finding in findings), level) for level in LEVELS]
    found = ", ".join(f"{n} {level}{'s' if n != 1 else ''}" for n, level in counts if n)
    return "\n".join([*lines, *([""] if findings else []), found or "nothing found that will bite"])


def _rows(facts: Facts) -> Iterator[tuple[str, str]]:
    """(name, text); those without a text are not shown."""
    yield from _system_rows(facts)
    yield "cpu", _cpu(facts.cpu)
    yield from _memory_rows(facts.memory)
    yield from _storage_rows(facts)
    yield from _gpu_rows(facts)
    yield from _software_rows(facts)


def _system_rows(facts: Facts) -> Iterator[tuple[str, str]]:
    system = facts.system
    place = [f"WSL {system.wsl}" if system.wsl else "", f"container ({system.container})" if system.container else ""]
    kernel = f"{system.kernel or 'kernel ' + _UNKNOWN} ({system.architecture or _UNKNOWN})"
    yield "system", ", ".join([kernel, system.libc or f"C library {_UNKNOWN}", *filter(None, place)])
    yield (
        "process",
        f"open files {_limit(system.open_files_limit, str)}, locked memory "
        f"{_limit(facts.memory.locked_limit, format_bytes)}, out-of-memory score {_or_unknown(system.oom_score)} "
        f"(adjusted by {_or_unknown(system.oom_score_adj)})",
    )


def _cpu(cpu: CpuFacts) -> str:
    smt = _UNKNOWN
    if cpu.physical_cores is not None and cpu.logical_cores is not None:
        smt = "on" if cpu.logical_cores > cpu.physical_cores else "off"
    quota = f"quota {cpu.quota_cores:g} cores" if cpu.quota_cores is not None else "no quota"
    sets = _UNKNOWN if cpu.instruction_sets is None else " ".join(cpu.instruction_sets) or "none"
    return (
        f"{cpu.name or _UNKNOWN}; sockets {_or_unknown(cpu.sockets)}, cores {_or_unknown(cpu.physical_cores)}, "
        f"SMT {smt}, usable {_or_unknown(cpu.usable_cores)}, {quota}; instruction sets: {sets}"
    )


def _memory_rows(memory: MemoryFacts) -> Iterator[tuple[str, str]]:
    limit = ""
    if memory.cgroup_limit_bytes is not None:
        limit = f", control group {_size(memory.cgroup_used_bytes)} of {_size(memory.cgroup_limit_bytes)}"
    yield "memory", f"{_size(memory.total_bytes)}, available {_size(memory.available_bytes)}{limit}"
    yield "fits", fit_text(memory.free_bytes) if memory.free_bytes is not None else _UNKNOWN
    for node in memory.nodes if len(memory.nodes) > 1 else ():
        sizes = f"{_size(node.total_bytes)}, free {_size(node.free_bytes)}"
        yield f"numa node {node.number}", f"{sizes}, cores {node.cores or _UNKNOWN}"
    swap = f"swap {_size(memory.swap_used_bytes)} of {_size(memory.swap_total_bytes)} used"
    yield (
        "paging",
        f"{'no swap' if memory.swap_total_bytes == 0 else swap}, transparent huge pages "
        f"{memory.huge_pages or _UNKNOWN}, overcommit mode {_or_unknown(memory.overcommit_mode)}",
    )


def _storage_rows(facts: Facts) -> Iterator[tuple[str, str]]:
    storage = facts.storage
    sizes = f"{_size(storage.free_bytes)} free of {_size(storage.total_bytes)}"
    yield "disk", f"{storage.folder or _UNKNOWN}: {sizes}, filesystem {storage.filesystem or _UNKNOWN}"
    for disk in storage.nvme:
        yield disk.name, f"{disk.model or _UNKNOWN}, {_size(disk.total_bytes)}"


def _gpu_rows(facts: Facts) -> Iterator[tuple[str, str]]:
    gpu = facts.gpu
    for one in gpu.gpus:
        yield f"gpu {one.index}", _gpu(one)
    if not gpu.gpus:
        yield "gpu", "none found"
    if gpu.hardware:
        error = f"; nvidia-smi: {gpu.driver.nvidia_smi_error}" if gpu.driver.nvidia_smi_error else ""
        yield "driver", f"{gpu.driver.version or _UNKNOWN}, runs CUDA up to {gpu.driver.cuda or _UNKNOWN}{error}"
    seen = ", ".join(f"{device.name} ({_size(device.memory_bytes)})" for device in gpu.torch.devices)
    build = f"CUDA {gpu.torch.cuda}" if gpu.torch.cuda else f"ROCm {gpu.torch.rocm}" if gpu.torch.rocm else "CPU"
    if gpu.torch.version is not None:
        yield "pytorch", f"{gpu.torch.version}, built for {build}; uses {seen or 'no GPU'}"


def _gpu(gpu: Gpu) -> str:
    bf16 = {True: "native bf16", False: "no native bf16", None: f"bf16 {_UNKNOWN}"}[gpu.native_bf16]
    link = f"PCIe generation {_or_unknown(gpu.pcie_generation)} of {_or_unknown(gpu.pcie_generation_max)}"
    link += f" x{_or_unknown(gpu.pcie_width)} of x{_or_unknown(gpu.pcie_width_max)}"
    persistence = {True: "on", False: "off", None: _UNKNOWN}[gpu.persistence_mode]
    power = [_or_unknown(watts) for watts in (gpu.power_limit_watts, gpu.power_default_watts)]
    return (
        f"{gpu.name or _UNKNOWN}, {_size(gpu.used_bytes)} of {_size(gpu.memory_bytes)} used, compute capability "
        f"{gpu.compute_capability or _UNKNOWN}, {bf16}; {link}, NUMA node {_or_unknown(gpu.numa_node)}; persistence "
        f"mode {persistence}, power limit {power[0]} W (default {power[1]} W)"
    )


def _software_rows(facts: Facts) -> Iterator[tuple[str, str]]:
    software = facts.software
    yield "python", f"{software.python or _UNKNOWN}, megatrain {software.megatrain or _UNKNOWN}"
    installed = [f"{name} {version}" for name, version in software.packages.items() if version]
    missing = [name for name, version in software.packages.items() if version is None]
    yield "packages", ", ".join(installed)
    yield "not installed", ", ".join(missing)
    yield "numba cache", software.numba_cache or ("nowhere to write" if software.numba_cache_folders else _UNKNOWN)
    yield "encoding", software.encoding or _UNKNOWN
    yield "environment", " ".join(f"{name}={value}" for name, value in software.environment.items())


def _size(count: int | None) -> str:
    return _UNKNOWN if count is None else format_bytes(count)


def _or_unknown(value: int | float | None) -> str:
    return _UNKNOWN if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _limit(limit: Limit, text: Any) -> str:
    return str(text(limit)) if isinstance(limit, int) else limit or _UNKNOWN
