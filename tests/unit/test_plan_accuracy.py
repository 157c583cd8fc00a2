"""What a plan says of memory, against what a run takes: within 5%."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_engine_toys import make_engine

from megatrain.device.lagged import LaggedDevice
from megatrain.memory.store import HostStore
from megatrain.model.loading import initialise, load_config
from megatrain.planner.choose import Settings, choose
from megatrain.planner.placement import DEVICE, HOST
from megatrain.planner.probe import describe_machine
from megatrain.planner.workload import build_workload

MIB = 1 << 20
VOCABULARY, LENGTH = 4096, 64
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("precision", "entries", "memory", "settings"),
    [
        ("fp32", {}, None, {"resident": 0}),
        ("bf16", {"tie_word_embeddings": True}, None, {"slots": 3, "resident": 0}),
        ("bf16", {}, None, {"resident": 3}),
        ("fp32", {"num_hidden_layers": 12}, 56 * MIB, {"clip_scope": "unit"}),
    ],
    ids=["7M fp32", "6M bf16 tied", "7M bf16 with residents", "12M in 56 MiB"],
)
def test_device_peak(precision: str, entries: dict[str, Any], memory: int | None, settings: dict[str, Any]) -> None:
    """Slots, staging, inputs, sums and the head's logits, which the lagged device counts to the byte; chunks of the
    head as the device's memory asks for."""
    sequences, micro_batch = 8, 2
    device = LaggedDevice(precision, memory, longest_delay_seconds=0.0)
    work = build_workload(load_config(LLAMA | entries), precision=precision, seq_len=LENGTH)
    planned = choose(
        work,
        describe_machine(device),
        Settings(sequences, micro_batch, device_memory=memory, keep_graphs="off", emulated=True, **settings),
    )
    assert planned.fits
    settings = settings | {"resident_units": len(planned.placement.units_in(DEVICE))}
    settings.pop("resident", None)
    engine = make_engine(
        initialise(load_config(LLAMA | entries), 0), device=device, keep_graphs="off", precision=precision, **settings
    )
    ids = torch.randint(0, VOCABULARY, (micro_batch, LENGTH))
    batches = [{"input_ids": ids, "labels": ids}] * (sequences // micro_batch)
    peak = [engine.train_step(batches).device_peak_bytes for _ in range(3)][-1]
    engine.close()
    assert sum(planned.ledger[DEVICE].values()) == pytest.approx(peak, rel=0.05)


def test_witnesses_are_planned() -> None:
    """They are small, and grow with the vocabulary."""
    work = build_workload(load_config(LLAMA), precision="bf16", seq_len=LENGTH)
    device = LaggedDevice("bf16")
    held = choose(work, describe_machine(device), Settings(1, 1, resident=0, emulated=True)).ledger[HOST]
    engine = make_engine(initialise(load_config(LLAMA), 0), device=device, precision="bf16")
    store: HostStore = engine.store
    assert held["witnesses"] == store.bytes_by_category()["witnesses"] > 2 * 2 * VOCABULARY
    assert engine.plan.state["witnesses"] == held["witnesses"]
    engine.close()


@pytest.mark.parametrize(
    ("device", "precision", "layers"),
    [
        pytest.param("cpu", "bf16", 4, marks=pytest.mark.long),
        pytest.param("cpu", "fp32", 4, marks=pytest.mark.long),
        ("lagged", "fp32", 4),
    ],
)
def test_peaks_of_a_run(tmp_path: Path, device: str, precision: str, layers: int) -> None:
    """The command's own comparison, in a process of its own. Four micro-batches: their threads share one heap."""
    (tmp_path / "text.txt").write_text("".join(f"def f{n}(x): return x * {n}\n" for n in range(4000)))
    size = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": layers, "num_attention_heads": 8}
    settings = {
        "model": {
            "config": {"model_type": "llama", "max_position_embeddings": 512} | size,
            "tokenizer": {"train": "bpe", "vocab_size": 1000},
        },
        "data": {"train": str(tmp_path / "text.txt"), "seq_len": 128},
        "train": {"steps": 2, "tokens_per_step": 1024},
        "engine": {"precision": precision, "device": device, "micro_batch": 2, "threads": 1, "keep_graphs": "off"},
        "checkpoint": {"at_end": False},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "megatrain", "train", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    outcome = json.loads((tmp_path / "run" / "plan.json").read_text())["outcome"]
    peaks = {name: found for name, found in outcome.items() if name.endswith("peak_bytes")}
    assert set(peaks) == {"host_peak_bytes", "device_peak_bytes"} - (
        {"device_peak_bytes"} if device == "cpu" else set()
    )
    for name, found in peaks.items():
        assert found["predicted"] == pytest.approx(found["measured"], rel=0.05), name
