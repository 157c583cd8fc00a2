"""What the engine reaches on a GPU, beside what the machine could reach.

    python benchmarks/gpu.py                           every part, within --budget seconds
    python benchmarks/gpu.py --only link,adamw         some parts; each can be a call of its own
    python benchmarks/gpu.py --only models --models 8b
    python benchmarks/gpu.py --only models --models 8b --kernels torch,liger      both, and the ratio of their speeds
    python benchmarks/gpu.py --device lagged --tiny    a dry run of the same code on the host; its numbers mean nothing

Parts, in this order:

    check    training on the device against plain PyTorch on it, with deterministic kernels; where it fails, nothing
             else is run and the exit code is 1
    link     GB/s of copies up and down, from page-locked and from pageable memory; of page-locking itself
    matmul   TFLOP/s of bf16 products: the peak that models are compared with
    adamw    the host optimizer by number of threads, alone and while copies run both ways
    models   training steps of models with random weights, by tokens per sequence and per step
    long     one step of four layers of 7B over one sequence of 512k tokens, beside the plan of its memory; the other
             parts leave no time for it within the default --budget: --only long --budget 1800

Every number is appended to benchmarks/results.csv as soon as it is there. GB is 10^9 bytes. Model operations are those
a step takes without repetition, hardware operations include what is computed again (megatrain/planner/flops.py).

Expected on an H200 whose link carries 55 GB/s, written down before the first run:
  - from 32k tokens per step on, hardware operations at 70% or more of the matmul peak, for 3B and 8B;
  - below, the copies show: at 8k tokens per step 8B's weights alone take 2 x 16 GB / 55 GB/s = 0.6 s;
  - page-locked copies reach the link's speed from 64 MiB on, pageable ones a third of it at most;
  - the long step: about 110 s, three quarters of it attention, and a peak within 10% of the plan's.
Not measured yet.
"""

import argparse
import csv
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic products need, before CUDA starts
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
_HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(_HERE), str(_HERE.parent / "src")]

import numba  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from host_adamw import cpu_name  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from megatrain.device.cuda import CudaDevice  # noqa: E402
from megatrain.device.lagged import LaggedDevice  # noqa: E402
from megatrain.engine import setup  # noqa: E402
from megatrain.engine.engine import Engine  # noqa: E402
from megatrain.engine.weight_stream import DEFAULT_SLOTS, WeightStream  # noqa: E402
from megatrain.errors import CapacityError  # noqa: E402
from megatrain.memory.arena import allocate, allocate_elements  # noqa: E402
from megatrain.memory.limits import host_memory_limits, peak_resident_bytes, reset_peak_resident  # noqa: E402
from megatrain.memory.store import bits  # noqa: E402
from megatrain.model.loading import build_on_meta  # noqa: E402
from megatrain.model.partition import partition  # noqa: E402
from megatrain.optim.adamw import AdamW  # noqa: E402
from megatrain.optim.adamw_kernels import Segment, adamw  # noqa: E402
from megatrain.optim.compilation import compile_kernels  # noqa: E402
from megatrain.optim.gradient_kernels import square_sum  # noqa: E402
from megatrain.optim.workers import Workers  # noqa: E402
from megatrain.planner.flops import Shape, step_flops  # noqa: E402
from megatrain.planner.placement import DEVICE, HOST, Placement, ledger  # noqa: E402
from megatrain.planner.workload import build_workload  # noqa: E402
from megatrain.sizes import format_bytes  # noqa: E402

PARTS = ("check", "link", "matmul", "adamw", "models", "long")
LONG_TOKENS, LONG_LAYERS = 512 * 1024, 4
TINY_LONG_TOKENS, TINY_PART_TOKENS = 512, 64
WARM_UP_STEPS = 2  # the first records the order of units, the second allocates for the schedule made of it
EXPECTED_SHARE, EXPECTED_FROM_TOKENS = 0.70, 32 * 1024
MICRO_BATCH_TOKENS = 8 * 1024
MARGIN_BYTES = 3 * 10**9  # of host memory, for libraries and what a step allocates besides its plan
ASSUMED_SHARE = 0.4  # of the matmul peak, until the first case has been timed
SETUP_BYTES_PER_SECOND = 1.2e9  # of state: allocating, zeroing, page-locking
LR = 1e-6


@dataclass(frozen=True, slots=True)
class Model:
    """A known model's shape. `instead`: what to take where it does not fit into host memory."""

    kind: str
    shape: Shape
    tied: bool
    instead: str | None = None


def _shape(layers: int, hidden: int, intermediate: int, heads: int, kv: int, head_dim: int, vocabulary: int) -> Shape:
    return Shape(layers, hidden, intermediate, heads, kv, head_dim, vocabulary)


MODELS = {
    "1b": Model("llama", _shape(16, 2048, 8192, 32, 8, 64, 128256), tied=True),  # Llama 3.2 1B
    "3b": Model("qwen2", _shape(36, 2048, 11008, 16, 2, 128, 151936), tied=True),  # Qwen 2.5 3B
    "7b": Model("qwen2", _shape(28, 3584, 18944, 28, 4, 128, 152064), tied=False),  # Qwen 2.5 7B
    "8b": Model("llama", _shape(32, 4096, 14336, 32, 8, 128, 128256), tied=False, instead="7b"),  # Llama 3.1 8B
}
TINY_MODELS = {
    "1b": Model("llama", _shape(3, 32, 64, 4, 2, 8, 128), tied=True),
    "8b": Model("qwen2", _shape(4, 48, 96, 6, 2, 8, 128), tied=False),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One model at one size of step."""

    model: str
    seq_len: int
    tokens: int

    @property
    def label(self) -> str:
        return f"{self.model}, {_thousands(self.seq_len)} x {self.tokens // self.seq_len}"

    @property
    def lengths(self) -> list[int]:
        return [self.seq_len] * (self.tokens // self.seq_len)


def _thousands(number: int) -> str:
    return f"{number // 1024}k" if number % 1024 == 0 else str(number)


# -- choosing what fits --------------------------------------------------------------------------------------------


def choose_cases(
    cases: Sequence[Case], seconds: dict[Case, float], setup_seconds: dict[str, float], available: float
) -> tuple[list[Case], list[Case]]:
    """(cases that fit into `available` seconds in their order, those dropped): the longest go first, and with the last
    case of a model its setup."""
    kept, dropped = list(cases), []
    while kept and _total(kept, seconds, setup_seconds) > available:
        longest = max(kept, key=lambda case: seconds[case])
        kept.remove(longest)
        dropped.append(longest)
    return kept, dropped


def _total(cases: Sequence[Case], seconds: dict[Case, float], setup_seconds: dict[str, float]) -> float:
    return sum(seconds[c] for c in cases) + sum(setup_seconds[m] for m in {c.model for c in cases})


def choose_scope(plans: dict[str, int], inputs_bytes: int, free_bytes: int) -> tuple[str | None, str]:
    """(clip_scope, why): 'global' if it fits, else 'unit', else None. `plans`: host bytes by scope, without the inputs
    that wait on the host."""
    missing = []
    for scope in ("global", "unit"):
        needed = plans[scope] + inputs_bytes + MARGIN_BYTES
        if needed <= free_bytes:
            return scope, f"{format_bytes(needed)} of host memory"
        missing.append(f"{format_bytes(needed)} with clip_scope {scope}")
    return None, f"host memory: {format_bytes(free_bytes)} can be had, it needs {' or '.join(missing)}"


def inputs_on_host_bytes(shape: Shape, case: Case) -> int:
    """Of every layer's input in bf16, as PyTorch allocates page-locked memory: a power of two for each tensor."""
    rows = max(1, min(MICRO_BATCH_TOKENS, case.tokens) // case.seq_len)
    one = rows * case.seq_len * shape.hidden * 2
    return shape.layers * (case.tokens // (rows * case.seq_len)) * (1 << (one - 1).bit_length())


# -- the machine and the results -----------------------------------------------------------------------------------


def machine(options: argparse.Namespace) -> dict[str, str]:
    """What every row of results carries."""
    on_gpu = options.device != "lagged"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": options.commit or _output(["git", "-C", str(_HERE), "describe", "--always", "--dirty"]),
        "device": torch.cuda.get_device_name(_index(options.device)) if on_gpu else "lagged",
        "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) if on_gpu else "",
        "cpu": cpu_name(),
        "cores": str(_cores()),
        "host_memory": format_bytes(host_memory_limits().total_bytes),
        "versions": " ".join(
            [
                f"python {platform.python_version()}",
                f"torch {torch.__version__}",
                f"cuda {torch.version.cuda}",
                f"transformers {transformers.__version__}",
                f"numba {numba.__version__}",
                *(f"{name} {installed_version(name)}" for name in ("triton", "liger-kernel")),
            ]
        ),
    }


def installed_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _output(command: list[str]) -> str:
    """The first line that a command prints; 'unknown' where it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return next(iter(done.stdout.strip().splitlines()), "unknown")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _index(device: str) -> int:
    return int(device.partition(":")[2] or 0)


@dataclass(slots=True)
class Bench:
    """Options, clock and results of one call."""

    options: argparse.Namespace
    console: Console
    machine: dict[str, str]
    deadline: float
    path: Path | None
    peak_tflops: float | None = None
    failed: bool = False

    @property
    def tiny(self) -> bool:
        return bool(self.options.tiny)

    @property
    def torch_device(self) -> torch.device:
        on_host = self.options.device == "lagged"
        return torch.device("cpu") if on_host else torch.device("cuda", _index(self.options.device))

    def left(self) -> float:
        return self.deadline - time.perf_counter()

    def make_device(self, precision: str = "bf16") -> Any:
        if self.options.device == "lagged":
            return LaggedDevice(precision, longest_delay_seconds=0.0)
        return CudaDevice(_index(self.options.device), self.options.device_memory)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def record(self, part: str, case: str, **metrics: tuple[float, str]) -> None:
        """Append one row per metric, (value, unit), to the results, at once."""
        if self.path is None:
            return
        new = not self.path.exists() or not self.path.stat().st_size
        columns = [*self.machine, "part", "case", "metric", "value", "unit"]
        with self.path.open("a", newline="") as stream:
            writer = csv.DictWriter(stream, columns, lineterminator="\n")
            if new:
                writer.writeheader()
            for metric, (value, unit) in metrics.items():
                row = {"part": part, "case": case, "metric": metric, "value": f"{value:.6g}", "unit": unit}
                writer.writerow(self.machine | row)

    def table(self, title: str, *columns: str) -> Table:
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
        return table


# -- check ---------------------------------------------------------------------------------------------------------

CHECK_BOUNDS = {"fp32": 1e-5, "bf16": 2e-2}  # of a gradient, relative to its largest element, and of the loss
_WEIGHT_BOUND = 1e-5


def run_check(bench: Bench) -> None:
    """Loss, gradients and updates of three steps against plain PyTorch on the same device.

    With tied weights a step has one micro-batch: of several, the engine adds gradients up in another order. In bf16
    autograd adds the two places of a tied weight in bf16, the engine in fp32, so those bits differ.
    """
    shape = _shape(2, 32, 64, 4, 2, 8, 64) if bench.tiny else _shape(4, 256, 512, 4, 2, 64, 1024)
    table = bench.table("Check against plain PyTorch", "", "loss", "gradient", "weight", "bound", "bits equal")
    with deterministic():
        for precision, bound in CHECK_BOUNDS.items():
            for tied in (False, True):
                differences, equal = _compare(bench, Model("llama", shape, tied), precision)
                ok = differences["loss"] <= bound and differences["gradient"] <= bound
                ok = ok and differences["weight"] <= _WEIGHT_BOUND
                name = f"{precision}{', tied' if tied else ''}"
                shown = [f"{differences[k]:.1e}" for k in ("loss", "gradient", "weight")]
                table.add_row(name, *shown, f"{bound:.0e}", "yes" if equal else "no")
                metrics = {k: (v, "relative") for k, v in differences.items()}
                bench.record("check", name, **metrics, bits_equal=(float(equal), "1: yes"))
                bench.failed |= not ok
    bench.console.print(table)
    if bench.failed:
        bench.say("The check failed: nothing else is run.")


@contextmanager
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _compare(bench: Bench, kind: Model, precision: str) -> tuple[dict[str, float], bool]:
    """({loss, gradient, weight: largest relative difference}, whether loss and gradients have the same bits)."""
    mine = random_model(kind, torch.float32)
    plain = deepcopy(mine).to(bench.torch_device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if dtype is torch.bfloat16:
        plain = _in_bf16(plain)
    masters = {name: nn.Parameter(value.detach().clone()) for name, value in mine.named_parameters()}
    decayed = [p for p in masters.values() if p.ndim >= 2]
    groups: list[dict[str, Any]] = [
        {"params": decayed},
        {"params": [p for p in masters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    differences, equal = dict.fromkeys(("loss", "gradient", "weight"), 0.0), True
    device = bench.make_device(precision)
    settings: dict[str, Any] = {"clip_norm": 1.0, "threads": 1, "kernels": "torch"}
    with Engine(mine, AdamW(lr=1e-3, weight_decay=0.1), device, precision, **settings) as engine:
        weights = dict(plain.named_parameters())
        for step in range(3):
            for slot in engine.partition.slots:
                weights[slot.name].data.copy_(slot.parameter)
            every = (3,) if kind.tied else (1, 3, 2)
            batches = [_batch(kind.shape.vocabulary, rows, 24 + 8 * rows, 10 * step + rows) for rows in every]
            with device.computing():  # on the host as device, products in bf16 as the engine computes them
                loss, gradients = _plain_step(plain, batches)
            stats = engine.train_step(batches)
            equal &= stats.loss == loss
            differences["loss"] = max(differences["loss"], abs(float(stats.loss or 0) - loss) / loss)
            scale = min(1.0, 1.0 / (stats.grad_norm + 1e-6))
            for entry in engine.store.slots.values():
                expected = gradients[entry.slot.name].to(dtype)
                assert entry.slab.gradient is not None
                found = entry.view(entry.slab.gradient)
                equal &= torch.equal(found, expected)
                differences["gradient"] = max(differences["gradient"], _relative(found, expected))
                masters[entry.slot.name].grad = found.float() * scale
            optimizer.step()
            engine.flush()
            for slot in engine.partition.slots:
                exact = engine.store.read_master(slot.index)
                differences["weight"] = max(differences["weight"], _relative(exact, masters[slot.name]))
    return differences, equal


def _in_bf16(model: nn.Module) -> nn.Module:
    """As the engine does: parameters rounded, tables that are not saved in the precision they were computed in."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def _relative(found: Tensor, expected: Tensor) -> float:
    difference = (found.detach().float() - expected.detach().float()).abs().max()
    return float(difference / expected.detach().float().abs().max().clamp(min=1e-12))


def _plain_step(model: nn.Module, batches: list[dict[str, Tensor]]) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradients in fp32 on the host): the mean over all targets, one micro-batch after the other."""
    device = next(model.parameters()).device
    total = sum(batch["labels"][:, 1:].numel() for batch in batches)
    loss = 0.0
    sums: dict[str, Tensor] = {}
    for batch in batches:
        part = model(**{k: v.to(device) for k, v in batch.items()}, num_items_in_batch=total).loss
        part.backward()
        loss += part.item()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradient, parameter.grad = parameter.grad.float(), None
                sums[name] = gradient if name not in sums else sums[name] + gradient
    return loss, {name: value.cpu() for name, value in sums.items()}


def _batch(vocabulary: int, rows: int, length: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (rows, length), generator=generator)
    return {"input_ids": ids, "labels": ids}


# -- models with random weights ------------------------------------------------------------------------------------


def config_of(model: Model) -> transformers.PretrainedConfig:
    shape = model.shape
    settings: dict[str, Any] = {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": model.tied,
    }
    return {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[model.kind](**settings)


def random_model(model: Model, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> nn.Module:
    """On the host, with normal numbers of standard deviation 0.02, ones for norms, zeros for biases.

    All weights are mappings of one file of numbers, each from another place on: the engine copies them, so the state is
    never held beside a second copy of the model.
    """
    config = config_of(model)
    made: Any = build_on_meta(config, dtype=dtype)
    made.model.rotary_emb = type(made.model.rotary_emb)(config=config)  # its tables are computed, not loaded
    generator = torch.Generator().manual_seed(seed)
    largest, count = max(p.numel() for p in made.parameters()), len(list(made.parameters()))
    piece = torch.empty(min(largest, 1 << 24), dtype=torch.float32).normal_(0, 0.02, generator=generator).to(dtype)
    step = 1031  # a prime: no two weights of a size begin at the same number
    numbers = np.resize(bits(piece), largest + step * count)
    known: dict[int, nn.Parameter] = {}
    with tempfile.NamedTemporaryFile() as file:
        numbers.tofile(file.name)
        for module in made.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in known:
                    offset = step * len(known) * numbers.itemsize
                    mapped = np.memmap(file.name, numbers.dtype, "c", offset, (parameter.numel(),))
                    values = torch.from_numpy(mapped).view(dtype).view(parameter.shape)
                    if parameter.ndim < 2:
                        values = torch.zeros_like(values) if name == "bias" else torch.ones_like(values)
                    known[id(parameter)] = nn.Parameter(values)
                module._parameters[name] = known[id(parameter)]
    held = [*made.named_parameters(), *made.named_buffers()]
    assert not any(tensor.is_meta for _, tensor in held), [name for name, tensor in held if tensor.is_meta]
    return made.train()  # type: ignore[no-any-return]


def planned_bytes(model: Model) -> dict[str, int]:
    """Host bytes by clip_scope."""
    made = build_on_meta(config_of(model), dtype=torch.bfloat16)
    part = partition(made)
    _, group_of = AdamW().group_slots(part.slots)
    layouts = setup.lay_out_units(part, setup.weight_dtypes(made, part, "bf16"), group_of)
    kept = {"global": True, "unit": False}
    return {scope: setup.plan_for(layouts, keep_gradients=k, streaming=True).total_bytes for scope, k in kept.items()}


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
        *("model, tokens", "s/step", "tokens/s", "TFLOP/s model", "hardware", "of peak", "compute s", "up s", "down s"),
        *("host s", "waits for updates s", "for weights s", "up GB", "down GB", "GPU GB", "host GB"),
    )
    for name, scope in scopes.items():
        mine = _drop_what_takes_too_long(bench, timing, cases, name)
        if mine:
            cases = [c for c in cases if c.model != name]
            speeds = {}
            for kernels in bench.options.kernels:
                speeds[kernels] = _run_model(bench, known[name], mine, scope, kernels, timing, table)
                _release(bench)
            _compare_kernels(bench, speeds)
        _release(bench)
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


class Timing:
    """How long cases will take: at an assumed rate until one has been timed, then at the rate of the last."""

    def __init__(self, peak_tflops: float, known: dict[str, Model], steps: int) -> None:
        self._rate = ASSUMED_SHARE * peak_tflops * 1e12
        self._known = known
        self._steps = WARM_UP_STEPS + steps + 1  # the traced one

    def seconds(self, case: Case) -> float:
        return self._steps * step_flops(self._known[case.model].shape, case.lengths).hardware / self._rate

    def setup_seconds(self, model: str) -> float:
        return planned_bytes(self._known[model])["global"] / SETUP_BYTES_PER_SECOND

    def learn(self, case: Case, seconds: float) -> None:
        """`seconds` of the whole case, warm-up included."""
        self._rate *= max(0.1, self.seconds(case) / seconds)


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
    """Tokens per second of the cases that there was time and memory for."""
    speeds: dict[Case, float] = {}
    reset_peak_resident()
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = Engine(
            random_model(model),
            AdamW(lr=LR),
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
                _release(bench)
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
    """Tokens per second."""
    rows = max(1, min(MICRO_BATCH_TOKENS, case.tokens) // case.seq_len)
    batches = [
        _batch(model.shape.vocabulary, rows, case.seq_len, number)
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

    median, last = statistics.median(seconds), stats[-1]
    kept = kept_layers(engine)
    flops = step_flops(model.shape, case.lengths, recomputed_layers=model.shape.layers - kept)
    peak = bench.peak_tflops or 1.0
    model_rate, hardware_rate = (n / median / 1e12 for n in (flops.model, flops.hardware))
    metrics: dict[str, tuple[float, str]] = {
        "seconds_per_step": (median, "s"),
        "tokens_per_second": (case.tokens / median, "1/s"),
        "model_rate": (model_rate, "TFLOP/s"),
        "hardware_rate": (hardware_rate, "TFLOP/s"),
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
    values = [f"{metrics[name][0]:.3g}" for name in (*shown, *rest)]
    values[2] = f"{hardware_rate / peak:.0%}{_verdict(case, hardware_rate / peak)}"
    table.add_row(label, f"{median:.3f}", f"{case.tokens / median:,.0f}", *values)
    bench.say(f"{label}: {median:.3f} s a step, {case.tokens / median:,.0f} tokens/s, {hardware_rate / peak:.0%}")
    return case.tokens / median


def _verdict(case: Case, share: float) -> str:
    if case.tokens < EXPECTED_FROM_TOKENS:
        return ""
    return " met" if share >= EXPECTED_SHARE else " missed"


def kept_layers(engine: Engine) -> int:
    """Layers that keep their graph instead of being computed again."""
    assert isinstance(engine.weights, WeightStream)
    schedule = engine.weights.schedule_of("step")
    held = engine.executor.kept_units & (schedule.held if schedule is not None else frozenset())
    return sum(".layers." in unit.name for unit in engine.partition.units if unit.index in held)


def traced_seconds(engine: Engine, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """Busy seconds of one step by track of its trace. Marks cost a little, so that step is not one of the timed."""
    engine.start_trace()
    engine.train_step(batches)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        engine.write_trace(path)
        return busy_seconds(json.loads(path.read_text())["traceEvents"])


def busy_seconds(events: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Seconds by track; spans of a track that overlap count once, and computation not while it waits."""
    names: dict[int, str] = {}
    spans: dict[int, list[tuple[float, float]]] = {}
    for event in events:
        if event["ph"] == "M":
            names[event["tid"]] = event["args"]["name"]
        else:
            spans.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    by_name = {name: spans.get(tid, []) for tid, name in names.items()}
    busy = {name: _covered_seconds(found) for name, found in by_name.items()}
    waits = by_name.get("waits of compute", [])
    busy["compute"] = _covered_seconds(by_name["compute"] + waits) - _covered_seconds(waits)
    return busy


def _covered_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """Of (start, end) in microseconds."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end)) / 1e6
        end = max(end, stop)
    return total


def _release(bench: Bench) -> None:
    gc.collect()
    if bench.torch_device.type == "cuda":
        torch.cuda.empty_cache()


# -- one long sequence ---------------------------------------------------------------------------------------------


def run_long(bench: Bench) -> None:
    """One step, the first: it fetches units as they are called, and nothing of it is repeated for timing."""
    known = TINY_MODELS["8b"] if bench.tiny else MODELS["7b"]
    model = replace(known, shape=replace(known.shape, layers=LONG_LAYERS))
    tokens, part = (TINY_LONG_TOKENS, TINY_PART_TOKENS) if bench.tiny else (LONG_TOKENS, "auto")
    case = Case(f"7b, {LONG_LAYERS} layers", tokens, tokens)
    flops = step_flops(model.shape, case.lengths)
    peak = bench.peak_tflops or run_matmul(bench)
    foreseen = flops.hardware / (ASSUMED_SHARE * peak * 1e12)
    if foreseen > bench.left():
        bench.say(f"{case.label}: dropped; {foreseen:.0f} s are foreseen, {bench.left():.0f} s of --budget are left")
        return
    reset_peak_resident()
    with Engine(
        random_model(model),
        AdamW(lr=LR),
        bench.make_device(),
        precision="bf16",
        threads=bench.options.threads,
        slots=bench.options.slots,
        keep_graphs="off",
        kernels="torch",
        sequence_chunk_tokens=part,
    ) as engine:
        stats = engine.train_step([_batch(model.shape.vocabulary, 1, tokens, 0)])
        inputs = engine.weights.inputs
        leave = inputs is not None and inputs.offloading
        planned = _planned_peak(model, tokens, part, bench.options.slots, leave=leave)
    metrics = {
        "seconds_per_step": (stats.seconds, "s"),
        "tokens_per_second": (tokens / stats.seconds, "1/s"),
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


# -- peaks ---------------------------------------------------------------------------------------------------------


def run_link(bench: Bench) -> None:
    """Copies of 64 MiB to 1 GiB, up, down and both at once, from page-locked and pageable memory; page-locking."""
    sizes = [1 << 16, 1 << 18] if bench.tiny else [64 << 20, 256 << 20, 1 << 30]
    device = bench.make_device()
    largest = max(sizes)
    hosts = {name: (allocate(largest), allocate(largest)) for name in ("page-locked", "pageable")}
    for host in hosts["page-locked"]:
        started = time.perf_counter()
        device.pin(host)
        rate = largest / (time.perf_counter() - started) / 1e9
        bench.record("link", f"page-locking {format_bytes(largest)}", rate=(rate, "GB/s"))
        bench.say(f"page-locking {format_bytes(largest)}: {rate:.1f} GB/s")
    above, below = device.allocate(largest, "the benchmark's"), device.allocate(largest, "the benchmark's")
    table = bench.table("Link, GB/s", "memory, bytes", "up", "down", "both: up + down")
    for name, (source, target) in hosts.items():
        for size in sizes:
            repeat = 3 if bench.tiny else max(4, (2 << 30) // size)
            ups = (device.up, [(above[:size], source[:size])])
            downs = (device.down, [(target[:size], below[:size])])
            rates = [copy_rate(streams, size, repeat) for streams in ([ups], [downs], [ups, downs])]
            table.add_row(f"{name}, {format_bytes(size)}", *[f"{rate:.1f}" for rate in rates])
            units = dict(zip(("up", "down", "both"), [(rate, "GB/s") for rate in rates], strict=True))
            bench.record("link", f"{name} {format_bytes(size)}", **units)
    started = time.perf_counter()
    device.close()
    seconds = time.perf_counter() - started
    bench.record("link", "unlocking", seconds=(seconds, "s"), bytes=(2 * largest / 1e9, "GB"))
    bench.console.print(table)
    del above, below, hosts
    _release(bench)


def copy_rate(streams: list[tuple[Any, list[tuple[Tensor, Tensor]]]], n_bytes: int, repeat: int) -> float:
    """GB/s of all `streams` together, after one round that does not count."""
    for timed in (False, True):
        started = time.perf_counter()
        events = [stream.copy(pairs, ()) for _ in range(repeat if timed else 1) for stream, pairs in streams]
        for event in events:
            event.wait()
    return repeat * len(streams) * n_bytes / (time.perf_counter() - started) / 1e9


def run_matmul(bench: Bench) -> float:
    """bf16 products; returns the fastest rate in TFLOP/s."""
    sizes = [(32, 32, 32), (48, 32, 64)] if bench.tiny else [(n, n, n) for n in (4096, 8192, 16384)]
    if not bench.tiny:
        sizes.append((8192, 4096, 14336))  # a micro-batch through an MLP of 8B
    device = bench.make_device()
    table = bench.table("Products in bf16", "rows x inner x columns", "TFLOP/s")
    rates = []
    for rows, inner, columns in sizes:
        a = torch.randn(rows, inner, dtype=torch.bfloat16, device=bench.torch_device)
        b = torch.randn(inner, columns, dtype=torch.bfloat16, device=bench.torch_device)
        flops = 2 * rows * inner * columns
        repeat = 3 if bench.tiny else max(10, int(0.7e15 // flops))  # about a second: clocks settle under load
        rate = matmul_rate(device, a, b, flops, repeat)
        rates.append(rate)
        name = f"{rows} x {inner} x {columns}"
        table.add_row(name, f"{rate:.4g}")
        bench.record("matmul", name, rate=(rate, "TFLOP/s"))
    device.close()
    bench.peak_tflops = max(rates)
    bench.console.print(table)
    _release(bench)
    return bench.peak_tflops


def matmul_rate(device: Any, a: Tensor, b: Tensor, flops: int, repeat: int) -> float:
    """TFLOP/s over `repeat` products in a row, after a few that do not count."""
    out = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)
    with device.computing():
        for count in (2, repeat):
            start = device.mark()
            for _ in range(count):
                torch.matmul(a, b, out=out)
            end = device.mark()
    seconds = float(device.seconds(end) - device.seconds(start))
    return flops * repeat / max(1e-9, seconds) / 1e12


class Traffic:
    """Copies that go on up and down, two of each under way, until the end of the block."""

    def __init__(self, device: Any, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self.copies = {"up": 0, "down": 0}
        self._stop = threading.Event()
        hosts = [allocate(n_bytes) for _ in range(2)]
        for host in hosts:
            device.pin(host)
        above, below = (device.allocate(n_bytes, "the benchmark's") for _ in range(2))
        work = {"up": (device.up, [(above, hosts[0])]), "down": (device.down, [(hosts[1], below)])}
        self._threads = [threading.Thread(target=self._serve, args=(way, *work[way])) for way in work]

    def _serve(self, way: str, stream: Any, pairs: list[tuple[Tensor, Tensor]]) -> None:
        under_way = [stream.copy(pairs, ()) for _ in range(2)]
        while not self._stop.is_set():
            under_way.append(stream.copy(pairs, ()))
            under_way.pop(0).wait()
            self.copies[way] += 1
        for event in under_way:
            event.wait()

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def measured(self, run: Callable[[], float]) -> tuple[float, dict[str, float]]:
        """(what `run` returns, GB/s of the copies during it)."""
        before, started = dict(self.copies), time.perf_counter()
        result = run()
        seconds = time.perf_counter() - started
        return result, {way: (n - before[way]) * self.n_bytes / seconds / 1e9 for way, n in self.copies.items()}


def run_adamw(bench: Bench) -> None:
    """AdamW with split masters, 26 bytes read and written per parameter, and sums of squares of bf16 gradients."""
    parameters = 1 << 16 if bench.tiny else 1 << 27
    device = bench.make_device()
    weight, gradient = (allocate_elements(parameters, torch.bfloat16) for _ in range(2))
    noise = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    for array in (weight, gradient):
        array.view(-1, noise.numel()).copy_(noise)
    moments = [allocate_elements(parameters, torch.float32).numpy() for _ in range(2)]
    bits = [array.view(torch.uint16).numpy() for array in (weight, gradient)]
    remainder = np.asarray(allocate_elements(parameters, torch.int16).numpy())
    segments = [Segment(0, parameters, LR, 0.9, 0.95, 1e-8, 0.1, 10)]
    threads = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= _cores()]
    table = bench.table(
        "Host AdamW, split master",
        *("threads", "G parameters/s", "GB/s", "while copying", "GB/s", "copies up GB/s", "down", "squares GB/s"),
    )
    traffic_bytes = 1 << 16 if bench.tiny else 256 << 20
    for count in threads:
        with Workers(count) as workers:
            update = partial(adamw, workers, bits[0], remainder, moments[0], moments[1], bits[1], segments)
            alone = _rate(update, parameters)
            squares = _rate(partial(square_sum, workers, bits[1]), parameters)
            with Traffic(device, traffic_bytes) as traffic:
                time.sleep(0.05)
                beside, copies = traffic.measured(partial(_rate, update, parameters))
        table.add_row(
            str(count),
            *(f"{alone / 1e9:.2f}", f"{26 * alone / 1e9:.0f}", f"{beside / 1e9:.2f}", f"{26 * beside / 1e9:.0f}"),
            *(f"{copies['up']:.1f}", f"{copies['down']:.1f}", f"{2 * squares / 1e9:.0f}"),
        )
        bench.record(
            "adamw",
            f"{count} threads",
            alone=(alone / 1e9, "G parameters/s"),
            beside_copies=(beside / 1e9, "G parameters/s"),
            copies_up=(copies["up"], "GB/s"),
            copies_down=(copies["down"], "GB/s"),
            squares=(2 * squares / 1e9, "GB/s"),
        )
    device.close()
    bench.console.print(table)
    _release(bench)


def _rate(run: Callable[[], Any], parameters: int, rounds: int = 4) -> float:
    """Parameters per second: the median of `rounds`, after one that does not count."""
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return parameters / statistics.median(seconds[1:])


# -- the call ------------------------------------------------------------------------------------------------------

RUN: dict[str, Callable[[Bench], Any]] = {
    "check": run_check,
    "link": run_link,
    "matmul": run_matmul,
    "adamw": run_adamw,
    "models": run_models,
    "long": run_long,
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--only", default=",".join(PARTS), help=f"parts, separated by commas (default: {','.join(PARTS)})")
    add("--device", default="cuda", help="cuda, cuda:NUMBER, or lagged for a dry run (default: cuda)")
    add("--device-memory", type=_gib, metavar="GIB", help="cap of the GPU's memory in GiB (default: none)")
    add("--tiny", action="store_true", help="sizes for a dry run")
    add("--budget", type=float, default=540.0, metavar="SECONDS", help="of this call (default: 540)")
    add("--models", default="", help=f"of {', '.join(MODELS)} (default: 1b,3b,8b)")
    add("--sequences", type=_numbers, default=[1, 8], metavar="K", help="1024s of tokens per sequence (default: 1,8)")
    add("--tokens", type=_numbers, default=[8, 32, 64], metavar="K", help="1024s of tokens per step (default: 8,32,64)")
    add("--steps", type=int, default=3, help="timed steps of each case (default: 3)")
    add("--clip", default="auto", choices=("auto", "global", "unit"), help="clip_scope (default: as memory allows)")
    add("--threads", type=int, default=max(1, _cores() - 2), help="of the optimizer (default: all cores but two)")
    add("--slots", type=int, help="weight slots of a size (default: the engine's)")
    add("--keep-graphs", default="auto", help="auto, off or a number of units (default: auto)")
    add("--compile", default="off", choices=("off", "blocks"), help="the engine's setting (default: off)")
    add("--kernels", default="torch", help="of torch and liger, separated by commas (default: torch)")
    add("--results", type=Path, help="default: benchmarks/results.csv; of a dry run none")
    add("--commit", default="", help="written to the results (default: git's answer)")
    options = parser.parse_args(argv)
    options.only = [part for part in options.only.split(",") if part]
    unknown = [part for part in options.only if part not in PARTS]
    if unknown:
        parser.error(f"--only: there is no {', '.join(unknown)}; there are {', '.join(PARTS)}")
    options.kernels = [kernels for kernels in options.kernels.split(",") if kernels]
    if not options.kernels or not {"torch", "liger"}.issuperset(options.kernels):
        parser.error("--kernels: torch, liger, or both, separated by a comma")
    if options.device != "lagged" and options.device.partition(":")[0] != "cuda":
        parser.error("--device: cuda, cuda:NUMBER or lagged")
    if options.keep_graphs.isdecimal():
        options.keep_graphs = int(options.keep_graphs)
    if options.results is None and options.device != "lagged":
        options.results = _HERE / "results.csv"
    return options


def _numbers(text: str) -> list[int]:
    return sorted(int(word) for word in text.split(","))


def _gib(text: str) -> int:
    return int(float(text) * 1024**3)


def main(argv: Sequence[str] | None = None) -> int:
    started = time.perf_counter()
    options = parse(argv)
    if options.device != "lagged" and not torch.cuda.is_available():
        print("there is no CUDA device that PyTorch can use; --device lagged --tiny is a dry run", file=sys.stderr)
        return 1
    console = Console(width=None if sys.stdout.isatty() else 190)
    bench = Bench(options, console, machine(options), started + options.budget, options.results)
    bench.say("  ".join(f"{name}: {value}" for name, value in bench.machine.items() if value))
    if bench.torch_device.type == "cuda":
        torch.cuda.set_device(bench.torch_device)
    compile_kernels()
    for part in [part for part in PARTS if part in options.only]:
        if bench.left() <= 0:
            bench.say(f"{part}: dropped; --budget is spent")
            continue
        began = time.perf_counter()
        bench.say(f"\n== {part}")
        try:
            RUN[part](bench)
        except Exception:  # what the other parts measure is worth having
            bench.failed = True
            bench.say(traceback.format_exc())
            _release(bench)
        bench.say(f"{part}: {time.perf_counter() - began:.0f} s, {bench.left():.0f} s of --budget left")
        if part == "check" and bench.failed:
            break
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
