"""What a trace and the metrics say of waiting on a streaming device."""

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from test_engine_toys import (
    Net,
    batches_of,
    make_engine,
)
from test_lagged import lagged

from megatrain.engine.weight_stream import WeightStream


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("weights_arrived", "weights_exposed_seconds"),
        ("inputs_restored", "inputs_exposed_seconds"),
        ("inputs_saved", "inputs_exposed_seconds"),
        ("gradient_landed", "gradients_exposed_seconds"),
        ("staging_free", "gradients_exposed_seconds"),
    ],
)
def test_metrics_and_trace_say_what_computation_waited_for(
    name: str, metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait made longer is in the metric of what it is for, and in the trace."""
    monkeypatch.setattr(WeightStream, "_inputs_must_leave", lambda *_: True)
    device, slept = lagged(longest_delay_seconds=0.0), []
    engine = make_engine(Net(count=4), device=device, keep_graphs="off")
    for step in range(2):
        engine.train_step(batches_of(step, 2))
    if name == "staging_free":
        own_copy = device.down.copy

        def late_copy(pairs: Any, after: Any, **options: Any) -> Any:
            if options["label"] != "inputs":
                # longer than is asked for below: it has begun before computation comes to wait for it
                device.down.submit(lambda: slept.append(time.sleep(0.06)), (), "late")
            return own_copy(pairs, after, **options)

        monkeypatch.setattr(device.down, "copy", late_copy)
    else:
        own_wait = device.host_wait

        def late_wait(which: str, wait: Any) -> None:
            if which == name:
                slept.append(time.sleep(0.02))
            own_wait(which, wait)

        monkeypatch.setattr(device, "host_wait", late_wait)
    engine.start_trace()
    stats = engine.train_step(batches_of(2, 2))
    engine.write_trace(tmp_path / "trace.json")
    engine.close()
    # of gradients that land late only the last ones are waited for; of two staging buffers one is free at first
    least = {"gradient_landed": 1, "staging_free": 1}.get(name, len(slept))
    assert getattr(stats, metric) >= 0.02 * least > 0
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    track = "waits of queued compute" if name == "staging_free" else "waits of compute"
    spans = [e["dur"] / 1e6 for e in events if e["ph"] == "X" and tracks[e["tid"]] == track and e["name"] == name]
    assert sum(spans) >= 0.02 * least - 1e-5 * len(spans)


@pytest.mark.parametrize("device", ["cpu", "lagged"])
def test_a_trace_shows_every_unit_copy_update_and_wait(device: str, tmp_path: Path) -> None:
    engine = make_engine(Net(count=3), device=device, keep_graphs="off")
    engine.train_step(batches_of(0, 2))
    with pytest.raises(RuntimeError, match="no trace was started"):
        engine.write_trace(tmp_path / "trace.json")
    engine.start_trace()
    engine.train_step(batches_of(1, 2))
    engine.train_step(batches_of(2, 2))
    engine.write_trace(tmp_path / "trace.json")
    engine.close()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    seen: dict[str, set[str]] = {track: set() for track in tracks.values()}
    for event in events:
        if event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] >= 0
            seen[tracks[event["tid"]]].add(event["name"])
    units = {"embed", "blocks.0", "blocks.1", "blocks.2", "head"}
    assert seen["compute"] >= units | {f"{unit} backward" for unit in units - {"head"}}
    assert seen["host"] >= {f"update of {unit}" for unit in units}
    if device == "lagged":
        assert seen["up"] == seen["down"] == units
        assert seen["host"] >= {f"gradient of {unit}" for unit in units}
        assert seen["waits of fetches"] == {"update"}
        assert seen["waits of up"] == {"slot_free"} and seen["waits of down"] == {"gradient_packed"}
        assert seen["waits of queued compute"] == {"staging_free"}
        # whether copies still read weights when they are about to change depends on time
        assert seen["waits of compute"] - {"weights_read"} == {"weights_arrived", "gradient_landed"}
        assert seen["waits of host"] == {"gradient_landed"}
        assert seen["queued compute"] - {"release"} == {f"pack gradient of {unit}" for unit in units}
    for tid, track in tracks.items():
        spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X" and e["tid"] == tid)
        assert all(end <= start + 0.2 for (_, end), (start, _) in pairwise(spans)), f"spans of {track} overlap"
