"""Moments of one byte: how near they stay, that averages move, and that nothing depends on threads."""

import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from megatrain.optim.adamw_kernels import Segment, adamw
from megatrain.optim.int8_moments import BLOCK, Int8Moments, adamw_int8, blocks
from megatrain.optim.split_master import merge, split
from megatrain.optim.workers import Workers

Floats = NDArray[np.float32]
OPTIONS: dict[str, Any] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(2) as pool:
        yield pool


def normal(length: int, seed: int, scale: float = 1.0) -> Floats:
    return (np.random.default_rng(seed).standard_normal(length) * scale).astype(np.float32)


def largest_of_blocks(values: Floats) -> Floats:
    padded = np.zeros(blocks(values.size) * BLOCK, np.float32)
    padded[: values.size] = np.abs(values)
    return np.repeat(padded.reshape(-1, BLOCK).max(axis=1), BLOCK)[: values.size]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 5000, 200_003])
@pytest.mark.parametrize("split_master", [False, True])
def test_one_update_is_that_of_adamw_and_its_moments_are_within_a_level(
    workers: Workers, length: int, split_master: bool
) -> None:
    """From stored moments: the weights to the last bit, since rounding comes after; each moment between its levels."""
    master, grad = normal(length, seed=1), normal(length, seed=2, scale=1e-3)
    moments = Int8Moments.zeros(length)
    adamw_int8(workers, master, None, moments, grad, [Segment(0, length, **OPTIONS, step=1)], seed=1)
    expected_m, expected_v = moments.decoded()
    expected, grad = master.copy(), normal(length, seed=3, scale=1e-3)
    second = [Segment(0, length, **OPTIONS, step=2)]
    adamw(workers, expected, None, expected_m, expected_v, grad, second)
    if split_master:
        weight, remainder = np.empty(length, np.uint16), np.empty(length, np.int16)
        split(workers, master, weight, remainder)
        adamw_int8(workers, weight, remainder, moments, grad, second, seed=2)
        merge(workers, weight, remainder, master)
    else:
        adamw_int8(workers, master, None, moments, grad, second, seed=2)
    assert np.array_equal(master.view(np.uint32), expected.view(np.uint32))
    m, v = moments.decoded()
    for got, wanted, levels in ((m, expected_m, 127), (np.sqrt(v), np.sqrt(expected_v), 255)):
        scale = largest_of_blocks(wanted)
        position = levels * np.sqrt(np.abs(wanted) / scale)
        above, below = (scale * (f(position + d) / levels) ** 2 for f, d in ((np.ceil, 0.01), (np.floor, -0.01)))
        below[position < 0.01] = 0
        assert (np.abs(got) <= above * 1.0001).all() and (np.abs(got) >= below * 0.9999).all()
        assert ((np.sign(got) == np.sign(wanted)) | (got == 0)).all()


def test_rounding_is_right_on_average(workers: Workers) -> None:
    """Many elements of one value beside a large one: their mean is the value, between two levels as it may be."""
    grad = np.full(64 * 4096, 0.3, np.float32)
    grad[::64] = 1.0
    moments = Int8Moments.zeros(grad.size)
    adamw_int8(workers, normal(grad.size, 0), None, moments, grad, [Segment(0, grad.size, **OPTIONS, step=1)], seed=5)
    m, v = moments.decoded()
    others = np.arange(grad.size) % 64 != 0
    # chance is fair in the square root, where levels are even; its square is larger by the variance, 1/4 level at most
    assert np.sqrt(np.abs(m[others])).mean() == pytest.approx(np.sqrt(0.1 * 0.3), rel=2e-4)
    assert np.sqrt(np.sqrt(v[others])).mean() == pytest.approx(np.sqrt(np.sqrt(0.01) * 0.3), rel=2e-4)


def test_averages_decay_though_a_step_moves_them_less_than_a_level(workers: Workers) -> None:
    """With beta2 0.999 and no gradient the second moment loses 0.1% a step, and its levels are 0.8% apart and more."""
    length, steps = 6400, 300
    options = OPTIONS | {"beta2": 0.999, "beta1": 0.99}
    weight, moments = normal(length, seed=0), Int8Moments.zeros(length)
    grad = np.abs(normal(length, seed=1)) + np.float32(0.5)
    adamw_int8(workers, weight, None, moments, grad, [Segment(0, length, **options, step=1)], seed=0)
    first_m, first_v = moments.decoded()
    for step in range(2, steps + 2):
        adamw_int8(
            workers, weight, None, moments, np.zeros_like(grad), [Segment(0, length, **options, step=step)], seed=step
        )
    m, v = moments.decoded()
    assert m.mean() / first_m.mean() == pytest.approx(0.99**steps, rel=0.05)
    assert v.mean() / first_v.mean() == pytest.approx(0.999**steps, rel=0.05)


def test_a_second_moment_that_is_not_zero_stays_so(workers: Workers) -> None:
    """Beside a value a million times larger; what never had a gradient stays zero."""
    grad = np.zeros(128, np.float32)
    grad[:64] = 1e-6
    grad[0] = 1
    moments = Int8Moments.zeros(128)
    adamw_int8(workers, np.ones(128, np.float32), None, moments, grad, [Segment(0, 128, **OPTIONS, step=1)])
    assert (moments.exp_avg_sq[:64] > 0).all()
    assert not moments.exp_avg_sq[64:].any() and not moments.exp_avg[64:].any()
    assert not moments.exp_avg_sq_scale[1] and not moments.exp_avg_scale[1]


def test_threads_and_segments_change_nothing() -> None:
    length = 300_000
    cuts = [0, 64 * 7, 64 * 1000, 64 * 1001, length]
    results = []
    for threads in (1, 3):
        weight, moments = normal(length, seed=0), Int8Moments.zeros(length)
        with Workers(threads) as pool:
            for step in (1, 2, 3):
                segments = [Segment(a, b, **OPTIONS, step=step) for a, b in pairwise(cuts)]
                if threads == 1:
                    segments = [Segment(0, length, **OPTIONS, step=step)]
                adamw_int8(pool, weight, None, moments, normal(length, seed=step), segments, seed=step)
        results.append((weight, moments.exp_avg, moments.exp_avg_sq, moments.exp_avg_scale, moments.exp_avg_sq_scale))
    for left, right in zip(*results, strict=True):
        assert np.array_equal(left, right)


def test_gaps_are_not_touched(workers: Workers) -> None:
    weight, moments = normal(640, seed=0), Int8Moments.zeros(640)
    before = weight.copy()
    adamw_int8(workers, weight, None, moments, normal(640, seed=1), [Segment(128, 200, **OPTIONS, step=1)])
    changed = weight != before
    assert changed[128:200].all() and not changed[:128].any() and not changed[200:].any()
    assert not moments.exp_avg_sq[200:].any() and not moments.exp_avg_sq[:128].any()


def test_a_segment_that_shares_a_block_is_refused(workers: Workers) -> None:
    weight, moments = normal(640, seed=0), Int8Moments.zeros(640)
    with pytest.raises(ValueError, match="begins at element 100; with moments of one byte, at multiples of 64"):
        adamw_int8(workers, weight, None, moments, weight.copy(), [Segment(100, 200, **OPTIONS, step=1)])
    short = Int8Moments(moments.exp_avg, moments.exp_avg_sq, moments.exp_avg_scale[1:], moments.exp_avg_sq_scale[1:])
    with pytest.raises(ValueError, match="640 elements need 10 scales, not 9"):
        adamw_int8(workers, weight, None, short, weight.copy(), [Segment(0, 200, **OPTIONS, step=1)])


def test_least_squares_ends_where_fp32_moments_end(workers: Workers) -> None:
    """A badly scaled quadratic: curvature from 1 to 1e4, all in each block."""
    length = 6400
    curvature = np.logspace(0, 4, length).astype(np.float32)
    np.random.default_rng(0).shuffle(curvature)
    start, losses = normal(length, seed=1), {}
    for kind in ("int8", "fp32"):
        weight, moments = start.copy(), Int8Moments.zeros(length)
        m, v = np.zeros(length, np.float32), np.zeros(length, np.float32)
        for step in range(1, 1001):
            change = [Segment(0, length, 0.03 * (1 - step / 1001), 0.9, 0.99, 1e-8, 0.0, step)]
            if kind == "int8":
                adamw_int8(workers, weight, None, moments, curvature * weight, change, seed=step)
            else:
                adamw(workers, weight, None, m, v, curvature * weight, change)
        losses[kind] = float((curvature * weight**2).sum())
    first = float((curvature * start**2).sum())
    assert losses["fp32"] < 1e-6 * first and losses["int8"] < 1e-5 * first, (losses, first)


def test_no_step_waits_for_the_compiler() -> None:
    """In a process of its own: here other tests have compiled what they use."""
    code = """
import numpy as np
from megatrain.optim import int8_moments
from megatrain.optim.adamw_kernels import Segment
from megatrain.optim.compilation import compile_kernels
from megatrain.optim.workers import Workers
compile_kernels("int8")
compiled = list(int8_moments._adamw.signatures)
segments = [Segment(0, 128, 1e-3, 0.9, 0.99, 1e-8, 0.0, 1)]
with Workers(1) as workers:
    for grad in (np.ones(128, np.float32), np.ones(128, np.uint16)):
        for weight, remainder in ((np.ones(128, np.float32), None), (np.ones(128, np.uint16), np.ones(128, np.int16))):
            moments = int8_moments.Int8Moments.zeros(128)
            int8_moments.adamw_int8(workers, weight, remainder, moments, grad, segments)
assert len(compiled) == 4 and int8_moments._adamw.signatures == compiled
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
