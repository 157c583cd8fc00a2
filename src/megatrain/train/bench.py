"""`megatrain bench`: bytes per parameter against the plan, and time against plain PyTorch, measured here and now.

Each measurement runs in a process of its own, so that peaks are its own. The memory workload is too large for a
laptop's patience in plain PyTorch; the speed workload alternates the systems in one run and compares medians, since
a machine's speed drifts.
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from megatrain.arguments import OneLineParser
from megatrain.errors import ConfigError, MegaTrainError
from megatrain.sizes import format_bytes


@dataclass(frozen=True, slots=True)
class Workload:
    """A llama-shaped model with random weights and a step of `sequences` x `seq_len` random tokens."""

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    sequences: int
    seq_len: int

    @property
    def heads(self) -> int:
        return self.hidden // 64


MEMORY = Workload(layers=22, hidden=1280, intermediate=3456, vocabulary=32000, sequences=2, seq_len=512)
SPEED = Workload(layers=12, hidden=768, intermediate=2048, vocabulary=8192, sequences=4, seq_len=512)
PEERS = ("torch",)


def main(argv: list[str]) -> int:
    """Run the benchmarks named in `argv`; returns the exit code."""
    options = _parser().parse_args(argv)
    if options.worker:
        print(json.dumps(_WORKERS[options.worker](json.loads(options.settings))))
        return 0
    unknown = [p for p in options.peers.split(",") if p and p not in PEERS]
    if unknown:
        raise ConfigError(f"--peers is {options.peers!r}; of {', '.join(PEERS)} there is no {', '.join(unknown)}")
    results: dict[str, Any] = {"threads": options.threads, "precision": options.precision}
    say = (lambda *_: None) if options.json else print
    if options.what in ("all", "memory"):
        results["memory"] = [_memory(options, clip, say) for clip in (1.0, None)]
    if options.what in ("all", "speed"):
        results["speed"] = _speed(options, [p for p in options.peers.split(",") if p], say)
    if options.json:
        print(json.dumps(results, indent=2))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="megatrain bench", description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", default="all", choices=("all", "memory", "speed"))
    parser.add_argument("--peers", default="torch", help="systems to compare with, separated by commas (torch)")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"), help="default: bf16")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of compute and optimizer; default: all")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds of the speed workload; default: 3")
    parser.add_argument("--steps", type=int, default=2, help="steps of a measurement; default: 2")
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the layers, for a quick look")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--compile", action="store_true", help="measure speed with compiled blocks, too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    return parser


# -- memory ---------------------------------------------------------------------------------------------------


def _memory(options: argparse.Namespace, clip_norm: float | None, say: Callable[..., None]) -> dict[str, Any]:
    """Peak resident bytes per parameter, by category beside the plan."""
    say(f"\nMemory, clip_norm {clip_norm}: {_describe(_scaled(MEMORY, options.scale))}")
    settings = _settings(MEMORY, options) | {"clip_norm": clip_norm, "keep_graphs": "off"}
    result = _run_worker("memory", settings)
    per = result["parameters"]
    for name, planned in result["plan"].items():
        held = result["held"].get(name)
        measured = "" if held is None else f"{held / per:6.2f}"
        say(f"  {name:<14} planned {planned / per:6.2f}  held {measured:>6}  B/parameter")
    say(f"  {'peak resident':<14} {result['peak_bytes'] / per:6.2f} B/parameter above the imports"
        f" ({format_bytes(result['peak_bytes'])}, {per:,} parameters, {result['seconds']:.0f} s)")  # fmt: skip
    return result


def _memory_worker(settings: dict[str, Any]) -> dict[str, Any]:
    from megatrain.engine.engine import Engine
    from megatrain.memory.limits import peak_resident_bytes, reset_peak_resident, resident_bytes
    from megatrain.optim.compilation import compile_kernels

    _prepare(settings)
    importlib.import_module("transformers.models.llama.modeling_llama")

    compile_kernels()
    base = resident_bytes()
    reset_peak_resident()
    started = time.perf_counter()
    engine = Engine(
        _model(settings), precision=settings["precision"], clip_norm=settings["clip_norm"],
        threads=settings["threads"], keep_graphs=settings["keep_graphs"],
    )  # fmt: skip
    after_setup = peak_resident_bytes() - base
    for step in range(settings["steps"]):
        engine.train_step([_batch(settings, step)])
    engine.flush()
    parameters = sum(p.numel() for p in engine.model.parameters())
    return {
        "workload": settings,
        "parameters": parameters,
        "plan": engine.plan.state | engine.plan.transient,
        "held": engine.memory_report(),
        "setup_peak_bytes": after_setup,
        "peak_bytes": peak_resident_bytes() - base,
        "bytes_per_parameter": (peak_resident_bytes() - base) / parameters,
        "seconds": time.perf_counter() - started,
    }


# -- speed ----------------------------------------------------------------------------------------------------


def _speed(options: argparse.Namespace, peers: list[str], say: Callable[..., None]) -> dict[str, Any]:
    """Seconds per step, alternating ours (with and without kept graphs) and the peers."""
    say(f"\nSpeed, {options.precision}: {_describe(_scaled(SPEED, options.scale))}")
    base = _settings(SPEED, options)
    systems = {
        "megatrain": base | {"keep_graphs": "auto"},
        "megatrain, recomputing": base | {"keep_graphs": "off"},
    }
    if options.compile:
        systems["megatrain, compiled"] = base | {"keep_graphs": "auto", "compile": "blocks"}
    systems |= {peer: base for peer in peers}
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(options.rounds):
        for name, settings in systems.items():
            worker = "torch" if name == "torch" else "speed"
            seconds[name].append(_run_worker(worker, settings)["seconds_per_step"])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    tokens = SPEED.sequences * SPEED.seq_len
    for name, median in medians.items():
        ratios = [f"{t / s:.2f}x {peer}" for peer in peers for s, t in [(median, medians[peer])] if name != peer]
        say(f"  {name:<24} {median:8.2f} s/step  {tokens / median:8.0f} tokens/s  {'  '.join(ratios)}")
    return {"workload": base, "seconds_per_step": seconds, "median": medians}


def _speed_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """The second step on: the first compiles, measures graphs and touches memory."""
    from megatrain.engine.engine import Engine

    _prepare(settings)
    engine = Engine(
        _model(settings), precision=settings["precision"], threads=settings["threads"],
        keep_graphs=settings["keep_graphs"], compile=settings.get("compile", "off"),
    )  # fmt: skip
    for _ in range(2 if "compile" in settings else 1):  # kept graphs are compiled in the second step
        engine.train_step([_batch(settings, 0)])
    engine.flush()

    def step(number: int) -> None:
        engine.train_step([_batch(settings, number)])
        engine.flush()

    times = list(_timed(settings, step))
    return {"seconds_per_step": statistics.median(times), "kept_graphs": len(engine.executor.kept_units)}


def _torch_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Plain PyTorch: fp32 weights, autocast to the precision, checkpointing, fused AdamW, clipping."""
    import torch

    _prepare(settings)
    model = _model(settings)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(number: int) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings["precision"] == "bf16"):
            loss = model(**_batch(settings, number)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step(0)
    return {"seconds_per_step": statistics.median(_timed(settings, step))}


def _timed(settings: dict[str, Any], step: Callable[[int], Any]) -> Iterator[float]:
    for number in range(1, settings["steps"] + 1):
        started = time.perf_counter()
        step(number)
        yield time.perf_counter() - started


_WORKERS = {"memory": _memory_worker, "speed": _speed_worker, "torch": _torch_worker}


# -- shared ---------------------------------------------------------------------------------------------------


def _prepare(settings: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)


def _model(settings: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    w = Workload(**settings["model"])
    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=w.layers, hidden_size=w.hidden, intermediate_size=w.intermediate,
            vocab_size=w.vocabulary, num_attention_heads=w.heads, num_key_value_heads=w.heads,
            max_position_embeddings=w.seq_len, tie_word_embeddings=False,
        )
    ).train()  # fmt: skip


def _batch(settings: dict[str, Any], step: int) -> dict[str, Any]:
    import torch

    w = Workload(**settings["model"])
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, w.vocabulary, (w.sequences, w.seq_len), generator=generator)
    return {"input_ids": ids, "labels": ids}


def _scaled(workload: Workload, scale: float) -> Workload:
    return Workload(**(asdict(workload) | {"layers": max(1, round(workload.layers * scale))}))


def _settings(workload: Workload, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": asdict(_scaled(workload, options.scale)),
        "threads": options.threads,
        "precision": options.precision,
        "steps": options.steps,
    }


def _describe(w: Workload) -> str:
    return (
        f"{w.layers} layers, hidden {w.hidden}, intermediate {w.intermediate}, vocabulary {w.vocabulary},"
        f" {w.sequences} x {w.seq_len} tokens"
    )


def _run_worker(worker: str, settings: dict[str, Any]) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "megatrain",
        "bench",
        "--worker",
        worker,
        "--settings",
        json.dumps(settings),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise MegaTrainError(f"bench: {worker} failed: {lines[-1] if lines else f'exit {done.returncode}'}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
