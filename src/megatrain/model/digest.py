"""Whether a second run of a unit gave what the first one gave."""

import torch
from torch import Tensor

_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}  # of the sum of magnitudes; half precision: 1e-3


class Digest:
    """Sums over floating results, to tell whether a second run gave the same. The same arithmetic differs in the last
    bits at most (a compiled graph, a GPU's atomics); another mask, state or random number differs by far more."""

    def __init__(self, tensors: list[Tensor]) -> None:
        floating = [t.detach() for t in tensors if t.is_floating_point() and t.numel()]
        self._tolerances = [_TOLERANCE.get(t.dtype, 1e-3) for t in floating]
        self._sums = [torch.stack(_sums(t)) for t in floating]

    def matches(self, tensors: list[Tensor]) -> bool:
        other = Digest(tensors)
        if len(self._sums) != len(other._sums):
            return False
        for mine, theirs, tolerance in zip(self._sums, other._sums, self._tolerances, strict=True):
            if bool(torch.isfinite(mine).all()) and not bool(((mine - theirs).abs() <= tolerance * mine[1]).all()):
                return False
        return True


def _sums(tensor: Tensor) -> list[Tensor]:
    """Sum, sum of magnitudes and L2 norm in fp64, without a copy of the tensor in fp64."""
    exact = torch.float64
    flat = tensor.reshape(-1)
    return [flat.sum(dtype=exact), *(torch.linalg.vector_norm(flat, order, dtype=exact) for order in (1, 2))]
