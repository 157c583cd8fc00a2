"""What a row of results says of the machine it comes from."""

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

from harness import BENCHMARKS
from megatrain.doctor.host import read_cpu
from megatrain.memory.limits import host_memory_limits
from megatrain.sizes import format_bytes

_PACKAGES = ("transformers", "numba", "triton", "liger-kernel", "deepspeed")


def describe_machine(device: str, commit: str = "") -> dict[str, str]:
    """device: cpu, lagged, cuda or cuda:NUMBER, whose name and driver are given then. commit: '' is git's answer."""
    kind, _, number = device.partition(":")
    on_gpu = kind == "cuda"
    versions = [f"python {platform.python_version()}", f"torch {torch.__version__}", f"cuda {torch.version.cuda}"]
    versions += [f"{name} {installed_version(name)}" for name in _PACKAGES]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": commit or commit_of(BENCHMARKS.parent),
        "device": torch.cuda.get_device_name(int(number or 0)) if on_gpu else kind,
        "driver": _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) if on_gpu else "",
        "cpu": cpu_name(),
        "cores": str(usable_cores()),
        "host_memory": format_bytes(host_memory_limits().total_bytes),
        "load": f"{os.getloadavg()[0]:.1f}",  # of the minute before: how idle it was
        "versions": " ".join(versions),
    }


def commit_of(repository: Path) -> str:
    """The commit that is measured, with "-dirty" where its code was changed; results are no code."""
    git = ["git", "-C", str(repository)]
    head = _first_line([*git, "rev-parse", "--short", "HEAD"])
    changed = _first_line([*git, "status", "--porcelain", "--", "*.py", "*.toml", "constraints.txt"], nothing="")
    return head + ("-dirty" if changed and head != "unknown" else "")


def installed_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def cpu_name() -> str:
    """As the system reports it, or 'unknown'."""
    return read_cpu(Path("/")).name or "unknown"


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _first_line(command: list[str], nothing: str = "unknown") -> str:
    """That a command prints; 'unknown' where it cannot be run, `nothing` where it prints none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return next(iter(done.stdout.strip().splitlines()), nothing)
