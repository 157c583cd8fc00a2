"""The optimizer's arithmetic in torch operations, for state that lies in a device's memory.

The same operations in the same order as the host's kernels (`adamw_kernels`, `int8_moments`, `split_master`), so that
an update has the same bits wherever it runs. Two things are had by way of fp64: torch's root of fp32 numbers is not
always the nearest, and it has no fused multiply-add. The product of one is exact in fp64; where the sum, rounded to
fp64, falls on a tie of fp32 that it was only near, about once in 2^29 elements, a moment differs by its last bit.

Nothing here waits for the device. Tensors are 1-D and contiguous; they are gone through in pieces, so that what is
computed in between stays small and in the device's cache.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatrain.optim.adamw_kernels import Segment, segment_table
from megatrain.optim.int8_moments import BLOCK, seed_bits

PIECE = 1 << 21  # elements; a multiple of BLOCK
_WORD = 0xFFFFFFFF


def adamw(
    weight: Tensor,
    remainder: Tensor | None,
    moments: Mapping[str, Tensor],
    grad: Tensor,
    segments: Sequence[Segment],
    grad_scale: float = 1.0,
    seed: int = 0,
) -> None:
    """One AdamW update in place, on the terms of `adamw_kernels.adamw`; with `moments` that have scales, on those of
    `int8_moments.adamw_int8`. `weight` and `grad`: bfloat16 or float32; `remainder`: int16, None for fp32 weights."""
    bounds, rows = segment_table(segments, weight.numel())
    for (first, last), row in zip(bounds.tolist(), rows.tolist(), strict=True):
        for start in range(first, last, PIECE):
            here = slice(start, min(start + PIECE, last))
            m, v = _read_moments(moments, here)
            p = weight[here] if remainder is None else _merged(weight[here], remainder[here])
            p, m, v = _updated(p, m, v, grad[here].float() * grad_scale, row)
            if remainder is None:
                weight[here] = p
            else:
                split(p, weight[here], remainder[here])
            _write_moments(moments, here, m, v, seed)


def _updated(p: Tensor, m: Tensor, v: Tensor, g: Tensor, row: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """As `adamw_kernels._updated`."""
    decay, lerp, from_grad, beta2, rest2, step_size, root_scale, eps = row
    m = _fma(g - m, lerp, g if from_grad else m)
    v = _fma(g * rest2, g, v * beta2)
    # by a tensor: torch multiplies by the reciprocal of a number, which rounds twice
    denominator = _root(v).div_(torch.full((), root_scale, device=v.device)).add_(eps)
    return (p * decay).add_((m * step_size).div_(denominator)), m, v


def _fma(x: Tensor, y: Tensor | float, z: Tensor) -> Tensor:
    return (x.double() * y).add_(z).float()


def _root(x: Tensor) -> Tensor:
    return x.double().sqrt_().float()


def split(master: Tensor, weight: Tensor, remainder: Tensor) -> None:
    """As `split_master.split`: float32 `master`, from anywhere, into bfloat16 `weight` and int16 `remainder`."""
    for start in range(0, weight.numel(), PIECE):
        here = slice(start, start + PIECE)
        words = master[here].to(weight.device).view(torch.int32)
        weight.view(torch.int16)[here] = (words + 0x8000) >> 16  # a conversion to fewer bits keeps the low ones
        remainder[here] = words


def merge(weight: Tensor, remainder: Tensor, master: Tensor) -> None:
    """As `split_master.merge`: writes the exact float32 `master`, anywhere."""
    for start in range(0, weight.numel(), PIECE):
        here = slice(start, start + PIECE)
        master[here] = _merged(weight[here], remainder[here])


def _merged(weight: Tensor, remainder: Tensor) -> Tensor:
    return (weight.view(torch.int16).int() * 0x10000).add_(remainder).view(torch.float32)


def square_sum(values: Tensor) -> Tensor:
    """The sum of squares of a bfloat16 or float32 tensor, float64 of no dimension."""
    parts = [piece.double().square_().sum() for piece in values.split(PIECE)]
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64, device=values.device)


# -- moments of one byte ----------------------------------------------------------------------------------------


def _read_moments(moments: Mapping[str, Tensor], here: slice) -> tuple[Tensor, Tensor]:
    avg, sq = moments["exp_avg"][here], moments["exp_avg_sq"][here]
    if "exp_avg_scale" not in moments:
        return avg, sq
    scales = _blocks_of(here)
    part = avg.float() * (1 / 127)
    averages = _each(moments["exp_avg_scale"][scales], avg.numel()) * part * part.abs()
    part = sq.float() * (1 / 255)
    roots = _each(moments["exp_avg_sq_scale"][scales], sq.numel()) * part * part
    return averages, roots * roots


def _write_moments(moments: Mapping[str, Tensor], here: slice, m: Tensor, v: Tensor, seed: int) -> None:
    if "exp_avg_scale" not in moments:
        moments["exp_avg"][here] = m
        moments["exp_avg_sq"][here] = v
        return
    scales, low, high = _blocks_of(here), *_chances(here, seed, m.device)
    inverses = _rescale(m, moments["exp_avg_scale"][scales])
    level = (_root(m.abs() * inverses) * 127).add_(low).int().clamp_(max=127)
    moments["exp_avg"][here] = torch.where(m < 0, -level, level)
    roots = _root(v)
    inverses = _rescale(roots, moments["exp_avg_sq_scale"][scales])
    level = (_root(roots * inverses) * 255).add_(high).int().clamp_(max=255)
    moments["exp_avg_sq"][here] = torch.maximum(level, (roots > 0).int())  # what is not zero never becomes zero


def _blocks_of(here: slice) -> slice:
    return slice(here.start // BLOCK, -(-here.stop // BLOCK))


def _each(scales: Tensor, count: int) -> Tensor:
    return scales.repeat_interleave(BLOCK, output_size=scales.numel() * BLOCK)[:count]


def _rescale(values: Tensor, scales: Tensor) -> Tensor:
    """Write each block's largest magnitude to `scales`; returns its inverse for every element."""
    rows = pad(values.abs(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    scales.copy_(rows.amax(1))
    inverses = torch.where(scales > 0, scales.reciprocal(), 0.0)
    return _each(inverses, values.numel())


def _chances(here: slice, seed: int, device: torch.device) -> Iterator[Tensor]:
    """As `int8_moments._chance`, in [0, 1): of the low and of the high 16 bits. int64 holds what 32 bits wrap."""
    x = (torch.arange(here.start, here.stop, device=device) + seed_bits(seed)) & _WORD
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    x = x ^ (x >> 16)
    for part in (x & 0xFFFF, x >> 16):
        yield part.float() * (1 / 65536)
