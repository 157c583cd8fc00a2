"""What a manifest says of where its files came from: settings, data, code, libraries, machine."""

import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatrain.doctor.host import read_cpu, read_memory
from megatrain.doctor.software import installed_version
from megatrain.errors import ConfigError
from megatrain.trust.hashing import hash_files
from megatrain.version import __version__

_LIBRARIES = ("torch", "numpy", "numba", "transformers", "safetensors", "tokenizers")
_PACKAGE = Path(__file__).parents[1]
_ROOT = Path("/")


def run_facts(settings: str, data_files: Sequence[Path], device: str, *, threads: int | None = None) -> dict[str, Any]:
    """What does not change while a run goes on; a manifest adds the step.

    `settings`: the text of `config.yaml`. `device`: what computes, such as a GPU's name. All of `data_files` are read.
    """
    return {
        "code": {"version": __version__, "sha256": code_sha256()},
        "config_sha256": hashlib.sha256(settings.encode()).hexdigest(),
        "data": describe_files(data_files, threads=threads),
        "hardware": {**describe_host(), "device": device},
        "libraries": library_versions(),
    }


def describe_files(paths: Sequence[Path], *, threads: int | None = None) -> list[dict[str, Any]]:
    """Path, bytes and SHA-256 of each file, in the order given. Raises ConfigError where one cannot be read."""
    records = hash_files(paths, threads=threads)
    described = []
    for path in paths:
        record = records[path]
        if isinstance(record, OSError):
            raise ConfigError(f"data: cannot read {str(path)!r}: {record.strerror}")
        described.append({"path": str(path), "bytes": record.bytes, "sha256": record.sha256})
    return described


def code_sha256(package: Path = _PACKAGE) -> str:
    """Of this package's own sources; in its folder, a shell says the same:

    find * -name '*.py' | LC_ALL=C sort | xargs sha256sum | sha256sum
    """
    sources = sorted((path.relative_to(package).as_posix(), path) for path in package.rglob("*.py"))
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}\n" for name, path in sources]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def library_versions() -> dict[str, str | None]:
    """Of Python and what training computes and reads with; None where one is not installed."""
    return {"python": platform.python_version(), **{name: installed_version(name) for name in _LIBRARIES}}


def describe_host(root: Path = _ROOT) -> dict[str, Any]:
    """Processor, cores that may be used and memory; None where it is not known."""
    cpu, memory = read_cpu(root), read_memory(root)
    return {"cpu": cpu.name, "cores": cpu.usable_cores or cpu.logical_cores, "memory_bytes": memory.total_bytes}
