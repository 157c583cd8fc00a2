"""bf16 products on a CPU that has no bf16 arithmetic: through fp32, rounded once.

There PyTorch computes bf16 products element by element (measured on an AVX2 machine: 0.7 to 12 GFLOP/s, against 80 in
fp32). The product of two bf16 numbers is exact in fp32, so multiplying in fp32 and rounding the sum is what hardware
with bf16 units does; only the order of the additions inside a sum is the fp32 library's. A plain product widens its
larger operand in blocks, so that the temporary copy stays small.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_BLOCK_BYTES = 16 * 1024**2  # of a widened operand
_aten = torch.ops.aten


class Bf16ThroughFp32(TorchDispatchMode):
    """While active, bf16 matrix products and attention on the CPU are computed in fp32 and rounded to bf16."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replacement = _REPLACEMENTS.get(func)
        if replacement is None or args[1].dtype != torch.bfloat16 or args[1].device.type != "cpu":
            return func(*args, **(kwargs or {}))
        return replacement(func, *args, **(kwargs or {}))


def _mm(_func: Any, a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] @ b [k, n] -> [m, n], by blocks of the larger of m and n."""
    (m, inner), n = a.shape, b.shape[1]
    parts = _blocks(max(m, n), inner + min(m, n))
    if len(parts) == 1:
        return (a.float() @ b.float()).bfloat16()
    out = torch.empty(m, n, dtype=torch.bfloat16, device="cpu")
    narrow = (a if n >= m else b).float()
    for part in parts:
        if n >= m:
            out[:, part] = narrow @ b[:, part].float()
        else:
            out[part] = a[part].float() @ narrow
    return out


def _addmm(_func: Any, bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return torch.addmm(bias.float(), a.float(), b.float(), beta=beta, alpha=alpha).bfloat16()


def _widened(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Any other operation: bf16 tensors widened, fp32 results rounded where the operation would give bf16."""
    results = func(*(_widen(a) for a in args), **{k: _widen(v) for k, v in kwargs.items()})
    if isinstance(results, Tensor):
        return results.bfloat16()
    return (results[0].bfloat16(), *results[1:])  # attention: output, log-sum-exp in fp32


def _widened_gradients(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return tuple(g.bfloat16() for g in func(*(_widen(a) for a in args), **{k: _widen(v) for k, v in kwargs.items()}))


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


def _blocks(length: int, width: int) -> list[slice]:
    size = max(1, _BLOCK_BYTES // (4 * width))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


_REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    _aten.mm.default: _mm,
    _aten.addmm.default: _addmm,
    _aten.bmm.default: _widened,
    _aten.baddbmm.default: _widened,
    _aten._scaled_dot_product_flash_attention_for_cpu.default: _widened,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _widened_gradients,
}
