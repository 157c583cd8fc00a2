"""Small tensors of a batch, from the host to where the model computes."""

import torch
from torch import Tensor


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; the caller does not wait. From the host it goes through page-locked memory: a copy from
    other memory may wait until the device has done all that it was given before."""
    if tensor.device.type == "cpu" and device.type != "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
