"""One step over one long sequence, beside the plan of its memory. The step is the first: it fetches units as they are
called, and nothing of it is repeated for timing."""

from dataclasses import replace

from gpu_parts.bench import Bench
from gpu_parts.cases import ASSUMED_SHARE, Case
from gpu_parts.matmul import run_matmul
from harness.models import MODELS, TINY_MODELS, Model, batch_of, config_of, random_model

from megatrain.engine.engine import Engine
from megatrain.engine.weight_stream import DEFAULT_SLOTS
from megatrain.memory.limits import peak_resident_bytes, reset_peak_resident
from megatrain.optim.adamw import AdamW
from megatrain.planner.flops import step_flops
from megatrain.planner.placement import DEVICE, HOST, Placement, ledger
from megatrain.planner.workload import build_workload

_TOKENS, _LAYERS = 512 * 1024, 4
_TINY_TOKENS, _TINY_PART_TOKENS = 512, 64


def run_long(bench: Bench) -> None:
    known = TINY_MODELS["8b"] if bench.tiny else MODELS["7b"]
    model = replace(known, shape=replace(known.shape, layers=_LAYERS))
    tokens, part = (_TINY_TOKENS, _TINY_PART_TOKENS) if bench.tiny else (_TOKENS, "auto")
    case = Case(f"7b, {_LAYERS} layers", tokens, tokens)
    flops = step_flops(model.shape, case.lengths)
    peak = bench.peak_tflops or run_matmul(bench)
    foreseen = flops.hardware / (ASSUMED_SHARE * peak * 1e12)
    if foreseen > bench.left():
        bench.say(f"{case.label}: dropped; {foreseen:.0f} s are foreseen, {bench.left():.0f} s of --budget are left")
        return
    reset_peak_resident()
    with Engine(
        random_model(model),
        AdamW(lr=1e-6),
        bench.make_device(),
        precision="bf16",
        threads=bench.options.threads,
        slots=bench.options.slots,
        keep_graphs="off",
        kernels="torch",
        sequence_chunk_tokens=part,
    ) as engine:
        stats = engine.train_step([batch_of(model.shape.vocabulary, 1, tokens, 0)])
        inputs = engine.weights.inputs
        leave = inputs is not None and inputs.offloading
        planned = _planned_peak(model, tokens, part, bench.options.slots, leave=leave)
    metrics = {
        "seconds_per_step": (stats.seconds, "s"),
        "target_tokens_per_second": (stats.target_tokens / stats.seconds, "1/s"),
        "hardware_rate": (flops.hardware / stats.seconds / 1e12, "TFLOP/s"),
        "device_peak": (stats.device_peak_bytes / 1e9, "GB"),
        "device_peak_planned": (planned / 1e9, "GB"),
        "host_peak": (peak_resident_bytes() / 1e9, "GB"),
        "loss": (stats.loss or 0.0, ""),
    }
    bench.record("long", case.label, **metrics)
    bench.say(f"{case.label}: " + ", ".join(f"{name} {value:.4g} {unit}" for name, (value, unit) in metrics.items()))


def _planned_peak(model: Model, tokens: int, part: int | str, slots: int | None, *, leave: bool) -> int:
    """Bytes on the device, of the engine's own."""
    work = build_workload(config_of(model), precision="bf16", seq_len=tokens, sequence_chunk_tokens=part)
    tiers = {unit.index: HOST for unit in work.homes}
    placement = Placement(tiers, 1, slots=slots or DEFAULT_SLOTS, inputs_leave=leave, chunked=True)
    return sum(ledger(work, placement, 1, in_host_memory=False, process=0)[DEVICE].values())
