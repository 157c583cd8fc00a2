"""What a caller finds as `.grad` of the parameters, under a loop of their own.

The engine gathers gradients unit by unit and holds them in its own memory. So that code which knows nothing of that
(`torch.nn.utils.clip_grad_norm_`, `zero_grad` of a submodule, `p.grad = ...`) does what it does in plain PyTorch, each
parameter that has got a gradient shows a stand-in for it, which becomes the gradient itself when it is read or written.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_DESCRIBING = frozenset(
    {"shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad_fn", "is_leaf", "is_sparse", "is_cuda"}
    | {"size", "dim", "numel", "nelement", "requires_grad_", "is_floating_point", "is_complex"}
)


class HeldGradient(Tensor):
    """A gradient's shape and dtype; `read` gives the gradient, in the engine's memory, to whatever else is asked."""

    read: Callable[[], Tensor]

    @classmethod
    def of(cls, parameter: nn.Parameter, read: Callable[[], Tensor]) -> "HeldGradient":
        nothing = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
        held: HeldGradient = nothing.as_subclass(cls)  # type: ignore[assignment]
        held.read = read
        return held

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            asked = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
            if asked in _DESCRIBING:
                return func(*args, **(kwargs or {}))
            return func(*_read(args), **_read(kwargs or {}))


def _read(value: Any) -> Any:
    """`value` with gradients in place of their stand-ins."""
    if isinstance(value, HeldGradient):
        return value.read()
    if isinstance(value, (list, tuple)):
        return type(value)(map(_read, value))
    if isinstance(value, dict):
        return {key: _read(one) for key, one in value.items()}
    return value
