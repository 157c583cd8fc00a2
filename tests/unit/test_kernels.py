"""Host kernels against torch and exact sums, bit for bit where torch defines the bits, for any threads."""

import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatrain.optim import adamw_kernels, gradient_kernels
from megatrain.optim.adamw_kernels import Segment, adamw
from megatrain.optim.compilation import compile_kernels
from megatrain.optim.gradient_kernels import accumulate, copy_with_square_sum, round_to_bf16, square_sum
from megatrain.optim.split_master import merge, split
from megatrain.optim.workers import Workers

Floats = NDArray[np.float32]
BITS_OF = {np.dtype(np.float32): np.uint32, np.dtype(np.uint16): np.uint16, np.dtype(np.int16): np.int16}


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    compile_kernels()
    with Workers(2) as pool:
        yield pool


def same_bits(left: NDArray[Any], right: NDArray[Any]) -> bool:
    return np.array_equal(left.view(BITS_OF[left.dtype]), right.view(BITS_OF[right.dtype]))


def bf16_bits(values: Floats) -> NDArray[np.uint16]:
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()


def floats_of(bits: NDArray[np.uint16]) -> Floats:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def normal(length: int, seed: int, scale: float = 1.0) -> Floats:
    return (np.random.default_rng(seed).standard_normal(length) * scale).astype(np.float32)


class TorchAdamW:
    """torch's fused AdamW on one tensor, padded to 64 elements so that all of them take its vector path."""

    def __init__(self, weight: Floats, step: int = 0, pad: bool = True, **options: Any) -> None:
        self.length = weight.size
        padding = np.zeros(-weight.size % 64 if pad else 0, np.float32)
        self.padding = padding
        self.parameter = torch.nn.Parameter(torch.from_numpy(np.concatenate([weight, padding])))
        self.optimizer = torch.optim.AdamW([self.parameter], fused=True, **options)
        self.state = self.optimizer.state[self.parameter]
        self.state["step"] = torch.tensor(float(step))
        self.state["exp_avg"] = torch.zeros_like(self.parameter)
        self.state["exp_avg_sq"] = torch.zeros_like(self.parameter)

    def update(self, grad: Floats) -> None:
        self.parameter.grad = torch.from_numpy(np.concatenate([grad, self.padding]))
        self.optimizer.step()

    def arrays(self) -> list[Floats]:
        tensors = (self.parameter.detach(), self.state["exp_avg"], self.state["exp_avg_sq"])
        return [tensor.numpy()[: self.length] for tensor in tensors]


def segment(length: int, step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> Segment:
    return Segment(0, length, lr, *betas, eps, weight_decay, step)


SETTINGS = [
    {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1},
    {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1},
    {"lr": 1e-2, "betas": (0.5, 0.99), "eps": 1e-15, "weight_decay": 0.0},  # 1 - beta1 is no longer below 0.5
    {"lr": 1e-2, "betas": (0.3, 0.7), "eps": 1e-3, "weight_decay": 1.5},
    {"lr": 1e-1, "betas": (0.0, 0.0), "eps": 1e-8, "weight_decay": 0.01},
]


def gradients(length: int, steps: int) -> Iterator[Floats]:
    """Ordinary, zero, tiny (denormal, and with a square that underflows) and huge gradients in turn."""
    rng = np.random.default_rng(length)
    for step in range(steps):
        grad = normal(length, seed=step, scale=float(10.0 ** rng.integers(-4, 3)))
        grad[rng.random(length) < 0.1] = 0.0
        grad[rng.random(length) < 0.1] *= np.float32(1e-38)
        grad[rng.random(length) < 0.05] *= np.float32(1e15)
        yield np.zeros_like(grad) if step == 3 else grad


@pytest.mark.parametrize("options", SETTINGS, ids=lambda o: f"lr={o['lr']},betas={o['betas']}")
@pytest.mark.parametrize("length", [1, 7, 1003, 66_001])
def test_bits_of_torchs_fused_adamw(workers: Workers, options: dict[str, Any], length: int) -> None:
    weight = normal(length, seed=length)
    weight[::11] = 1e-40
    reference = TorchAdamW(weight.copy(), **options)
    m, v = np.zeros_like(weight), np.zeros_like(weight)
    for step, grad in enumerate(gradients(length, 24), start=1):
        reference.update(grad)
        adamw(workers, weight, None, m, v, grad, [segment(length, step, **options)], 1.0)
        for name, ours, torchs in zip("pmv", (weight, m, v), reference.arrays(), strict=True):
            assert same_bits(ours, torchs), f"{name} at step {step}"


def test_torchs_own_tail_agrees_to_the_last_bits(workers: Workers) -> None:
    """Why the reference above is padded, as the docstring of `adamw` says."""
    length, options = 999, SETTINGS[1]
    weight = normal(length, seed=1)
    reference = TorchAdamW(weight.copy(), pad=False, **options)
    m, v = np.zeros_like(weight), np.zeros_like(weight)
    for step in range(1, 21):
        grad = normal(length, seed=step)
        reference.update(grad)
        adamw(workers, weight, None, m, v, grad, [segment(length, step, **options)], 1.0)
    head = length - length % 16
    for ours, torchs in zip((weight, m, v), reference.arrays(), strict=True):
        assert same_bits(ours[:head], torchs[:head])
        np.testing.assert_allclose(ours[head:], torchs[head:], rtol=1e-6)


@pytest.mark.parametrize("start", [9, 1000, 123_456, 10_000_000])
def test_late_steps(workers: Workers, start: int) -> None:
    options, length = SETTINGS[0], 640
    weight = normal(length, seed=start)
    reference = TorchAdamW(weight.copy(), step=start, **options)
    m, v = np.zeros_like(weight), np.zeros_like(weight)
    for step in range(start + 1, start + 4):
        grad = normal(length, seed=step)
        reference.update(grad)
        adamw(workers, weight, None, m, v, grad, [segment(length, step, **options)], 1.0)
    for ours, torchs in zip((weight, m, v), reference.arrays(), strict=True):
        assert same_bits(ours, torchs)


@pytest.mark.parametrize("master", ["plain", "split"])
@pytest.mark.parametrize("grad_dtype", ["float32", "bfloat16"])
def test_segments_are_updated_as_separate_tensors(workers: Workers, master: str, grad_dtype: str) -> None:
    """Each with its own settings, length and step count, one starting late, and gaps that nobody touches."""
    bounds = [(0, 5), (5, 66_000), (66_003, 66_004), (66_010, 70_000), (70_000, 140_001)]
    length, first_step = 140_100, [1, 1, 4, 1, 7]
    initial = normal(length, seed=3)
    references = [TorchAdamW(initial[a:b].copy(), **SETTINGS[i]) for i, (a, b) in enumerate(bounds)]
    # the moments of untouched elements hold a pattern too, or writing zeros there would go unnoticed
    m, v = np.full(length, 0.25, np.float32), np.full(length, 0.5, np.float32)
    for a, b in bounds:
        m[a:b] = v[a:b] = 0
    weight: NDArray[Any] = initial.copy()
    remainder = None
    if master == "split":
        weight, remainder = np.empty(length, np.uint16), np.empty(length, np.int16)
        split(workers, initial, weight, remainder)
    for step in range(1, 11):
        grad = normal(length, seed=step)
        grad_bits = bf16_bits(grad)
        if grad_dtype == "bfloat16":
            grad = floats_of(grad_bits)
        segments = []
        for i, (a, b) in enumerate(bounds):
            if step >= first_step[i]:
                references[i].update(grad[a:b])
                options = SETTINGS[i]
                segments.append(
                    Segment(
                        a, b, options["lr"], *options["betas"], options["eps"], options["weight_decay"],
                        step - first_step[i] + 1,
                    )
                )  # fmt: skip
        adamw(workers, weight, remainder, m, v, grad if grad_dtype == "float32" else grad_bits, segments)
    result = np.empty(length, np.float32)
    if remainder is None:
        result = weight
    else:
        merge(workers, weight, remainder, result)
    expected = [initial.copy(), np.full(length, 0.25, np.float32), np.full(length, 0.5, np.float32)]
    for (a, b), reference in zip(bounds, references, strict=True):
        for target, source in zip(expected, reference.arrays(), strict=True):
            target[a:b] = source
    for name, ours, theirs in zip("pmv", (result, m, v), expected, strict=True):
        assert same_bits(ours, theirs), name


def finite_bits(length: int, seed: int) -> Floats:
    """Any finite float32: every exponent, both signs, subnormals and ties of rounding to bf16 among them."""
    bits = np.random.default_rng(seed).integers(0, 2**32, length, dtype=np.uint32)
    bits[::7] = bits[::7] & np.uint32(0xFFFF0000) | np.uint32(0x8000)  # ties
    bits[(bits & np.uint32(0x7F800000)) == np.uint32(0x7F800000)] &= np.uint32(0x807FFFFF)  # not finite: subnormal
    return bits.view(np.float32)


@pytest.mark.parametrize("beta1", [0.9, 0.3])
@pytest.mark.parametrize("grad_dtype", ["float32", "bfloat16"])
def test_a_split_master_is_updated_as_a_plain_one(workers: Workers, beta1: float, grad_dtype: str) -> None:
    """Blocks of sixteen and what is left of them, beginning anywhere, whatever the bits of the master."""
    for start, length in [(s, n) for s in (0, 1, 7) for n in (*range(66), 1000)]:
        total = start + length + 5
        master, grad = finite_bits(total, seed=length), normal(total, seed=length + 1)
        moments = normal(total, seed=length + 2), np.abs(normal(total, seed=length + 3))
        bits = grad if grad_dtype == "float32" else bf16_bits(grad)
        change = [Segment(start, start + length, 1e-2, beta1, 0.95, 1e-8, 0.1, 3)]
        weight, remainder = np.empty(total, np.uint16), np.empty(total, np.int16)
        split(workers, master, weight, remainder)
        ours = [array.copy() for array in moments]
        adamw(workers, weight, remainder, ours[0], ours[1], bits, change, 0.7)
        merged = np.empty(total, np.float32)
        merge(workers, weight, remainder, merged)
        adamw(workers, master, None, moments[0], moments[1], bits, change, 0.7)
        for name, left, right in zip("pmv", (merged, *ours), (master, *moments), strict=True):
            assert same_bits(left, right), (name, start, length)


@pytest.mark.parametrize("scale", [0.37, 1.0 / 3.0, 2.0**-20])
@pytest.mark.parametrize("grad_dtype", ["float32", "bfloat16"])
def test_grad_scale_multiplies_in_float32(workers: Workers, scale: float, grad_dtype: str) -> None:
    length, options = 1003, SETTINGS[0]
    weight = normal(length, seed=1)
    reference = TorchAdamW(weight.copy(), **options)
    m, v = np.zeros_like(weight), np.zeros_like(weight)
    for step in range(1, 4):
        grad: NDArray[Any] = normal(length, seed=step)
        if grad_dtype == "bfloat16":
            grad = bf16_bits(grad)
        values = grad if grad.dtype == np.float32 else floats_of(grad)
        reference.update(values * np.float32(scale))
        adamw(workers, weight, None, m, v, grad, [segment(length, step, **options)], scale)
    for ours, torchs in zip((weight, m, v), reference.arrays(), strict=True):
        assert same_bits(ours, torchs)


@pytest.mark.parametrize("split_master", [False, True])
def test_update_does_not_depend_on_threads(split_master: bool) -> None:
    length = 200_003
    cuts = np.sort(np.random.default_rng(0).choice(length, 300, replace=False)).tolist()
    segments = [
        Segment(a, b, 1e-3 * (i % 3), 0.9, 0.99, 1e-8, 0.1 * (i % 2), 1 + i % 5)
        for i, (a, b) in enumerate(zip([0, *cuts], [*cuts, length], strict=True))
    ]
    results = []
    for threads in (1, 2, 3, 4):
        weight: NDArray[Any] = normal(length, seed=0)
        remainder = None
        m, v = normal(length, seed=1), np.abs(normal(length, seed=2))
        with Workers(threads) as pool:
            if split_master:
                bits, remainder = np.empty(length, np.uint16), np.empty(length, np.int16)
                split(pool, weight, bits, remainder)
                weight = bits
            adamw(pool, weight, remainder, m, v, bf16_bits(normal(length, seed=3)), segments, 0.5)
        results.append([weight, m, v] + ([] if remainder is None else [remainder]))
    assert not same_bits(results[0][1], normal(length, seed=1))
    for other in results[1:]:
        assert all(same_bits(x, y) for x, y in zip(results[0], other, strict=True))


def test_many_tiny_segments_of_one_setting_are_one_table_row() -> None:
    shared = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "step": 1}
    segments = [Segment(i, i + 1, weight_decay=0.1 * (i >= 150), **shared) for i in range(300)]
    bounds, rows = adamw_kernels.segment_table(segments, 300)
    assert bounds.tolist() == [[0, 150], [150, 300]] and rows.shape == (2, 8)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_non_finite_gradients_spread_as_in_torch(workers: Workers, bad: float) -> None:
    length, options = 1003, SETTINGS[0]
    weight = normal(length, seed=1)
    reference = TorchAdamW(weight.copy(), **options)
    m, v = np.zeros_like(weight), np.zeros_like(weight)
    grad = normal(length, seed=2)
    grad[[0, 500, 1002]] = bad
    reference.update(grad)
    adamw(workers, weight, None, m, v, grad, [segment(length, 1, **options)], 1.0)
    assert np.flatnonzero(np.isnan(weight)).tolist() == [0, 500, 1002]
    for ours, torchs in zip((weight, m, v), reference.arrays(), strict=True):
        np.testing.assert_array_equal(ours, torchs)


@pytest.mark.parametrize(
    ("bounds", "step", "message"),
    [
        ([(0, 5), (4, 8)], 1, "overlaps"),
        ([(0, 9)], 1, "leaves"),
        ([(-1, 3)], 1, "overlaps"),
        ([(0, 8)], 0, "step 1"),
    ],
)
def test_wrong_segments_are_refused(workers: Workers, bounds: list[tuple[int, int]], step: int, message: str) -> None:
    arrays = [np.zeros(8, np.float32) for _ in range(4)]
    segments = [Segment(a, b, 1e-3, 0.9, 0.99, 1e-8, 0.0, step) for a, b in bounds]
    with pytest.raises(ValueError, match=message):
        adamw(workers, arrays[0], None, *arrays[1:], segments)


def test_wrong_arrays_are_refused(workers: Workers) -> None:
    floats, bits, low = np.zeros(8, np.float32), np.zeros(8, np.uint16), np.zeros(8, np.int16)
    with pytest.raises(TypeError, match="weight is float32 with remainder int16"):
        adamw(workers, floats, low, floats, floats, floats, [])
    with pytest.raises(TypeError, match="weight is uint16 with remainder None"):
        adamw(workers, bits, None, floats, floats, floats, [])
    with pytest.raises(TypeError, match="exp_avg_sq is uint16"):
        adamw(workers, floats, None, floats, bits, floats, [])
    with pytest.raises(TypeError, match="gradients are int16"):
        square_sum(workers, low)
    with pytest.raises(TypeError, match="target is uint16, not float32"):
        copy_with_square_sum(workers, floats, bits)
    with pytest.raises(ValueError, match="grad has shape"):
        accumulate(workers, floats, bits[:4])
    with pytest.raises(ValueError, match="contiguous"):
        square_sum(workers, floats[::2])


SUM_LENGTHS = [0, 1, 1000, gradient_kernels.BLOCK, gradient_kernels.BLOCK + 1, 150_001]


def exact_square_sum(values: Floats) -> float:
    return math.fsum((values.astype(np.float64) ** 2).tolist())


@pytest.mark.parametrize("length", SUM_LENGTHS)
def test_square_sums_are_float64_sums(workers: Workers, length: int) -> None:
    """Relative error 1e-14: far below a float32 sum's (1e-7) and above float64's own rounding."""
    values = normal(length, seed=length, scale=1e-3)
    bits = bf16_bits(values)
    close = {"rel": 1e-14, "abs": 0.0}
    assert square_sum(workers, values) == pytest.approx(exact_square_sum(values), **close)
    assert square_sum(workers, bits) == pytest.approx(exact_square_sum(floats_of(bits)), **close)


def test_squares_leave_the_range_of_float32(workers: Workers) -> None:
    values = np.array([3e38, 1e-45, -3e38], np.float32)
    assert square_sum(workers, values) == pytest.approx(2 * float(np.float32(3e38)) ** 2, rel=1e-15)
    assert square_sum(workers, values[1:2]) == float(values[1]) ** 2 > 0


def every_sum(pool: Workers, values: Floats) -> list[float]:
    bits = bf16_bits(values)
    empty = np.empty_like(values), np.empty_like(bits)
    return [
        square_sum(pool, values),
        square_sum(pool, bits),
        accumulate(pool, normal(values.size, seed=9), values),
        accumulate(pool, normal(values.size, seed=9), bits),
        round_to_bf16(pool, values, empty[1]),
        copy_with_square_sum(pool, values, empty[0]),
        copy_with_square_sum(pool, bits, empty[1]),
    ]


def test_sums_do_not_depend_on_threads(workers: Workers) -> None:
    values = normal(300_007, seed=0)
    expected = every_sum(workers, values)
    # the order of additions does show in these bits, or the comparison below would hold for any order
    squares = values.astype(np.float64) ** 2
    assert len({float(np.cumsum(squares)[-1]), float(np.cumsum(squares[::-1])[-1]), expected[0]}) > 1
    for threads in (1, 3, 4):
        with Workers(threads) as pool:
            assert every_sum(pool, values) == expected


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("at", [0, 77_777, 150_000])
def test_non_finite_values_reach_every_sum(workers: Workers, bad: float, at: int) -> None:
    values = normal(150_001, seed=0)
    values[at] = bad
    for total in every_sum(workers, values):
        assert math.isnan(total) if math.isnan(bad) else total == math.inf


@pytest.mark.parametrize("grad_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", SUM_LENGTHS)
def test_accumulate_adds_in_float32(workers: Workers, length: int, grad_dtype: str) -> None:
    total = normal(length, seed=1)
    grad: NDArray[Any] = normal(length, seed=2, scale=1e-3)
    if grad_dtype == "bfloat16":
        grad = bf16_bits(grad)
    expected = total + (grad if grad.dtype == np.float32 else floats_of(grad))
    squares = accumulate(workers, total, grad)
    assert same_bits(total, expected)
    assert squares == pytest.approx(exact_square_sum(expected), rel=1e-14, abs=0.0)


def test_rounding_is_torchs_at_every_edge(workers: Workers) -> None:
    """Every upper half with the low halves around a tie, and NaN wherever torch has one."""
    highs = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    lows = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    values = (highs[:, None] + lows).reshape(-1).view(np.float32)
    rounded = np.empty(values.size, np.uint16)
    round_to_bf16(workers, values, rounded)
    expected = bf16_bits(values)
    nan = np.isnan(values)
    assert np.array_equal(rounded[~nan], expected[~nan])
    assert np.isnan(floats_of(rounded[nan])).all() and np.isnan(floats_of(expected[nan])).all()


def test_the_sum_of_a_rounding_is_that_of_the_rounded_values(workers: Workers) -> None:
    values = normal(100_001, seed=5)
    rounded = np.empty(values.size, np.uint16)
    squares = round_to_bf16(workers, values, rounded)
    exact = exact_square_sum(floats_of(rounded))
    assert squares == pytest.approx(exact, rel=1e-14)
    # the sums before and after rounding differ enough for the line above to mean it
    assert abs(exact_square_sum(values) / exact - 1) > 1e-12


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_copy(workers: Workers, dtype: Any) -> None:
    source: NDArray[Any] = normal(100_001, seed=5)
    if dtype == np.uint16:
        source = bf16_bits(source)
    target = np.zeros_like(source)
    squares = copy_with_square_sum(workers, source, target)
    assert same_bits(source, target)
    values = source if source.dtype == np.float32 else floats_of(source)
    assert squares == pytest.approx(exact_square_sum(values), rel=1e-14)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="looks for x86 instructions")
@pytest.mark.parametrize("split_master", [False, True])
def test_machine_code_is_vectorised(split_master: bool) -> None:
    """Looks for packed square roots: one widened integer or zero test would make the loop scalar."""
    features = llvm.get_host_cpu_features()
    if not (features.get("avx2") or features.get("avx512f")):
        pytest.skip("this CPU has neither avx2 nor avx512f")
    array = lambda kind: numba.types.Array(kind, 1, "C")  # noqa: E731
    single, word = numba.float32, numba.uint16
    state = (word, numba.int16, single, single, word) if split_master else (single, single, single, word)
    tables = (numba.types.Array(numba.int64, 2, "C"), numba.types.Array(single, 2, "C"))
    cached = adamw_kernels._adamw_split if split_master else adamw_kernels._adamw_plain
    fresh = numba.njit(nogil=True)(cached.py_func)  # numba cannot show the code of a cached function
    fresh.compile((numba.int64, numba.int64, *map(array, state), single, *tables))
    code = fresh.inspect_asm(fresh.signatures[0])
    assert re.search(r"vsqrtps\s.*%[yz]mm", code)


def run_python(code: str, cache: Path) -> str:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


SUM_OF_ONES = """
import numpy as np
from megatrain.optim.gradient_kernels import square_sum
from megatrain.optim.workers import Workers
with Workers(1) as workers:
    print(square_sum(workers, np.ones(8, np.float32)))
"""


def test_without_any_cache_directory(tmp_path: Path) -> None:
    """numba refuses to even define a cached function when it finds no directory to write to."""
    no_directory = "from numba.core import caching\ncaching.CacheImpl._locator_classes = []\n"
    assert run_python(no_directory + SUM_OF_ONES, tmp_path) == "8.0"
    assert not list(tmp_path.rglob("*.nb?"))


ROUNDED_NAN = """
import numpy as np
from megatrain.optim.gradient_kernels import round_to_bf16
from megatrain.optim.workers import Workers
rounded = np.zeros(1, np.uint16)
with Workers(1) as workers:
    round_to_bf16(workers, np.full(1, np.nan, np.float32), rounded)
print(hex(rounded[0]))
"""


def test_a_kernel_is_compiled_anew_when_what_it_calls_changes(tmp_path: Path) -> None:
    """An upgrade changes files under a cache that stays, and the kernel's own file may be the same as before."""
    package = Path(adamw_kernels.__file__).parents[1]
    shutil.copytree(package, tmp_path / "megatrain", ignore=shutil.ignore_patterns("__pycache__"))
    here = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
    assert run_python(here + ROUNDED_NAN, tmp_path / "cache") == "0x7fc0"
    called = tmp_path / "megatrain" / "optim" / "scalars.py"
    called.write_text(called.read_text().replace("np.uint16(0x7FC0)", "np.uint16(0x7FC1)"))
    assert run_python(here + ROUNDED_NAN, tmp_path / "cache") == "0x7fc1"


def test_with_a_cache_that_cannot_be_saved(tmp_path: Path) -> None:
    """A disk that fills up between the check and the writing."""
    full_disk = """
from numba.core import caching
saves = []
def save(self, key, data):
    saves.append(key)
    raise OSError(28, "No space left on device")
caching.IndexDataCacheFile.save = save
import numpy as np
from megatrain.optim.compilation import _first_call
from megatrain.optim.gradient_kernels import _square_sums, in_order
_first_call(in_order, np.zeros(1))
_first_call(_square_sums, 0, 8, np.zeros(8, "f4"), np.zeros(1))
assert len(saves) == 2
"""
    assert run_python(full_disk + SUM_OF_ONES, tmp_path) == "8.0"
