"""Training steps of models with random weights, by tokens per sequence and per step."""

import argparse
import statistics
import time
import warnings

import torch
from gpu_parts.bench import Bench, release
from gpu_parts.cases import (
    MICRO_BATCH_TOKENS,
    WARM_UP_STEPS,
    Case,
    Timing,
    choose_cases,
    choose_scope,
    inputs_on_host_bytes,
)
from gpu_parts.matmul import run_matmul
from harness.models import MODELS, TINY_MODELS, Model, batch_of, planned_bytes, random_model
from harness.percentiles import Spread
from harness.rates import count_step
from harness.results import Value
from harness.traces import kept_layers, traced_seconds
from rich.table import Table

from megatrain.engine.engine import Engine
from megatrain.errors import CapacityError
from megatrain.memory.limits import host_memory_limits, peak_resident_bytes, reset_peak_resident
from megatrain.optim.adamw import AdamW

EXPECTED_SHARE, EXPECTED_FROM_TOKENS = 0.70, 32 * 1024
_LR = 1e-6


def run_models(bench: Bench) -> None:
    known = TINY_MODELS if bench.tiny else MODELS
    names = [n for n in (bench.options.models or ("1b,8b" if bench.tiny else "1b,3b,8b")).split(",") if n]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"--models: there is no {', '.join(unknown)}; there are {', '.join(known)}")
    peak = bench.peak_tflops or run_matmul(bench)
    bench.say(
        f"\nExpected: from {EXPECTED_FROM_TOKENS:,} tokens per step on, hardware operations at {EXPECTED_SHARE:.0%} or"
        f" more of the matmul peak ({peak:.3g} TFLOP/s), on an H200 with a link of 55 GB/s."
    )
    sizes = [(16, 64), (64, 128)] if bench.tiny else _sizes(bench.options)
    chosen = [(name, scope) for name in names for name, scope in [_fitting(bench, name, known, sizes)] if scope]
    scopes: dict[str, str] = dict(chosen)
    cases = [Case(name, seq_len, tokens) for name in scopes for seq_len, tokens in sizes]
    timing = Timing(peak, known, bench.options.steps)
    table = bench.table(
        "Training steps (seconds are medians; compute, up, down and host are busy times of one traced step)",
        *(
            "model, tokens",
            "s/step",
            "target tokens/s",
            "TFLOP/s model",
            "hardware",
            "of peak",
            "compute s",
            "up s",
            "down s",
        ),
        *("host s", "waits for updates s", "for weights s", "up GB", "down GB", "GPU GB", "host GB"),
    )
    for name, scope in scopes.items():
        mine = _drop_what_takes_too_long(bench, timing, cases, name)
        if mine:
            cases = [c for c in cases if c.model != name]
            speeds = {}
            for kernels in bench.options.kernels:
                speeds[kernels] = _run_model(bench, known[name], mine, scope, kernels, timing, table)
                release(bench)
            _compare_kernels(bench, speeds)
        release(bench)
    bench.console.print(table)


def _sizes(options: argparse.Namespace) -> list[tuple[int, int]]:
    """(tokens per sequence, tokens per step), the smallest step first."""
    return [(s * 1024, t * 1024) for t in options.tokens for s in options.sequences if t % s == 0]


def _fitting(bench: Bench, name: str, known: dict[str, Model], sizes: list[tuple[int, int]]) -> tuple[str, str | None]:
    """(model, clip_scope) that fits into host memory; scope None: neither this model nor the one instead does."""
    current: str | None = name
    while current is not None:
        model = known[current]
        inputs = max(inputs_on_host_bytes(model.shape, Case(current, s, t)) for s, t in sizes)
        plans = planned_bytes(model)
        if bench.options.clip != "auto":
            plans = dict.fromkeys(plans, plans[bench.options.clip])
        scope, why = choose_scope(plans, inputs, host_memory_limits().free_bytes)
        if scope is not None:
            scope = scope if bench.options.clip == "auto" else bench.options.clip
            bench.say(f"{current}: clip_scope {scope}, {why}")
            return current, scope
        bench.say(f"{current}: skipped; {why}")
        current = model.instead
    return name, None


def _drop_what_takes_too_long(bench: Bench, timing: Timing, cases: list[Case], model: str) -> list[Case]:
    """The cases of `model` that there is time for, if all models to come get theirs; the longest are dropped first."""
    runs = len(bench.options.kernels)
    seconds = {case: runs * timing.seconds(case) for case in cases}
    setups = {case.model: runs * timing.setup_seconds(case.model) for case in cases}
    kept, dropped = choose_cases(cases, seconds, setups, bench.left())
    for case in dropped:
        if case in cases:
            bench.say(f"{case.label}: dropped, about {seconds[case]:.0f} s; {bench.left():.0f} s of --budget are left")
            cases.remove(case)
    return [case for case in kept if case.model == model]


def _run_model(
    bench: Bench, model: Model, cases: list[Case], scope: str, kernels: str, timing: Timing, table: Table
) -> dict[Case, float]:
    """Target tokens per second of the cases that there was time and memory for."""
    speeds: dict[Case, float] = {}
    reset_peak_resident()
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = Engine(
            random_model(model),
            AdamW(lr=_LR),
            bench.make_device(),
            precision="bf16",
            clip_scope=scope,
            threads=bench.options.threads,
            keep_graphs=bench.options.keep_graphs,
            slots=bench.options.slots,
            compile=bench.options.compile,
            kernels=kernels,
        )
    with engine:
        seconds = time.perf_counter() - started
        parameters = sum(p.numel() for p in engine.model.parameters())
        bench.say(f"{cases[0].model}: {parameters / 1e9:.3g}B parameters ready after {seconds:.0f} s")
        bench.record("models", cases[0].model, setup=(seconds, "s"), parameters=(parameters, ""))
        for case in cases:
            if timing.seconds(case) > bench.left():
                bench.say(f"{case.label}: dropped; {bench.left():.0f} s of --budget are left")
                continue
            began = time.perf_counter()
            try:
                speeds[case] = _run_case(bench, engine, model, case, table)
            except (torch.OutOfMemoryError, CapacityError) as error:
                bench.say(f"{case.label}: out of memory: {str(error).splitlines()[0]}")
                release(bench)
            timing.learn(case, time.perf_counter() - began)
    return speeds


def _compare_kernels(bench: Bench, speeds: dict[str, dict[Case, float]]) -> None:
    first, *others = speeds
    for kernels in others:
        for case in speeds[first].keys() & speeds[kernels].keys():
            ratio = speeds[kernels][case] / speeds[first][case]
            bench.record("models", f"{case.label}, {kernels} kernels", **{f"speed_of_{first}": (ratio, "")})
            bench.say(f"{case.label}: {kernels} kernels reach {ratio:.2f}x the tokens/s of {first}")


def _run_case(bench: Bench, engine: Engine, model: Model, case: Case, table: Table) -> float:
    """Target tokens per second."""
    rows = max(1, min(MICRO_BATCH_TOKENS, case.tokens) // case.seq_len)
    batches = [
        batch_of(model.shape.vocabulary, rows, case.seq_len, number)
        for number in range(case.tokens // (rows * case.seq_len))
    ]
    for _ in range(WARM_UP_STEPS):
        engine.train_step(batches)
    stats, seconds = [], []
    for _ in range(bench.options.steps):
        started = time.perf_counter()
        stats.append(engine.train_step(batches))
        seconds.append(time.perf_counter() - started)
    busy = traced_seconds(engine, batches)
    engine.flush()

    spread, last = Spread.of(seconds), stats[-1]
    kept, peak = kept_layers(engine), bench.peak_tflops or 1.0
    work = count_step(model, case.lengths)
    metrics = work.metrics(spread, last.target_tokens, recomputed_layers=model.shape.layers - kept)
    median, tokens_per_second, hardware_rate = (
        _median(metrics[name]) for name in ("seconds_per_step", "target_tokens_per_second", "hardware_rate")
    )
    metrics |= {
        "hardware_of_matmul_peak": (hardware_rate / peak, ""),
        "compute_busy": (busy["compute"], "s"),
        "up_busy": (busy["up"], "s"),
        "down_busy": (busy["down"], "s"),
        "host_busy": (busy["host"], "s"),
        "exposed_optimizer": (statistics.median(s.optimizer_exposed_seconds for s in stats), "s"),
        "exposed_weights": (statistics.median(s.weights_exposed_seconds for s in stats), "s"),
        "exposed_inputs": (statistics.median(s.inputs_exposed_seconds for s in stats), "s"),
        "exposed_gradients": (statistics.median(s.gradients_exposed_seconds for s in stats), "s"),
        "up_bytes": (last.h2d_bytes / 1e9, "GB"),
        "down_bytes": (last.d2h_bytes / 1e9, "GB"),
        "device_peak": (last.device_peak_bytes / 1e9, "GB"),
        "host_peak": (peak_resident_bytes() / 1e9, "GB"),
        "weight_passes": (last.weight_passes, ""),
        "kept_layers": (kept, ""),
        "loss": (last.loss or 0.0, ""),
    }
    label = case.label if engine.kernels.name == "torch" else f"{case.label}, {engine.kernels.name} kernels"
    bench.record("models", f"{label}, {engine.clip_scope} clipping", **metrics)
    shown = ("model_rate", "hardware_rate", "hardware_of_matmul_peak", "compute_busy", "up_busy", "down_busy")
    rest = ("host_busy", "exposed_optimizer", "exposed_weights", "up_bytes", "down_bytes", "device_peak", "host_peak")
    values = [f"{_median(metrics[name]):.3g}" for name in (*shown, *rest)]
    values[2] = f"{hardware_rate / peak:.0%}{_verdict(case, hardware_rate / peak)}"
    table.add_row(label, f"{median:.3f}", f"{tokens_per_second:,.0f}", *values)
    bench.say(f"{label}: {median:.3f} s a step, {tokens_per_second:,.0f} target tokens/s, {hardware_rate / peak:.0%}")
    return tokens_per_second


def _median(value: Value) -> float:
    return value[0].p50 if isinstance(value[0], Spread) else value[0]


def _verdict(case: Case, share: float) -> str:
    if case.tokens < EXPECTED_FROM_TOKENS:
        return ""
    return " met" if share >= EXPECTED_SHARE else " missed"
