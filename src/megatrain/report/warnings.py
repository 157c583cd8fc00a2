"""What somebody who looks at a run should know first."""

import numpy as np

from megatrain.report.folder import Run
from megatrain.report.metrics import number
from megatrain.report.numbers import percent, several

_MUCH_EXPOSED = 0.2
_MUCH_SLOWER = 1.5
_EXPOSED = ("weights", "inputs", "gradients")  # weights includes the wait for the optimizer


def warnings_of(run: Run) -> list[str]:
    found = [*run.notes, *_lines(run), *_ending(run), *_losses(run), *_speed(run), *_checkpoints(run)]
    return found


def _lines(run: Run) -> list[str]:
    metrics = run.metrics
    found = []
    if metrics.torn:
        found.append("metrics.jsonl: the last line was not written to its end, and is left out.")
    if metrics.unreadable_lines:
        found.append(f"metrics.jsonl: {several(metrics.unreadable_lines, 'line')} cannot be read, and left out.")
    if not metrics.lines:
        found.append("metrics.jsonl has no steps.")
    steps = metrics.series("step").steps
    if len(steps) > 2:
        distances = np.diff(steps)
        holes = int((distances > 1.5 * np.median(distances)).sum())
        if holes:
            found.append(f"Steps are missing at {several(holes, 'place')}; lines of the charts break there.")
    if run.ledger is not None and run.ledger.torn_bytes:
        found.append("ledger.jsonl: the last line was not written to its end, and is left out.")
    return found


def _ending(run: Run) -> list[str]:
    history = run.history
    if history is not None and history.end is None:
        return ["The ledger has no end: the run was killed, failed or is still going on."]
    total = run.total_steps
    if history is not None and total is not None and run.last_step < total and not run.had_enough:
        return [f"The run ended at step {run.last_step:,} of {total:,}."]
    return []


def _losses(run: Run) -> list[str]:
    found = []
    for key, name in (("loss", "loss"), ("grad_norm", "gradient norm")):
        series = run.metrics.series(key)
        missing = series.steps[~np.isfinite(series.values)]
        if len(missing):
            found.append(
                f"{several(len(missing), 'step')} without a finite {name}, the first is step {missing[0]:,.0f}."
            )
    return found


def _speed(run: Run) -> list[str]:
    metrics = run.metrics
    seconds = float(np.nansum(metrics.settled("seconds")))
    if not seconds > 0:
        return []
    found = []
    exposed = {name: float(np.nansum(metrics.settled(f"{name}_exposed_seconds"))) / seconds for name in _EXPOSED}
    share = sum(exposed.values())
    if share > _MUCH_EXPOSED:
        most = max(exposed, key=lambda name: exposed[name])
        found.append(f"Computation stood still for {percent(share)} of the time, most of it for {most}.")
    predicted = number((run.plan or {}).get("step_seconds"))
    median = metrics.usual("seconds")
    if predicted > 0 and median > _MUCH_SLOWER * predicted:
        found.append(f"Steps took {median / predicted:.1f} times as long as planned.")
    return found


def _checkpoints(run: Run) -> list[str]:
    history = run.history
    if history is None:
        return []
    return [
        f"{one.name}: its manifest is not the one that the ledger records; megatrain verify says what differs."
        for one in run.checkpoints
        if one.manifest is not None
        and one.step in history.checkpoints
        and history.checkpoints[one.step]["manifest_sha256"] != one.manifest.sha256
    ]
