"""What PyTorch says when it is asked to use a GPU. `main` prints it as one line of JSON."""

import dataclasses
import importlib
import json
import warnings
from dataclasses import asdict, replace
from typing import Any

from megatrain.doctor.facts import TorchDevice, TorchFacts


def read_torch() -> TorchFacts:
    """Imports PyTorch, which takes seconds, and lets it start CUDA."""
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a broken installation fails in many ways
        return TorchFacts(import_error=_first_line(error))
    version = TorchFacts(version=str(torch.__version__), cuda=torch.version.cuda, rocm=torch.version.hip)
    if version.cuda is None and version.rocm is None:
        return replace(version, unusable_because="it is built for the CPU alone")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of GPUs that its kernels do not fit; the findings say it in one line
        try:
            torch.cuda.init()
            devices = tuple(_device(torch, index) for index in range(torch.cuda.device_count()))
            reason = None if devices else "it counts no devices"
        except Exception as error:  # RuntimeError, AssertionError and its own kinds
            devices, reason = (), _first_line(error)
        architectures = tuple(torch.cuda.get_arch_list())
    return replace(version, devices=devices, unusable_because=reason, architectures=architectures)


def _device(torch: Any, index: int) -> TorchDevice:
    found = torch.cuda.get_device_properties(index)
    return TorchDevice(str(found.name), int(found.total_memory), f"{found.major}.{found.minor}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def from_json(line: str) -> TorchFacts:
    """What `main` printed. Raises ValueError where the line is something else."""
    fields = json.loads(line)
    if not isinstance(fields, dict) or fields.keys() != {field.name for field in dataclasses.fields(TorchFacts)}:
        raise ValueError(f"{line!r} is not what PyTorch was asked")
    devices = tuple(TorchDevice(**device) for device in fields.pop("devices"))
    return TorchFacts(**fields | {"devices": devices, "architectures": tuple(fields["architectures"])})


def main() -> None:
    print(json.dumps(asdict(read_torch())))
