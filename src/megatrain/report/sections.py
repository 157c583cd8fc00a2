"""The parts of the page, top to bottom."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from megatrain.report import provenance
from megatrain.report.charts import Line, Mark, line_chart, stacked_bars
from megatrain.report.efficiency import efficiency_of
from megatrain.report.folder import Run
from megatrain.report.markup import Html, join, tag
from megatrain.report.memory import measured_peak, memory_figures, planned_bytes
from megatrain.report.metrics import number
from megatrain.report.numbers import count, percent, rate, short
from megatrain.report.series import Floats, Series
from megatrain.report.timeline import timeline
from megatrain.report.warnings import warnings_of
from megatrain.sizes import format_bytes, format_seconds

_BARS = 60
_SAMPLES = 12


def section(name: str, *parts: Html) -> Html:
    found = [part for part in parts if part]
    return tag("section", tag("h2", name), *found) if found else Html("")


# -- the summary ----------------------------------------------------------------------------------------------


def header(run: Run) -> Html:
    status, kind = _status(run)
    return tag("header", tag("h1", run.name, " ", tag("span", status, class_=f"badge {kind}")), tag("p", _model(run)))


def _status(run: Run) -> tuple[str, str]:
    history, done, total = run.history, run.last_step, run.total_steps
    if history is None:
        return (f"step {done:,}" if total is None else f"step {done:,} of {total:,}"), "plain"
    if history.end is None:
        return "no end recorded", "bad"
    if run.had_enough:
        return "complete: no more improvement", "good"
    if total is not None and done < total:
        return f"ended early: step {done:,} of {total:,}", "bad"
    return "complete", "good"


def _model(run: Run) -> str:
    plan = run.plan or {}
    parts = [name for name in (_model_name(run), str(plan.get("precision") or "")) if name]
    settings = run.settings
    if settings is not None:
        hardware = settings["facts"]["hardware"]
        parts.append(f"on {hardware.get('device') or 'a device'} ({hardware.get('cpu') or 'unknown processor'})")
    return ", ".join(parts)


def _model_name(run: Run) -> str:
    model = None if run.config is None else run.config.model
    if model is not None and model.path:
        return model.path
    return str((run.plan or {}).get("model") or "a model")


def cards(run: Run) -> Html:
    metrics, found = run.metrics, []
    parameters = number((run.plan or {}).get("parameters"))
    if parameters > 0:
        found.append(_card("parameters", count(parameters), ""))
    total = run.total_steps
    found.append(_card("steps", f"{run.last_step:,}", "" if total is None else f"of {total:,}"))
    if metrics.lines:
        exact = run.last_step == len(metrics.lines)
        for_all = run.last_step / len(metrics.lines)  # where only some steps are logged, as these
        about = "" if exact else "estimated from logged steps"
        found.append(_card("target tokens", count(metrics.total("target_tokens") * for_all), about))
        found.append(_card("time in steps", format_seconds(metrics.total("seconds") * for_all), about))
        found += _loss_cards(run) + _speed_cards(run) + _peak_cards(run)
    return tag("div", *found, class_="cards")


def _card(name: str, value: str, note: str) -> Html:
    return tag(
        "div", tag("span", name, class_="name"), tag("strong", value), tag("span", note, class_="muted"), class_="card"
    )


def _loss_cards(run: Run) -> list[Html]:
    loss = run.metrics.series("loss").finite
    found = []
    if len(loss.steps):
        found.append(_card("last loss", short(float(loss.values[-1])), f"step {int(loss.steps[-1]):,}"))
        at = int(np.argmin(loss.values))
        found.append(_card("best loss", short(float(loss.values[at])), f"step {int(loss.steps[at]):,}"))
    for series in (one.finite for one in run.metrics.evaluated()):
        if len(series.steps):
            at = int(np.argmin(series.values))
            last = f"last {short(float(series.values[-1]))}"
            found.append(
                _card(
                    f"best {series.name} loss",
                    short(float(series.values[at])),
                    f"step {int(series.steps[at]):,}, {last}",
                )
            )
    return found


def _speed_cards(run: Run) -> list[Html]:
    median = run.metrics.usual("seconds")
    if not median > 0:
        return []
    predicted = number((run.plan or {}).get("step_seconds"))
    planned = f"planned {format_seconds(predicted)} ({median / predicted - 1:+.0%})" if predicted > 0 else ""
    found = [_card("target tokens/s", short(run.metrics.usual("tokens_per_second")), "median step")]
    found.append(_card("step", format_seconds(median), planned))
    efficiency = efficiency_of(run)
    if efficiency is not None:
        reached = efficiency.step_flops / median
        if efficiency.peak is not None:
            found.append(
                _card("MFU", percent(reached / efficiency.peak), f"{rate(reached)} of {rate(efficiency.peak)}")
            )
        else:
            found.append(_card("model computes", rate(reached), "the peak is not known"))
    return found


def _peak_cards(run: Run) -> list[Html]:
    found = []
    for tier in ("device", "host"):
        measured, planned = measured_peak(run, tier), sum(planned_bytes(run, tier).values())
        if measured is not None:
            note = f"planned {format_bytes(planned)} ({measured / planned - 1:+.0%})" if planned else ""
            found.append(_card(f"{tier} peak", format_bytes(measured), note))
    return found


def warnings(run: Run) -> Html:
    found = warnings_of(run)
    return (
        tag("section", tag("h2", "Warnings"), tag("ul", *(tag("li", text) for text in found)), class_="warn")
        if found
        else Html("")
    )


# -- over steps -----------------------------------------------------------------------------------------------


def training(run: Run) -> Html:
    if not run.metrics.lines:
        return Html("")
    loss, marks = run.metrics.series("loss"), _marks(run)
    half_life = max(2.0, min(500.0, len(loss.steps) / 60))
    lines = [Line(loss, 0, "faint")]
    if len(loss.finite.steps) > 5:
        lines.append(Line(loss.smoothed(half_life, "smoothed"), 0))
    lines += [Line(series, 1 + n, "marked") for n, series in enumerate(run.metrics.evaluated())]
    about = f"Smoothed: exponential mean, a line {half_life:.0f} lines back counts half." if len(lines) > 1 else ""
    if marks:
        about += " Dashed: " + "; ".join(mark.text for mark in marks[:3]) + (" …" if len(marks) > 3 else "") + "."
    clip = None if run.config is None else run.config.train.clip_norm
    clipped = "before clipping" + ("" if clip is None else f" (train.clip_norm is {clip:g})")
    return section(
        "Training",
        line_chart("Loss", run.loss_unit, lines, about=about.strip(), marks=marks),
        preferences(run),
        _side_by_side(
            line_chart("Learning rate", "", [Line(run.metrics.series("lr", "learning rate"))], from_zero=True),
            line_chart(
                "Gradient norm",
                clipped,
                [Line(run.metrics.series("grad_norm", "gradient norm"))],
                marks=marks,
                may_be_log=True,
            ),
        ),
    )


def preferences(run: Run) -> Html:
    """Of a run on pairs of answers: how far apart they are by now, and how many pairs are the right way round."""
    metrics = run.metrics
    rewards = [metrics.series(f"rewards/{name}", name) for name in ("chosen", "rejected", "margins")]
    right = metrics.series("rewards/accuracies", "right way round")
    if not len(right.finite.steps):
        return Html("")
    held_out = metrics.evaluated("rewards/accuracies")
    shares = [Line(right, 1), *(Line(series, 2 + n, "marked") for n, series in enumerate(held_out))]
    about = "beta times what log-probabilities of answers have gained over those of the first weights"
    return _side_by_side(
        line_chart("Rewards", about, [Line(series, n) for n, series in enumerate(rewards)]),
        line_chart("Pairs whose chosen answer gained more", "share", shares, from_zero=True),
    )


def _marks(run: Run) -> list[Mark]:
    history = run.history
    resumed = [] if history is None else [step for step, entry in history.beginnings if entry.kind == "resume"]
    return [Mark(step, f"resumed after step {step:,}") for step in resumed]


def speed(run: Run) -> Html:
    if not run.metrics.lines:
        return Html("")
    parts = [
        line_chart(
            "Throughput",
            "target tokens per second",
            [Line(run.metrics.series("tokens_per_second", "target tokens/s"))],
            from_zero=True,
        )
    ]
    efficiency, seconds = efficiency_of(run), run.metrics.series("seconds")
    if efficiency is not None:
        with np.errstate(divide="ignore", invalid="ignore"):
            reached = np.where(seconds.values > 0, efficiency.step_flops / seconds.values, np.nan)
        if efficiency.peak is not None:
            series = Series("MFU", seconds.steps, 100 * reached / efficiency.peak)
            name, unit = "Model FLOPs utilisation (MFU)", "%"
        else:
            factor, name, unit = _flops_unit(reached)
            series = Series("of the model", seconds.steps, reached / factor)
        parts.append(line_chart(name, unit, [Line(series, 2)], from_zero=True))
        note = tag("p", efficiency.explained, class_="muted")
    else:
        note = tag("p", "Without a readable plan.json the model's operations are not known.", class_="muted")
    return section("Speed", _side_by_side(*parts), note)


def _flops_unit(reached: Floats) -> tuple[float, str, str]:
    there = reached[np.isfinite(reached)]
    unit = (1e12, "TFLOP/s") if there.size and np.median(there) >= 1e12 else (1e9, "GFLOP/s")
    return unit[0], "Operations of the model", unit[1]


def _side_by_side(*figures: Html) -> Html:
    return tag("div", *figures, class_="two") if len(figures) > 1 else join(*figures)


def where_time_went(run: Run) -> Html:
    parts = [_exposed(run)] if run.metrics.lines else []
    if run.trace is not None:
        drawn = timeline(run.trace)
        parts.append(drawn if drawn is not None else tag("p", "trace.json holds no computation.", class_="muted"))
    elif run.metrics.lines:
        parts.append(tag("p", "megatrain train --profile N adds a timeline of one step.", class_="muted"))
    return section("Where a step's time went", *parts)


def _exposed(run: Run) -> Html:
    """Mean seconds of the steps of each stretch."""
    metrics = run.metrics
    values = {key: metrics.series(key).values for key in ("seconds", *(f"{name}_exposed_seconds" for name in _WAITS))}
    values = {key: np.nan_to_num(column) for key, column in values.items()}
    # weights_exposed_seconds holds the wait for the optimizer, without which they could not be fetched
    optimizer = values["optimizer_exposed_seconds"]
    values["weights_exposed_seconds"] = np.maximum(0.0, values["weights_exposed_seconds"] - optimizer)
    waits = [(name, values[f"{name}_exposed_seconds"]) for name in _WAITS]
    compute = np.maximum(0.0, values["seconds"] - sum(column for _, column in waits))
    edges = np.unique(np.linspace(0, len(metrics.lines), min(_BARS, len(metrics.lines)) + 1).astype(int))
    stretches = list(pairwise(edges))
    steps = [int(line["step"]) for line in metrics.lines]
    layers = [
        (name, [float(column[start:stop].mean()) for start, stop in stretches])
        for name, column in (("compute", compute), *((f"waits for {name}", column) for name, column in waits))
    ]
    total = sum(sum(column) for column in (compute, *(column for _, column in waits))) or 1.0
    shares = ", ".join(f"{name} {percent(float(column.sum()) / total)}" for name, column in waits)
    return stacked_bars(
        "Compute and what it waited for",
        "seconds per step",
        [(steps[start], steps[stop - 1]) for start, stop in stretches],
        layers,
        about=f"Copies and updates that computation hides are in none of these. Waits in all: {shares}.",
    )


_WAITS = ("optimizer", "weights", "inputs", "gradients")


def memory(run: Run) -> Html:
    return section("Memory against the plan", *memory_figures(run))


# -- what it came from ----------------------------------------------------------------------------------------


def samples(run: Run) -> Html:
    """The last of samples.jsonl, the newest first."""
    shown = [_sample(line) for line in reversed(run.samples[-_SAMPLES:])]
    more = len(run.samples) - len(shown)
    note = tag("p", f"The last {len(shown)} of {len(run.samples):,}.", class_="muted") if more > 0 else Html("")
    return section("Samples", *shown, note)


def _sample(line: dict[str, Any]) -> Html:
    step = line.get("step")
    name = f"step {step:,}" if isinstance(step, int) else "sample"
    prompt, text = line.get("prompt"), next((line[key] for key in _TEXT_KEYS if key in line), None)
    if text is None:
        return tag("figure", tag("figcaption", name), tag("pre", provenance.plain(line)), class_="sample")
    shown = provenance.plain(text)
    if isinstance(prompt, str) and shown.startswith(prompt):
        shown = shown[len(prompt) :]
    given = tag("span", provenance.plain(prompt), class_="prompt") if prompt is not None else Html("")
    return tag("figure", tag("figcaption", name), tag("pre", given, shown), class_="sample")


_TEXT_KEYS = ("completion", "text", "output", "generated", "sample")


def checkpoints(run: Run) -> Html:
    return section("Checkpoints", provenance.checkpoints(run))


def origin(run: Run) -> Html:
    return section("Provenance", provenance.code_and_machine(run), provenance.ledger(run), provenance.data_files(run))


def settings(run: Run) -> Html:
    if run.config_text is None:
        return Html("")
    text = tag("pre", provenance.plain(run.config_text, 200_000))
    return section("Settings", tag("div", tag("details", tag("summary", "config.yaml"), text), class_="panel"))


ALL: Sequence[Callable[[Run], Html]] = (
    header,
    cards,
    warnings,
    training,
    speed,
    where_time_went,
    memory,
    samples,
    checkpoints,
    origin,
    settings,
)
