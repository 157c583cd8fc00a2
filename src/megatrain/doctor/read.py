"""All facts of this machine, read now."""

import os
from collections.abc import Mapping
from pathlib import Path

from megatrain.doctor.facts import Facts
from megatrain.doctor.gpus import read_gpus
from megatrain.doctor.host import read_cpu, read_memory, read_storage, read_system
from megatrain.doctor.software import read_software


def read_facts(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Facts:
    """Nothing is changed and nothing raises. Takes seconds: PyTorch is imported, nvidia-smi called."""
    return Facts(
        system=read_system(root, environment),
        cpu=read_cpu(root),
        memory=read_memory(root),
        storage=read_storage(root, _working_directory()),
        gpu=read_gpus(root),
        software=read_software(environment),
    )


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was deleted
        return None
