"""Folders of runs made by hand, for tests of the page about them."""

import json
import math
from pathlib import Path
from typing import Any

from ledgers import CHECKPOINT, ENGINE, FACTS, START, ZEROS, step_line, write_chain

from megatrain.trust.ledger import LEDGER_NAME
from megatrain.trust.manifest import write_manifest

CONFIG = "model: {path: base/model}\ndata: {train: [a.txt]}\ntrain: {steps: 40}\noutput: runs/x\n"
PLAN: dict[str, Any] = {
    "model": "llama",
    "parameters": 250_432,
    "precision": "bf16",
    "tokens_per_step": 1024,
    "model_flops": 2e9,
    "matmul_flops": 5e10,
    "step_seconds": 0.5,
    "bytes": {
        "device": {"weight slots": 3_000_000, "saved inputs": 1_000_000},
        "host": {"weights": 6_000_000, "moments": 24_000_000, "arriving gradients": 9_000_000},
        "nvme": {},
    },
    "available": {"device": 80_000_000_000, "host": 1 << 62},
}
HARDWARE = {"cpu": "EPYC <b>", "cores": 2, "device": "NVIDIA H100 80GB HBM3", "memory_bytes": 1 << 34}
CODE = {"version": "0.1.0", "sha256": "c0de" * 16}
DATA = [{"path": "texts/a.txt", "bytes": 1234, "sha256": "da7a" * 16}]
ALL_FACTS = FACTS | {"code": CODE, "data": DATA, "hardware": HARDWARE, "libraries": {"torch": "2.13.0", "numba": None}}


def metrics_line(step: int, loss: float | None = None) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 5.0 - math.log(step) if loss is None else loss,
        "grad_norm": 1.0 / step,
        "lr": 1e-4,
        "target_tokens": 1000,
        "seconds": 0.5,
        "tokens_per_second": 2000.0,
        "h2d_bytes": 1,
        "d2h_bytes": 1,
        "optimizer_exposed_seconds": 0.01,
        "weights_exposed_seconds": 0.05,  # the wait for the optimizer included
        "inputs_exposed_seconds": 0.0,
        "gradients_exposed_seconds": 0.02,
        "device_peak_bytes": 4_400_000,
        "host_peak_bytes": 33_000_000,
    }


def write_lines(path: Path, lines: list[dict[str, Any]], end: str = "") -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + end)


def write_run(folder: Path, steps: int = 40, **settings: Any) -> Path:
    """A complete run of so many steps, with everything that a run can leave."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        lines.append(metrics_line(step))
        if step % 10 == 0:
            lines.append({"step": step, "eval": {"held out": {"loss": 4.75 - step / 100}, "code": {"loss": 6.5}}})
    write_lines(folder / "metrics.jsonl", lines)
    (folder / "plan.json").write_text(json.dumps(PLAN))
    write_trace(folder / "trace.json")
    write_lines(folder / "samples.jsonl", [{"step": steps, "prompt": "def f(", "text": "def f(x): return x"}])
    manifest = write_checkpoint(folder, steps)
    done = [step_line(step) for step in range(1, steps + 1)]
    saved = CHECKPOINT | {"step": steps, "manifest_sha256": manifest}
    end = {"kind": "end", "step": steps, "files": {"model.safetensors": ZEROS}, "units": {}}
    write_chain(
        folder / LEDGER_NAME, [START | {"facts": ALL_FACTS, "config": CONFIG, "engine": ENGINE}, *done, saved, end]
    )
    return folder


def write_checkpoint(folder: Path, step: int) -> str:
    """With a manifest and nothing that training could go on from; returns the manifest's hash."""
    path = folder / "checkpoints" / f"step-{step:06d}"
    path.mkdir(parents=True)
    (path / "training.json").write_text("{}")
    return write_manifest(path, {"step": step})


def write_trace(path: Path) -> None:
    """Two steps of two units: forward, backward, copies and updates, in microseconds."""
    names = ("compute", "waits of compute", "up", "host")
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "tid": n, "name": "thread_name", "args": {"name": name}} for n, name in enumerate(names)
    ]
    for start in (1000, 11_000):
        for track, name, at, duration in (
            (2, "layers.0", 0, 500),
            (0, "layers.0", 500, 1500),
            (1, "weights_arrived", 2000, 1000),
            (0, "layers.1", 3000, 2000),
            (0, "layers.1 backward", 5000, 3000),
            (0, "layers.0 backward", 8000, 1500),
            (3, "update of layers.0", 9600, 300),
        ):
            events.append({"ph": "X", "pid": 1, "tid": track, "name": name, "ts": start + at, "dur": duration})
    path.write_text(json.dumps({"traceEvents": events}))
