"""Reads versions, the environment and where numba may keep compiled code, without importing any of it."""

import locale
import os
import platform
import re
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from megatrain.doctor.facts import SoftwareFacts
from megatrain.version import __version__

_PACKAGES = (
    *("torch", "transformers", "numpy", "numba", "safetensors", "tokenizers"),
    *("triton", "liger-kernel", "flash-attn"),  # used by models and PyTorch where they are installed
)
# no others are shown: a report is something to send around, and variables may hold secrets
_VARIABLES = ("OMP_", "KMP_", "GOMP_", "MKL_", "NUMBA_", "CUDA_", "NVIDIA_VISIBLE_DEVICES", "PYTORCH_")
_PACKAGE = Path(__file__).parents[1]


def read_software(environment: Mapping[str, str], package: Path = _PACKAGE) -> SoftwareFacts:
    """`package`: the folder of megatrain itself."""
    required = _required()
    folders = _numba_cache_folders(environment, package)
    return SoftwareFacts(
        megatrain=__version__,
        python=platform.python_version(),
        packages={name: installed_version(name) for name in dict.fromkeys((*_PACKAGES, *required))},
        required=required,
        encoding=_encoding(),
        numba_cache_folders=tuple(map(str, folders)),
        numba_cache=next((str(folder) for folder in folders if _can_write(folder)), None),
        environment={name: environment[name] for name in sorted(environment) if name.startswith(_VARIABLES)},
    )


def installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except (metadata.PackageNotFoundError, KeyError, OSError, ValueError):
        return None


def _required() -> dict[str, str]:
    """Least versions from megatrain's own installation, which has them from pyproject.toml; extras are left out."""
    try:
        lines = metadata.requires("megatrain") or []
    except (metadata.PackageNotFoundError, KeyError, OSError, ValueError):
        return {}
    found = [re.fullmatch(r"([\w.-]+)\s*\(?>=\s*([\d.]+)[^;]*", line.strip()) for line in lines]
    return {match[1]: match[2] for match in found if match}


def _encoding() -> str | None:
    try:
        return "utf-8" if sys.flags.utf8_mode else locale.getencoding()
    except (LookupError, ValueError, locale.Error):
        return None


def _numba_cache_folders(environment: Mapping[str, str], package: Path) -> list[Path]:
    """Where numba looks, in its order: a folder of the user's choice, beside the kernels, the user's cache."""
    chosen = environment.get("NUMBA_CACHE_DIR")
    home = environment.get("HOME") or os.path.expanduser("~")
    user = Path(environment.get("XDG_CACHE_HOME") or Path(home, ".cache"), "numba")
    return [*([Path(chosen)] if chosen else []), package / "optim/__pycache__", user]


def _can_write(folder: Path) -> bool:
    """Whether `folder` can be written, or made below the innermost folder that exists. Nothing is left behind."""
    try:
        while not os.path.lexists(folder) and folder != folder.parent:
            folder = folder.parent
        tempfile.TemporaryFile(dir=folder).close()  # as numba tries it: permissions alone do not tell of full disks
    except OSError:
        return False
    return True
