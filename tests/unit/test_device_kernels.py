"""The optimizer in torch operations has the bits of the host's kernels."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatrain.memory.store import bits
from megatrain.optim import device_kernels
from megatrain.optim.adamw_kernels import Segment, adamw
from megatrain.optim.gradient_kernels import square_sum
from megatrain.optim.int8_moments import Int8Moments, adamw_int8
from megatrain.optim.split_master import merge, split
from megatrain.optim.workers import Workers

STEPS = 3
FIRST: dict[str, Any] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
OTHER: dict[str, Any] = {"lr": 3e-4, "beta1": 0.3, "beta2": 0.999, "eps": 1e-6, "weight_decay": 0.0}


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(2) as pool:
        yield pool


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_kernels, "PIECE", 64 * 50)


def normal(count: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * scale


def segments(count: int, step: int) -> list[Segment]:
    """Two with hyper-parameters of their own (the betas' rounding differs on the two sides of a half), with elements
    between them that got no gradient."""
    middle = count // 2 // 64 * 64
    both = [Segment(0, max(middle - 64, 0), **FIRST, step=step), Segment(middle, count, **OTHER, step=step + 2)]
    return [segment for segment in both if segment.stop > segment.start]


def split_of(workers: Workers, master: Tensor) -> tuple[Tensor, Tensor]:
    weight = torch.empty(master.numel(), dtype=torch.bfloat16)
    remainder = torch.empty(master.numel(), dtype=torch.int16)
    split(workers, master.numpy(), bits(weight), remainder.numpy())
    return weight, remainder


def as_bits(tensor: Tensor) -> Tensor:
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.itemsize])


@pytest.mark.parametrize("count", [1, 64, 3199, 200_003])
@pytest.mark.parametrize("split_master", [True, False])
@pytest.mark.parametrize("gradient", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_an_update_has_the_bits_of_the_hosts(
    workers: Workers, count: int, split_master: bool, gradient: torch.dtype, kind: str
) -> None:
    master = normal(count, 1)
    host_weight, host_remainder = split_of(workers, master) if split_master else (master, None)
    weight = host_weight.clone()
    remainder = None if host_remainder is None else host_remainder.clone()
    names = ["exp_avg", "exp_avg_sq"]
    if kind == "fp32":
        host = {name: torch.zeros(count) for name in names}
    else:
        zeros = Int8Moments.zeros(count)
        names += ["exp_avg_scale", "exp_avg_sq_scale"]
        host = {name: torch.from_numpy(getattr(zeros, name)) for name in names}
    moments = {name: part.clone() for name, part in host.items()}
    for step in range(1, STEPS + 1):
        grad = normal(count, 10 + step, 1e-2).to(gradient)
        arrays = [bits(host_weight), None if host_remainder is None else host_remainder.numpy()]
        update = (bits(grad), segments(count, step), 0.37)
        if kind == "fp32":
            adamw(workers, *arrays, host["exp_avg"].numpy(), host["exp_avg_sq"].numpy(), *update)
        else:
            held = Int8Moments(**{name: part.numpy() for name, part in host.items()})
            adamw_int8(workers, *arrays, held, *update, seed=step)
        device_kernels.adamw(weight, remainder, moments, grad, segments(count, step), 0.37, seed=step)
        assert torch.equal(as_bits(weight), as_bits(host_weight))
        assert remainder is None or torch.equal(remainder, host_remainder)
        for name in names:
            assert torch.equal(as_bits(moments[name]), as_bits(host[name])), name


def test_masters_of_every_kind_are_split_and_merged_alike(workers: Workers) -> None:
    """All upper halves, with low halves on both sides of a tie."""
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) * 0x10000
    master = torch.cat([upper + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).view(torch.float32)
    expected_weight, expected_remainder = split_of(workers, master)
    weight, remainder = torch.empty_like(expected_weight), torch.empty_like(expected_remainder)
    device_kernels.split(master, weight, remainder)
    assert torch.equal(as_bits(weight), as_bits(expected_weight))
    assert torch.equal(remainder, expected_remainder)
    back = np.empty(master.numel(), np.float32)
    merge(workers, bits(weight), remainder.numpy(), back)
    merged = torch.empty_like(master)
    device_kernels.merge(weight, remainder, merged)
    assert np.array_equal(merged.numpy().view(np.uint32), back.view(np.uint32))
    assert torch.equal(as_bits(merged), as_bits(master))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [0, 1, 10_007])
def test_sums_of_squares_agree(workers: Workers, dtype: torch.dtype, count: int) -> None:
    """In fp64, added up in another order."""
    values = normal(count, 3).to(dtype)
    assert float(device_kernels.square_sum(values)) == pytest.approx(square_sum(workers, bits(values)), rel=1e-13)
