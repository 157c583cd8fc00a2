"""The page from top to bottom."""

from collections.abc import Sequence
from pathlib import Path

from page import plots
from page.recorded import HOST_DEVICES, Comparison, Row, comparisons, on_gpus
from page.tables import ABLATION, GPU_MODELS, NOT_YET, RIVALS, SWEEP, Column, claims_table, table

_INTRODUCTION = """# Results

Written by `make reproduce` from `benchmarks/results.csv`; change neither by hand. A number is the median, in brackets
p20 to p80. Tokens are target tokens. Attention is counted causally, of experts those that a token passes; model
operations are those of a step without repetition, hardware operations include what is computed twice. Peak host memory
is above what Python and its libraries take. Ratios are of one run, round by round. "lagged" is the host in the role of
a device with memory of its own: what it says of order and memory holds, of speed only whether something is hidden.
"""

_CLAIMS = """## The paper and this code

Figures of arXiv 2604.05091 on the hardware that they were measured on. Its figures of 256K tokens and more count
attention as if it were not causal, twice what is counted here; the released code counts padding and all experts.
"""

_RIVALS = """## Beside other systems

Every system trains the same weights on the same batches with the same AdamW, clipped at a global norm of 1, in a
process of its own. "agrees": its first three losses are ours within the bound; a system with other arithmetic is no
comparison.
"""

_DEPTH = """## Depth at one width

Speed is in operations, since a deeper model does more for each token. Expected: the device's peak is the same within
1%, the speed within 10%. Saved inputs wait on the host and nothing keeps its graph, at every depth.
"""

_WIDTH = """## Width at one depth

Expected: the peak grows with the square of the width, the speed does not fall.
"""

_ABLATIONS = """## Without one part

The same model without one part of the engine (`benchmarks/ablations.py` says what each is). The same losses, to the
last bit, are expected of all but other kernels.
"""

_GPU = """## Models on a GPU

`python benchmarks/gpu.py`: steps of known models with random weights.
"""


def write_page(page: Path, rows: Sequence[Row]) -> str | None:
    """Write `page` and its plots beside it; why there are none, where there are none."""
    folder = page.parent / "plots"
    no_plots = plots.missing()
    parts = [_INTRODUCTION, _CLAIMS, claims_table(rows)]
    parts += _section(_RIVALS, "system", RIVALS, comparisons(rows, "rivals"))
    parts += _pictures(folder, "rivals", comparisons(rows, "rivals"), no_plots)
    for part, text in (("depth", _DEPTH), ("width", _WIDTH)):
        parts += _section(text, "", SWEEP, comparisons(rows, part))
        parts += _pictures(folder, part, comparisons(rows, part), no_plots)
    parts += _section(_ABLATIONS, "", ABLATION, comparisons(rows, "ablation"))
    parts += _pictures(folder, "ablation", comparisons(rows, "ablation"), no_plots)
    parts += _section(_GPU, "model, tokens", GPU_MODELS, on_gpus(comparisons(rows, "models")))
    parts += ["## Machines", _machines(rows)]
    page.write_text("\n\n".join(part.strip() for part in parts if part) + "\n", encoding="utf-8")
    return no_plots


def _section(text: str, first: str, columns: Sequence[Column], found: Sequence[Comparison]) -> list[str]:
    parts = [text]
    for comparison in found:
        date = comparison.machine["date"].partition(" ")[0]
        parts.append(f"**{comparison.setting or comparison.part}** ({comparison.device}, {date}{_sizes(comparison)})")
        if (busy := _beside_other_work(comparison)) is not None:
            parts.append(busy)
        parts.append(table(first, columns, comparison))
    if not any(comparison.device not in HOST_DEVICES for comparison in found):
        parts.append(f"On a GPU: {NOT_YET}.")
    return parts


def _beside_other_work(comparison: Comparison) -> str | None:
    load, cores = float(comparison.machine["load"]), int(comparison.machine["cores"])
    if load <= cores:  # the part before leaves up to one
        return None
    return f"Measured beside other work (a load of {load:g} on {cores} cores before it began): times are uncertain."


def _sizes(comparison: Comparison) -> str:
    """Where all cases are one model."""
    for case in comparison.measured:
        every, active = case.median("parameters"), case.median("active_parameters")
        if every is not None and active is not None:
            return f"; {every / 1e6:,.1f}M parameters, a token passes {active / 1e6:,.1f}M"
    return ""


def _pictures(folder: Path, part: str, found: Sequence[Comparison], no_plots: str | None) -> list[str]:
    links = []
    for number, comparison in enumerate(found):
        if no_plots is not None or len(comparison.measured) < 2:
            continue
        path = folder / f"{part}-{number + 1}.svg"
        if part in ("depth", "width"):
            plots.draw_lines(
                path, comparison, [("rate_of_first", "operations per second"), ("device_peak_of_first", "device peak")]
            )
        elif part == "ablation":
            plots.draw_bars(path, comparison, "speed_of_all_parts", "of the speed with all parts")
        else:
            plots.draw_bars(path, comparison, "target_tokens_per_second", "target tokens per second")
        links.append(f"![{part}: {comparison.setting}](plots/{path.name})")
    return links


def _machines(rows: Sequence[Row]) -> str:
    """What the shown rows come from."""
    shown = [c for part in ("rivals", "depth", "width", "ablation", "models") for c in comparisons(rows, part)]
    lines = {
        f"- {c.device}, {c.part}: {c.machine['cpu']}, {c.machine['cores']} cores (load {c.machine['load']} before it"
        f" began), {c.machine['host_memory']} of host memory; {c.machine['versions']}; commit {c.machine['commit']},"
        f" {c.machine['date']} UTC"
        for c in shown
    }
    return "\n".join(sorted(lines)) or NOT_YET
