"""Every causal and vision-language model type of transformers: trained one step both ways, and what came out.

    python tests/parity/classify.py        writes docs/model-types.md
    python tests/parity/classify.py NAME   shows what is found for some types

Where the engine's gradients are not plain PyTorch's to the last bit, the reason is not guessed but shown: the same
step is repeated with the one thing changed that is said to be the reason, and must then be equal to the last bit.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import conftest  # noqa: F401  (paths, and no network)
import torch
import zoo
from comparison import Comparison, compare, quiet

from megatrain.errors import UnsupportedModelError

TABLE = Path(__file__).parents[2] / "docs" / "model-types.md"
BOUND = 1e-6
EQUAL, ROUNDING, REFUSED, SKIPPED, FAILED = "equal", "equal to 1e-6", "refused", "skipped", "FAILED"

# Types that train although a difference has no reason that can be shown, with the reason in words.
ACCEPTED: dict[str, str] = {}


@dataclass(frozen=True)
class Verdict:
    model_type: str
    status: str
    reason: str = ""
    relative: float = 0.0
    units: int = 0
    head: str = ""

    def row(self) -> str:
        difference = f"{self.relative:.1e}" if self.status == ROUNDING else ""
        units = str(self.units) if self.units else ""
        cells = [f"`{self.model_type}`", self.status, difference, units, self.head, self.reason]
        return "| " + " | ".join(cells) + " |"


def classify(model_type: str) -> Verdict:
    """One step of two micro-batches of different shapes, dropout off; more where that is not equal."""
    skipped = zoo.skip_reason(model_type)
    if skipped is not None:
        return Verdict(model_type, SKIPPED, skipped)
    try:
        with quiet():
            found = _compare(model_type)
    except UnsupportedModelError as error:
        return Verdict(model_type, REFUSED, str(error).splitlines()[0].replace("|", "/"))
    head = "chunks" if found.head == "chunked" else "whole"
    if found.equal:
        return Verdict(model_type, EQUAL, units=found.units, head=head)
    with quiet():
        reason = _reason(model_type, found) or ACCEPTED.get(model_type)
    if reason is None or found.relative > BOUND or not found.only_gradients:
        text = f"{reason or 'no reason found'}; relative difference {found.relative:.1e}; {found}"
        return Verdict(model_type, FAILED, text, found.relative, found.units, head)
    return Verdict(model_type, ROUNDING, reason, found.relative, found.units, head)


def _compare(model_type: str, micro_batches: tuple[int, ...] = (0, 1), **options: object) -> Comparison:
    return compare(model_type, steps=1, micro_batches=micro_batches, dropout=False, **options)


def _reason(model_type: str, found: Comparison) -> str | None:
    """Why gradients differ in rounding, shown by a step that is equal to the last bit; None: it could not be shown."""
    reasons = []
    options: dict[str, object] = {}
    if found.caches_off:
        reasons.append("runs without its cache, and is equal to plain PyTorch with `use_cache=False`")
        options["use_cache"] = False
        if _compare(model_type, **options).equal:
            return reasons[0]
    fenced = _compare(model_type, fenced=True, **options)
    if fenced.several_readers:
        readers = _listed({maker: f"{count} readers" for maker, count in fenced.several_readers.items()})
        reasons.append(f"order of addition, several read one result: {readers}")
        if fenced.equal:
            return "; ".join(reasons)
    if found.several_calls:
        calls = _listed({unit: f"{count} calls" for unit, count in found.several_calls.items()})
        reasons.append(f"order of addition over micro-batches, several calls: {calls}")
    if found.read_outside:
        outside = _listed(dict.fromkeys(found.read_outside, "by its unit and outside of it"))
        reasons.append(f"order of addition over micro-batches, read twice: {outside}")
    if found.several_calls or found.read_outside:
        # one micro-batch alone has one order only
        if all(_compare(model_type, (n,), fenced=True, **options).equal for n in (0, 1)):
            return "; ".join(reasons)
    return None


def _listed(found: dict[str, str]) -> str:
    """`a.0`, `a.1` and `a.2` with one text each become one `a.N`."""
    grouped: dict[str, str] = {}
    for name, text in found.items():
        grouped.setdefault("`" + re.sub(r"(?<=\.)\d+(?=\.|$)", "N", name) + "`", text)
    shown = [f"{name} ({text})" for name, text in list(grouped.items())[:3]]
    return ", ".join([*shown, *([f"and {len(grouped) - 3} more"] if len(grouped) > 3 else [])])


def table(verdicts: list[Verdict]) -> str:
    counts = Counter(v.status for v in verdicts)
    order = [EQUAL, ROUNDING, REFUSED, SKIPPED, FAILED]
    rows = "\n".join(v.row() for v in verdicts)
    summary = "\n".join(f"| {status} | {counts[status]} |" for status in order if counts[status])
    return _TEXT.format(summary=summary, rows=rows)


def read_table() -> dict[str, str]:
    """Status by model type, from the written table."""
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", TABLE.read_text(), re.MULTILINE)
    return dict(rows)


_TEXT = """# Model types

Every causal and vision-language model type of transformers, as a tiny model with random weights, trained for one step
both ways in fp32 on the CPU: by the engine, and by plain PyTorch. Two micro-batches of different shapes, masked labels,
padding, weight decay, clipping.

| status | types |
|---|---|
{summary}

- **equal**: loss, every gradient, every weight and every buffer are equal to the last bit.
- **equal to 1e-6**: the loss is equal to the last bit, gradients differ in rounding alone. *Difference* is the largest
  difference of an element, relative to the largest element of its parameter's gradient (or to a tenth of the largest
  in the model, where that is more: some gradients are zero but for rounding). fp32 addition is not associative,
  and the engine adds one call of a unit at a time. The reason is tested, not guessed: plain PyTorch made to add in
  that order (or run without the cache, or on one micro-batch alone) is equal to the last bit.
- **refused**: the engine says that it cannot train this type.
- **skipped**: no tiny model can be built or trained here.

*Units*: pieces in which the tiny model streams. *Head*: in chunks of tokens, or as a whole where the model computes
its loss in a way of its own.

Made by `python tests/parity/classify.py`; `tests/parity/test_every_type.py` checks it.

| type | status | difference | units | head | reason |
|---|---|---|---|---|---|
{rows}
"""


def _all() -> Iterator[Verdict]:
    for number, model_type in enumerate(zoo.MODEL_TYPES, 1):
        verdict = classify(model_type)
        print(f"{number}/{len(zoo.MODEL_TYPES)} {verdict.row()}", flush=True)
        yield verdict


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:]:
        for chosen in sys.argv[1:]:
            print(classify(chosen).row())
    else:
        TABLE.write_text(table(list(_all())))
        print(f"wrote {TABLE}")
