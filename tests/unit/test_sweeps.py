"""benchmarks/sweeps.py, ablations.py, integrity.py and determinism.py: what is changed and what is left."""

import argparse
import dataclasses

import ablations
import determinism
import integrity
import pytest
import sweeps
from harness.percentiles import Spread
from harness.rates import count_step
from rivals.contest import Outcome
from rivals.interface import Settings
from rivals.worker import Measured, Task

OPTIONS = argparse.Namespace(precision="fp32", device="lagged", threads=1, steps=None, tiny=False)


def test_depth_changes_nothing_but_the_layers() -> None:
    for scale in (sweeps.GPU, sweeps.HOST):
        shapes = [model.shape for model in sweeps.models_of(scale, "depth").values()]
        assert [shape.layers for shape in shapes] == [28, 56, 112, 180]
        assert len({(s.hidden, s.intermediate, s.heads, s.vocabulary, s.layer_weights) for s in shapes}) == 1


def test_width_changes_nothing_but_the_width() -> None:
    for scale in (sweeps.GPU, sweeps.HOST):
        shapes = [model.shape for model in sweeps.models_of(scale, "width").values()]
        assert [s.hidden / shapes[0].hidden for s in shapes] == [1.0, 1.5, 2.0, 3.0]
        assert [s.intermediate / shapes[0].intermediate for s in shapes] == [1.0, 1.5, 2.0, 3.0]
        assert {s.heads * s.head_dim == s.hidden == s.kv_heads * s.head_dim for s in shapes} == {True}
        assert len({(s.layers, s.vocabulary, s.head_dim) for s in shapes}) == 1


def test_speed_over_depth_is_in_operations() -> None:
    """Twice the layers in twice the time: less per token, the same per operation (but for the head)."""
    models = list(sweeps.models_of(sweeps.HOST, "depth").values())[:2]
    tasks = [Task("megatrain", model, Settings("fp32"), 1, 64, 1) for model in models]
    outcomes = [
        Outcome(task, [Measured([1.0], [seconds], [3.0], 1, peak, None, True)])
        for task, seconds, peak in zip(tasks, (1.0, 2.0), (100, 150), strict=True)
    ]
    works = [count_step(task.model, task.lengths) for task in tasks]
    metrics = sweeps.size_metrics(outcomes[1], outcomes[0], works[1], works[0])
    ratio = metrics["rate_of_first"][0]
    assert isinstance(ratio, Spread)
    assert ratio.p50 == works[1].flops.model / works[0].flops.model / 2 and 0.95 < ratio.p50 < 1.0
    assert metrics["cpu_rate_of_first"] == (2 * ratio.p50, "")  # as many CPU seconds
    assert metrics["device_peak_of_first"] == (1.5, "")


def test_each_variant_lacks_one_part() -> None:
    tasks, missing = ablations.tasks_of(ablations.HOST, OPTIONS)
    assert missing == {"no fused kernels": "Liger's kernels need a CUDA device"}
    whole = dict(tasks[ablations.WHOLE].settings.engine)
    for name, task in tasks.items():
        assert dict(task.settings.engine) == whole | dict(ablations.VARIANTS[name])
        assert task.model == ablations.HOST.model


def test_on_the_host_nothing_streams() -> None:
    tasks, missing = ablations.tasks_of(ablations.HOST, argparse.Namespace(**vars(OPTIONS) | {"device": "cpu"}))
    assert set(tasks) == {ablations.WHOLE, "no kept graphs"}
    assert set(missing) == {"no prefetch", "one slot", "synchronous clip", "no fused kernels"}


def test_on_a_gpu_fused_kernels_are_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    options = argparse.Namespace(**vars(OPTIONS) | {"device": "cuda"})
    monkeypatch.setattr(ablations, "find_spec", lambda _: object())
    tasks, missing = ablations.tasks_of(ablations.GPU, options)
    assert not missing and tasks[ablations.WHOLE].settings.kernels == "liger"
    assert tasks["no fused kernels"].settings.engine == {"kernels": "torch"}
    monkeypatch.setattr(ablations, "find_spec", lambda _: None)
    tasks, missing = ablations.tasks_of(ablations.GPU, options)
    assert missing == {"no fused kernels": "liger-kernel is not installed"}
    assert tasks[ablations.WHOLE].settings.kernels == "torch"


def test_levels_of_integrity_differ_in_nothing_else() -> None:
    for size in (integrity.HOST, integrity.GPU):
        for sequences, seq_len in size.lengths:
            tasks = integrity.tasks_of(size, sequences, seq_len, OPTIONS)
            assert [task.settings.engine for task in tasks.values()] == [{"integrity": level} for level in tasks]
            assert {(t.model, t.settings.device, t.settings.precision) for t in tasks.values()} == {
                (size.model, "lagged", "fp32")
            }


def test_determinism_is_all_that_differs() -> None:
    off, on = determinism.tasks_of(determinism.HOST, OPTIONS).values()
    assert (dict(off.settings.engine), dict(on.settings.engine)) == ({}, {"deterministic": True})
    assert dataclasses.replace(on, settings=off.settings) == off


def test_wrong_sweeps_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sweeps.parse(["--only", "length"])
    assert "--only: there are depth, width" in capsys.readouterr().err
