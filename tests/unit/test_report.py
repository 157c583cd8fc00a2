"""`megatrain report`: what the page says of a run, whatever state the run's files are in."""

import json
import math
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ledgers import START, step_line, write_chain
from report_runs import ALL_FACTS, CONFIG, PLAN, metrics_line, write_lines, write_run, write_trace

from megatrain import cli
from megatrain.errors import ConfigError
from megatrain.report.charts import Line, line_chart
from megatrain.report.folder import read_run
from megatrain.report.markup import Html, tag
from megatrain.report.metrics import read_metrics
from megatrain.report.page import render, write_report
from megatrain.report.series import Series, nice_ticks
from megatrain.report.timeline import one_step, read_spans
from megatrain.report.warnings import warnings_of
from megatrain.train.run import _write_report
from megatrain.train.run_folder import RunFolder


class Seen(HTMLParser):
    """The texts, and the elements with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def page_of(run: Path) -> str:
    return render(read_run(run))


def text_of(run: Path) -> str:
    return Seen(page_of(run)).text


def card(page: str, name: str) -> list[str]:
    found = re.search(
        rf'<div class="card"><span class="name">{name}</span><strong>(.*?)</strong><span[^>]*>(.*?)</span>', page
    )
    assert found is not None, name
    return list(found.groups())


def test_a_complete_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"wrote {run / 'report.html'}\n"
    page = (run / "report.html").read_text()
    text = Seen(page).text
    assert "complete" in text and "base/model, bf16" in text
    assert card(page, "parameters")[0] == "250,432"
    assert card(page, "steps") == ["40", "of 40"]
    assert card(page, "target tokens") == ["40,000", ""]
    assert card(page, "time in steps") == ["20.0 s", ""]
    assert card(page, "last loss") == ["1.311", "step 40"]
    assert card(page, "best eval held out loss") == ["4.35", "step 40, last 4.35"]
    assert card(page, "target tokens/s") == ["2,000", "median step"]
    assert card(page, "step") == ["500 ms", "planned 500 ms (+0%)"]
    # 2e9 operations in half a second, of the data sheet's 989.4e12
    assert card(page, "MFU") == ["0.0004 %", "4 GFLOP/s of 989.4 TFLOP/s"]
    assert card(page, "device peak") == ["4.40 MB", "planned 4.00 MB (+10%)"]
    assert card(page, "host peak") == ["33.00 MB", "planned 30.00 MB (+10%)"]  # without what a step does not use
    for part in ("Loss", "Learning rate", "Gradient norm", "Throughput", "One step", "Device memory", "Host memory"):
        assert f"<h3>{part}" in page
    assert "Warnings" not in text
    assert "optimizer 2.0 %, weights 8.0 %, inputs 0.0 %, gradients 4.0 %" in text
    assert "x): return x" in text and CONFIG.splitlines()[0] in text
    for recorded in (ALL_FACTS["code"]["sha256"], ALL_FACTS["data"][0]["sha256"], "numba not installed, torch 2.13.0"):
        assert recorded in text
    assert "records this manifest" in text
    assert "were not read again" in text and "verified" not in text


def test_the_page_is_the_owners_alone_and_goes_where_it_is_asked_to(run: Path, tmp_path: Path) -> None:
    assert cli.main(["report", str(run), "--output", str(tmp_path / "elsewhere.html")]) == 0
    assert (tmp_path / "elsewhere.html").stat().st_mode & 0o077 == 0
    assert not (run / "report.html").exists()


def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        assert cli.main(["report", str(folder)]) == 2
        assert "expected a run's" in capsys.readouterr().err
    run = write_run(tmp_path / "run")
    assert cli.main(["report", str(run), "--output", str(tmp_path / "no" / "x.html")]) == 2
    assert "--output: cannot write" in capsys.readouterr().err


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\x1b[2J\u202e"


def test_nothing_of_a_run_becomes_markup(run: Path, tmp_path: Path) -> None:
    """Every text that a run can hold is one that would run a script, were it not escaped."""
    (run / "config.yaml").write_text(json.dumps({"model": {"path": HOSTILE}, "data": {"train": [HOSTILE]}}))
    plan = PLAN | {"model": HOSTILE, "bytes": {"host": {HOSTILE: 5}}, "precision": HOSTILE}
    (run / "plan.json").write_text(json.dumps(plan))
    lines = [metrics_line(1), {"step": 1, "eval": {HOSTILE: {"loss": 1.0}}}]
    write_lines(run / "metrics.jsonl", lines)
    write_lines(run / "samples.jsonl", [{"prompt": HOSTILE, "text": HOSTILE}, {HOSTILE: HOSTILE}])
    trace = json.loads((run / "trace.json").read_text())
    for event in trace["traceEvents"][4:]:
        event["name"] = HOSTILE
    (run / "trace.json").write_text(json.dumps(trace))
    texts = dict.fromkeys(("version", "sha256"), HOSTILE)
    facts = {"code": texts, "data": [{"path": HOSTILE, "sha256": "0" * 64}], "libraries": {HOSTILE: HOSTILE}}
    facts["hardware"] = dict.fromkeys(("cpu", "cores", "device"), HOSTILE)
    write_chain(run / "ledger.jsonl", [START | {"facts": facts, "config": HOSTILE}])
    hostile = run.rename(tmp_path / HOSTILE.replace("/", "").replace("\x1b", ""))
    page = page_of(hostile)
    seen = Seen(page)
    assert [name for name, _ in seen.elements].count("script") == 1
    assert not [name for name, _ in seen.elements if name in ("img", "iframe", "object", "link", "a", "base")]
    assert not [key for _, attributes in seen.elements for key in attributes if key.startswith("on") or key == "style"]
    assert page.count("alert(1)") > 10 and "<script>alert" not in page
    assert "\x1b" not in page and "\u202e" not in page


def test_the_policy_names_the_page_s_own_script_and_style_alone(run: Path) -> None:
    import base64
    import hashlib

    page = page_of(run)
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', page)
    assert policy is not None and "default-src 'none'" in policy[1] and "unsafe" not in policy[1]
    for element in ("style", "script"):
        (content,) = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}'" in policy[1]
    assert "http://" not in re.sub(r"http://www\.w3\.org/2000/svg", "", page) and "https://" not in page


def test_markup_escapes_all_but_itself() -> None:
    assert tag("b", "<i>", Html("<i></i>"), title='"&') == '<b title="&quot;&amp;">&lt;i&gt;<i></i></b>'


# -- runs in every state --------------------------------------------------------------------------------------


def test_a_run_with_one_step(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=1)
    page = page_of(run)
    assert card(page, "last loss") == ["5", "step 1"]
    assert "No values" not in page
    assert "The run ended at step 1 of 40." in text_of(run)


def test_a_run_of_epochs_that_was_stopped(tmp_path: Path) -> None:
    """What it was meant to do depends on its data, and is in its plan; the last step's line may be missing."""
    run = write_run(tmp_path / "run", steps=10)
    (run / "config.yaml").write_text(CONFIG.replace("steps: 40", "epochs: 3"))
    assert ">complete<" in page_of(run)
    (run / "plan.json").write_text(json.dumps(PLAN | {"total_steps": 690}))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_lines(run / "metrics.jsonl", [line for line in lines if line["step"] < 10])
    page = page_of(run)
    assert ">ended early: step 10 of 690<" in page and card(page, "steps") == ["10", "of 690"]


def test_a_run_on_pairs_of_answers(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert "Rewards" not in page_of(run)
    (run / "config.yaml").write_text(CONFIG.replace("steps: 40", "steps: 40, method: dpo"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rewards = {f"rewards/{name}": 0.25 for name in ("chosen", "rejected", "margins", "accuracies")}
    held_out = {"step": 40, "eval": {"loss": 0.5, "pairs": 3, **rewards}}
    write_lines(run / "metrics.jsonl", [*(line | rewards for line in lines if "loss" in line), held_out])
    page = text_of(run)
    assert "per pair of answers" in page and "nats per target token" not in page
    assert [one.name for one in read_run(run).metrics.evaluated("rewards/accuracies")] == ["eval"]
    assert "Rewards" in page and "Pairs whose chosen answer gained more" in page


def test_a_run_that_an_evaluation_ended(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=10)
    assert ">ended early: step 10 of 40<" in page_of(run) and "ended at step 10 of 40" in page_of(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_lines(run / "metrics.jsonl", [*lines[:-1], lines[-1] | {"enough": True}])
    assert ">complete: no more improvement<" in page_of(run) and "ended at step" not in page_of(run)


def test_a_run_without_any_step(run: Path) -> None:
    (run / "metrics.jsonl").write_text("")
    assert "metrics.jsonl has no steps." in text_of(run)
    (run / "metrics.jsonl").unlink()
    assert "metrics.jsonl has no steps." in text_of(run)


@pytest.mark.parametrize(
    "name", ["plan.json", "trace.json", "ledger.jsonl", "config.yaml", "samples.jsonl", "checkpoints"]
)
def test_a_run_that_lacks_something(run: Path, name: str) -> None:
    (run / name).rename(run.parent / "away")
    page = page_of(run)
    assert card(page, "last loss") == ["1.311", "step 40"]
    assert not read_run(run).notes
    assert ("operations are not known" in page) == (name == "plan.json")
    assert ("There is no ledger" in page) == (name == "ledger.jsonl")


@pytest.mark.parametrize(
    "name", ["plan.json", "trace.json", "ledger.jsonl", "config.yaml", "checkpoints/step-000040/manifest.json"]
)
@pytest.mark.parametrize("content", [b"\xff\x00{", b"[1, 2]", b"[" * 300, b'{"a": 1}'])
def test_a_damaged_file_is_said_and_hides_nothing_else(run: Path, name: str, content: bytes) -> None:
    (run / name).write_bytes(content + b"\n")
    page = page_of(run)
    assert card(page, "last loss") == ["1.311", "step 40"]
    harmless = name == "plan.json" and content == b'{"a": 1}'
    assert any(Path(name).parts[0] in note for note in read_run(run).notes) != harmless


def test_a_killed_run(run: Path) -> None:
    """A broken last line, no end in the ledger, and nothing after the last whole line."""
    metrics, ledger = run / "metrics.jsonl", run / "ledger.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-20])
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:30])[:-10])
    text = text_of(run)
    assert "no end recorded" in text and "complete" not in text
    assert "metrics.jsonl: the last line was not written to its end" in text
    assert "ledger.jsonl: the last line was not written to its end" in text


def test_a_run_that_was_resumed_twice(run: Path) -> None:
    resumes = [
        {"kind": "resume", "config": CONFIG, "engine": START["engine"], "facts": ALL_FACTS, "step": step,
         "checkpoint": f"/x/step-{step:06d}", "manifest_sha256": "0" * 64}
        for step in (10, 20)
    ]  # fmt: skip
    parts: list[Any] = [START | {"facts": ALL_FACTS}]
    for begin, end, resume in ((1, 15, resumes[0]), (11, 24, resumes[1]), (21, 40, None)):
        parts += [step_line(step) for step in range(begin, end + 1)] + ([resume] if resume else [])
    write_chain(run / "ledger.jsonl", [*parts, {"kind": "end", "step": 40, "files": {}, "units": {}}])
    page = page_of(run)
    assert len(re.findall(r'<line [^>]*class="mark"><title>resumed after step (?:10|20)</title>', page)) == 4
    assert page.count("<summary>Before that</summary>") == 2
    assert "went on from step 20 (/x/step-000020)" in Seen(page).text


def test_a_manifest_that_the_ledger_does_not_know(run: Path) -> None:
    manifest = run / "checkpoints" / "step-000040" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 40', '"step": 41'))
    text = text_of(run)
    assert "RECORDS ANOTHER MANIFEST" in text and "records this manifest" not in text
    assert "step-000040: its manifest is not the one that the ledger records" in text


def test_losses_that_are_missing_and_steps_that_are(run: Path) -> None:
    lines = [metrics_line(step) for step in range(1, 41) if not 20 <= step <= 25]
    lines[4]["loss"] = None
    lines[5] |= {"loss": math.nan, "grad_norm": math.inf}  # as Python writes them, where no line of ours does
    lines[6]["loss"] = 10**400
    lines[7]["loss"] = "high"
    write_lines(run / "metrics.jsonl", lines)
    found = warnings_of(read_run(run))
    assert "Steps are missing at 1 place; lines of the charts break there." in found
    assert "4 steps without a finite loss, the first is step 5." in found
    page = page_of(run)
    assert card(page, "best loss") == ["1.311", "step 40"]
    assert page.count('class="missing"') == 5  # of the loss, and one of the norm
    assert not re.search(r"\bnan\b", page, re.IGNORECASE)


def test_exposed_copies_and_slow_steps_are_warned_of(run: Path) -> None:
    lines = [metrics_line(step) | {"weights_exposed_seconds": 0.3, "seconds": 1.0} for step in range(1, 41)]
    write_lines(run / "metrics.jsonl", lines)
    found = warnings_of(read_run(run))
    assert "Computation stood still for 32 % of the time, most of it for weights." in found
    assert "Steps took 2.0 times as long as planned." in found


def test_where_only_some_steps_are_logged(run: Path) -> None:
    write_lines(run / "metrics.jsonl", [metrics_line(step) for step in range(4, 41, 4)])
    page = page_of(run)
    assert card(page, "target tokens") == ["40,000", "estimated from logged steps"]
    assert "Warnings" not in page


def test_a_step_that_is_there_twice_counts_once_by_its_last_line(run: Path) -> None:
    lines = [metrics_line(step) for step in (1, 2, 3)] + [metrics_line(2, loss=9.0)]
    write_lines(run / "metrics.jsonl", lines, end="no JSON\n[]\n")
    metrics = read_metrics(run / "metrics.jsonl")
    assert [line["loss"] for line in metrics.lines][1] == 9.0 and len(metrics.lines) == 3
    assert metrics.unreadable_lines == 2 and not metrics.torn


def test_a_huge_run_keeps_its_extremes_and_makes_a_small_page_in_seconds(run: Path) -> None:
    generator = np.random.default_rng(0)
    losses = (3 + generator.random(100_000)).tolist()
    losses[61_803], losses[31_415] = 99.25, 0.125
    rest = json.dumps(metrics_line(1) | {"step": 0, "loss": 0}).removeprefix('{"step": 0, "loss": 0')
    lines = [f'{{"step": {n}, "loss": {loss}{rest}\n' for n, loss in enumerate(losses, start=1)]
    (run / "metrics.jsonl").write_text("".join(lines))
    (run / "ledger.jsonl").unlink()
    started = time.process_time()
    page = page_of(run)
    assert time.process_time() - started < 20
    assert len(page.encode()) < 2_000_000
    assert card(page, "best loss") == ["0.125", "step 31,416"]
    assert "99.25 (step 61,804)" in page and "0.125 (step 31,416)" in page
    chart = next(a["data-chart"] for name, a in Seen(page).elements if name == "svg" and a.get("data-chart"))
    points = json.loads(str(chart))[0]["points"]
    assert len(points) < 1000 and {61_804, 31_416} <= {point[0] for point in points}


# -- parts ----------------------------------------------------------------------------------------------------


def test_thinning_keeps_ends_extremes_and_holes() -> None:
    values = np.sin(np.arange(50_000) / 100)
    values[[777, 30_001]] = 40.0, -40.0
    values[12_345] = np.nan
    thin = Series("x", np.arange(50_000.0), values).thinned(400)
    assert len(thin.steps) < 600 and np.all(np.diff(thin.steps) > 0)
    assert {0.0, 777.0, 30_001.0, 12_345.0, 49_999.0} <= set(thin.steps.tolist())
    few = Series("x", np.arange(3.0), np.ones(3))
    assert few.thinned(400) is few


def test_smoothing_starts_at_the_first_value_and_skips_what_is_missing() -> None:
    smooth = Series("x", np.arange(4.0), np.array([2.0, np.nan, 4.0, 4.0])).smoothed(1.0, "mean")
    assert smooth.values[0] == 2.0 and math.isnan(smooth.values[1])
    # 2 counts half of 4, and a quarter in the end
    assert smooth.values[2:].tolist() == pytest.approx([(1 + 4) / 1.5, (0.5 + 2 + 4) / 1.75])


def test_ticks_are_round_and_inside() -> None:
    assert nice_ticks(0, 60) == [0, 10, 20, 30, 40, 50, 60]
    assert nice_ticks(5.97, 7.0) == pytest.approx([6.0, 6.2, 6.4, 6.6, 6.8, 7.0])
    assert nice_ticks(3, 3) == [3]


def test_a_line_breaks_where_steps_are_missing() -> None:
    steps = np.array([1.0, 2, 3, 10, 11])
    chart = line_chart("Loss", "", [Line(Series("loss", steps, np.arange(5.0)))])
    (path,) = re.findall(r'<path d="([^"]*)" class="line', chart)
    assert path.count("M") == 2 and path.count("L") == 3


def test_wide_ranges_are_logarithmic_where_that_is_allowed() -> None:
    lines = [Line(Series("norm", np.arange(3.0), np.array([0.01, 1.0, 100.0])))]
    assert "logarithmic" in line_chart("Norm", "", lines, may_be_log=True)
    assert "logarithmic" not in line_chart("Norm", "", lines)


def test_one_step_of_a_trace(run: Path, tmp_path: Path) -> None:
    write_trace(tmp_path / "trace.json")
    spans = read_spans(json.loads((tmp_path / "trace.json").read_text())["traceEvents"])
    assert one_step(spans) == (0.0015, 0.0115)  # from the first forward to the next step's
    page = page_of(run)
    rows = re.findall(r'<th scope="row">(compute|to device|host)</th><td>(\d+)</td><td>(.*?)</td><td>(.*?)</td>', page)
    assert rows == [
        ("compute", "4", "8.0 ms", "80 %"),
        ("to device", "1", "0.5 ms", "5.0 %"),
        ("host", "1", "0.3 ms", "3.0 %"),
    ]
    assert "layers.1 backward: 3.0 ms, from 4.5 ms" in page and "waits for weights_arrived" in page


def test_a_trace_with_strange_events(run: Path) -> None:
    strange = [{"ph": "X"}, {"ph": "M", "args": 3}, {"ph": "X", "ts": -1, "dur": "x", "tid": []}, 5, None]
    (run / "trace.json").write_text(json.dumps({"traceEvents": strange}))
    assert "trace.json holds no computation." in page_of(run)


def test_a_device_without_a_known_peak_has_no_mfu(run: Path) -> None:
    facts = ALL_FACTS | {"hardware": ALL_FACTS["hardware"] | {"device": "lagged"}}
    write_chain(run / "ledger.jsonl", [START | {"facts": facts}])
    page = page_of(run)
    assert "MFU</span>" not in page and card(page, "model computes")[0] == "4 GFLOP/s"
    assert "a large product reached 50 GFLOP/s there" in page


def test_a_report_that_cannot_be_written_costs_a_run_nothing(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run / "report.html").mkdir()
    (run / "samples.jsonl").unlink()
    _write_report(RunFolder(str(tmp_path / "none")))
    _write_report(RunFolder(str(run), resume=True))
    first, second = (record.getMessage() for record in caplog.records)
    assert "report.html is not written" in first and "megatrain report makes it" in first
    assert "Is a directory" in second


def test_writing_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        write_report(tmp_path / "none")
