"""How close the host AdamW kernels come to memory bandwidth.

    python benchmarks/host_adamw.py --params 16777216 --rounds 20 --threads 1 2 --json result.json

Each implementation is compared with a limit: a loop with the same bytes read and written and next to no
arithmetic. All are timed in turn, round after round, in an order that rotates, and "of limit" is the median
over rounds of limit time / own time, so that a machine busy with other work disturbs both alike. Bytes count
what the algorithm must move, once each; GB is 10^9 bytes.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness  # noqa: F401 (first: it prepares the environment)
import numba
import numpy as np
import torch
from harness.machine import cpu_name, usable_cores
from numpy.typing import NDArray

from megatrain.memory.arena import allocate
from megatrain.optim.adamw_kernels import Segment, adamw
from megatrain.optim.compilation import compile_kernels
from megatrain.optim.int8_moments import Int8Moments, adamw_int8
from megatrain.optim.workers import Workers, kernel

LR, BETAS, EPS, WEIGHT_DECAY = 1e-5, (0.9, 0.95), 1e-8, 0.1


@dataclass(frozen=True, slots=True)
class Row:
    """Medians over rounds of one implementation at one thread count."""

    threads: int
    implementation: str
    bytes_per_param: int
    ns_per_param: float
    gb_per_s: float
    of_limit: float


@dataclass(frozen=True, slots=True)
class Case:
    """One implementation and the name of the limit that moves the same bytes."""

    bytes_per_param: int
    limit: str
    run: Callable[[], None]


# `key`, `low` and `zero` are 0 and `one` is 1, unknown to the compiler: values stay, no access is dropped.


@kernel
def _limit_split(
    start: int,
    stop: int,
    weight: Any,
    remainder: Any,
    m: Any,
    v: Any,
    grad: Any,
    key: Any,
    low: Any,
    one: Any,
) -> None:
    w, r, m, v, g = weight[start:stop], remainder[start:stop], m[start:stop], v[start:stop], grad[start:stop]
    for i in range(w.size):
        w[i] = w[i] ^ (g[i] & key)
        r[i] = r[i] ^ low
        m[i] = m[i] * one
        v[i] = v[i] * one


@kernel
def _limit_int8(
    start: int,
    stop: int,
    weight: Any,
    remainder: Any,
    m: Any,
    v: Any,
    grad: Any,
    key: Any,
    low: Any,
) -> None:
    w, r, m, v, g = weight[start:stop], remainder[start:stop], m[start:stop], v[start:stop], grad[start:stop]
    for i in range(w.size):
        w[i] = w[i] ^ (g[i] & key)
        r[i] = r[i] ^ low
        m[i] = m[i] ^ np.int8(low)
        v[i] = v[i] ^ np.uint8(key)


@kernel
def _limit_plain(start: int, stop: int, weight: Any, m: Any, v: Any, grad: Any, zero: Any, one: Any) -> None:
    w, m, v, g = weight[start:stop], m[start:stop], v[start:stop], grad[start:stop]
    for i in range(w.size):
        w[i] = w[i] + g[i] * zero
        m[i] = m[i] * one
        v[i] = v[i] * one


def build_cases(workers: Workers, params: int) -> dict[str, Case]:
    """All implementations, each over arrays of its own: split with moments of four bytes or one, fp32, torch's fp32."""
    generator = torch.Generator().manual_seed(0)
    start, grad = (torch.randn(params, generator=generator) for _ in range(2))
    segment = [Segment(0, params, LR, *BETAS, EPS, WEIGHT_DECAY, 10)]

    def array(dtype: torch.dtype, values: torch.Tensor | None = None) -> torch.Tensor:
        """Memory of its own, as the engine holds its state: zeros, or a copy."""
        n_bytes = params * dtype.itemsize
        made = allocate(n_bytes)[:n_bytes].view(dtype)
        return made if values is None else made.copy_(values)

    def numbers(dtype: torch.dtype, values: torch.Tensor | None = None) -> NDArray[Any]:
        made = array(dtype, values)
        return (made.view(torch.uint16) if dtype is torch.bfloat16 else made).numpy()

    def moments() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return numbers(torch.float32), numbers(torch.float32)

    parameter = torch.nn.Parameter(array(torch.float32, start))
    parameter.grad = array(torch.float32, grad)
    optimizer = torch.optim.AdamW([parameter], lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True)
    state = optimizer.state[parameter]
    state["step"] = torch.tensor(9.0)
    state["exp_avg"], state["exp_avg_sq"] = array(torch.float32), array(torch.float32)
    zero, one, key, low = np.float32(0), np.float32(1), np.uint16(0), np.int16(0)
    weight, remainder = numbers(torch.bfloat16, start), numbers(torch.int16)
    split_state = (weight, remainder, *moments(), numbers(torch.bfloat16, grad))
    plain, plain_m, plain_v = numbers(torch.float32, start), *moments()
    fp32_grad = numbers(torch.float32, grad)
    plain_state = (plain, plain_m, plain_v, fp32_grad)
    bytes_of = Int8Moments.zeros(params)
    small_state = (numbers(torch.bfloat16, start), numbers(torch.int16))
    small_moments = (bytes_of.exp_avg, bytes_of.exp_avg_sq)
    return {
        "limit, 8 read + 6 written": Case(
            14,
            "limit, 8 read + 6 written",
            lambda: workers.run(_limit_int8, params, *small_state, *small_moments, split_state[4], key, low),
        ),
        "megatrain, bf16, int8 moments": Case(
            14,
            "limit, 8 read + 6 written",
            lambda: adamw_int8(workers, *small_state, bytes_of, split_state[4], segment),
        ),
        "limit, 14 read + 12 written": Case(
            26,
            "limit, 14 read + 12 written",
            lambda: workers.run(_limit_split, params, *split_state, key, low, one),
        ),
        "megatrain, bf16 + remainder": Case(
            26, "limit, 14 read + 12 written", lambda: adamw(workers, *split_state, segment)
        ),
        "limit, 16 read + 12 written": Case(
            28,
            "limit, 16 read + 12 written",
            lambda: workers.run(_limit_plain, params, *plain_state, zero, one),
        ),
        "megatrain, fp32": Case(
            28,
            "limit, 16 read + 12 written",
            lambda: adamw(workers, plain, None, plain_m, plain_v, fp32_grad, segment),
        ),
        "torch fused AdamW, fp32": Case(28, "limit, 16 read + 12 written", optimizer.step),
    }


def measure(threads: int, params: int, rounds: int) -> list[Row]:
    """Interleaved rounds of every case; the first round warms up and does not count."""
    torch.set_num_threads(threads)
    seconds: dict[str, list[float]] = {}
    with Workers(threads) as workers:
        cases = build_cases(workers, params)
        names = list(cases)
        for number in range(rounds + 1):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                begin = time.perf_counter()
                cases[name].run()
                if number:
                    seconds.setdefault(name, []).append(time.perf_counter() - begin)
    rows = []
    for name, case in cases.items():
        median = statistics.median(seconds[name])
        ratios = [limit / own for limit, own in zip(seconds[case.limit], seconds[name], strict=True)]
        rows.append(
            Row(
                threads=threads,
                implementation=name,
                bytes_per_param=case.bytes_per_param,
                ns_per_param=round(median / params * 1e9, 4),
                gb_per_s=round(case.bytes_per_param * params / median / 1e9, 2),
                of_limit=round(statistics.median(ratios), 3),
            )
        )
    return rows


def print_table(rows: list[Row]) -> None:
    print(f"{'threads':>7}  {'implementation':<28} {'bytes':>5} {'ns/param':>9} {'GB/s':>7} {'of limit':>9}")
    for row in rows:
        print(
            f"{row.threads:>7}  {row.implementation:<28} {row.bytes_per_param:>5} {row.ns_per_param:>9.3f}"
            f" {row.gb_per_s:>7.1f} {row.of_limit:>9.2f}"
        )


def main() -> None:
    cores = usable_cores()
    doubling = [1 << i for i in range(cores.bit_length()) if 1 << i < cores]
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--params", type=int, default=1 << 24, help="parameters (default: 16 Mi)")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds (default: 20)")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[*doubling, cores], help="default: 1, 2, 4, ... all cores"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    options = parser.parse_args()

    compile_kernels()
    rows = []
    for threads in options.threads:
        rows += measure(threads, options.params, options.rounds)
    print(f"{cpu_name()}, {cores} cores; torch {torch.__version__}, numba {numba.__version__}")
    print(f"{options.params:,} parameters, {options.rounds} rounds, medians")
    print_table(rows)
    if options.json:
        setup = {"cpu": cpu_name(), "cores": cores, "torch": torch.__version__, "numba": numba.__version__}
        result = setup | {
            "params": options.params,
            "rounds": options.rounds,
            "rows": [asdict(r) for r in rows],
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
