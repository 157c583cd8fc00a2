"""Tables of the page, in Markdown."""

from collections.abc import Callable, Sequence

from page.published import CLAIMS, Claim
from page.recorded import Case, Comparison, Row, comparisons, on_gpus

NOT_YET = "not measured yet"
Column = tuple[str, Callable[[Case], str]]

_SPEED: list[Column] = [
    ("s/step", lambda case: case.text("seconds_per_step")),
    ("target tokens/s", lambda case: case.text("target_tokens_per_second", ",.0f")),
    ("model TFLOP/s", lambda case: case.text("model_rate")),
    ("hardware TFLOP/s", lambda case: case.text("hardware_rate")),
]
_MEMORY: list[Column] = [
    ("peak host", lambda case: case.text("host_peak", ".2f", unit=" GB")),
    ("peak device", lambda case: case.text("device_peak", ".3g", scale=1e3, unit=" MB")),
]
RIVALS: list[Column] = [
    *_SPEED,
    ("CPU s/step", lambda case: case.text("cpu_seconds_per_step")),
    *_MEMORY,
    ("of torch", lambda case: case.text("speed_of_torch", ".2f", unit="x")),
    ("rounds", lambda case: case.text("rounds", ".0f")),
    ("losses", lambda case: case.note("arithmetic")),
]
SWEEP: list[Column] = [
    ("parameters", lambda case: case.text("parameters", ".1f", scale=1e-6, unit="M")),
    *_SPEED[:3],
    ("of the first", lambda case: case.text("rate_of_first", ".2f", unit="x")),
    ("by CPU time", lambda case: case.text("cpu_rate_of_first", ".2f", unit="x")),
    ("peak device", _MEMORY[1][1]),
    ("of the first", lambda case: case.text("device_peak_of_first", ".3f", unit="x")),
]
ABLATION: list[Column] = [
    ("s/step", _SPEED[0][1]),
    ("of all parts", lambda case: case.text("speed_of_all_parts", ".2f", unit="x")),
    ("losses", lambda case: case.note("losses")),
]
GPU_MODELS: list[Column] = [
    *_SPEED,
    ("of the matmul peak", lambda case: case.text("hardware_of_matmul_peak", ".0%")),
    *_MEMORY,
]


def table(first: str, columns: Sequence[Column], comparison: Comparison) -> str:
    lines = [_line([first, *(name for name, _ in columns)]), _line(["---"] * (len(columns) + 1))]
    for case in comparison.cases.values():
        if case.not_measured is not None:
            lines.append(_line([case.name, f"not measured: {case.not_measured}", *[""] * (len(columns) - 1)]))
        else:
            lines.append(_line([case.name, *(show(case) for _, show in columns)]))
    return "\n".join(lines)


def claims_table(rows: Sequence[Row]) -> str:
    """Paper / ours / not measured. Ours is of a GPU: what the host shows of a GPU is no answer to these."""
    lines = [_line(["", "paper", "on", "read in", "ours"]), _line(["---"] * 5)]
    for claim in CLAIMS:
        lines.append(_line([claim.what, claim.value, claim.hardware, claim.read_in, ours(claim, rows)]))
    return "\n".join(lines)


def ours(claim: Claim, rows: Sequence[Row]) -> str:
    if claim.shown_by is None:
        return NOT_YET
    part, ending, metric = claim.shown_by
    for comparison in reversed(on_gpus(comparisons(rows, part))):
        for case in comparison.measured:
            if f": {case.name}" == ending and metric in case.rows:
                unit = case.rows[metric]["unit"] or "x"
                shown = case.text(metric, unit="x" if unit == "x" else f" {unit}")
                return f"{shown} ({comparison.setting}; {comparison.device})"
    return NOT_YET


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
