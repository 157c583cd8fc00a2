"""Write api.md: what of the package is for users, from its docstrings.

python docs/api.py

Signatures are without types: the docstrings say them, and how types are printed changes between versions of Python.
"""

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import megatrain as mt
from megatrain import errors
from megatrain.engine.step import StepStats

_HEAD = """# API

Everything is in `megatrain`, imported as `mt`. This page is made from the docstrings by `python docs/api.py`; the
command line and all settings are `megatrain --help` and `megatrain config`.
"""
_COLUMNS = re.compile(r"^\w+: {2,}\S", re.MULTILINE)
_WIDTH = 120  # of a line of code
_READ = "`model`, `optimizer` (a torch optimizer), `device`, `precision`, `kernels` and `step_count`"
# Of Engine's methods those that a training loop calls. The others are between its parts.
_MAKING = ("from_pretrained", "from_checkpoint", "frozen")
_TRAINING = ("train_step", "step", "clip_grad_norm_", "discard_gradients", "log_probabilities", "set_param_groups")
_STATE = ("save", "wait_for_save", "load", "save_pretrained", "unit_hashes", "flush")
_OTHER = ("memory_report", "start_trace", "write_trace", "close")


def page() -> str:
    """The text of api.md."""
    return "\n".join([_HEAD, *_engine(), *_losses(), *_trainers(), *_errors()])


def _engine() -> Iterator[str]:
    yield from _entry("## mt.Engine", "mt.Engine", mt.Engine)
    yield f"Of an engine, {_READ} may be read.\n"
    for title, names in (("Making one", _MAKING), ("Training", _TRAINING), ("State", _STATE), ("Besides", _OTHER)):
        yield f"### {title}\n"
        for name in names:
            yield from _entry(
                f"#### {name}", ("mt.Engine." if title == "Making one" else "engine.") + name, getattr(mt.Engine, name)
            )
    yield "### What train_step and step return\n"
    yield _text(StepStats)
    yield "Fields: " + ", ".join(f"`{name}`" for name in inspect.signature(StepStats).parameters) + ".\n"
    yield from _entry("## mt.AdamW", "mt.AdamW", mt.AdamW)


def _losses() -> Iterator[str]:
    yield "## mt.losses\n"
    yield _text(mt.losses)
    yield from _entry("### mt.losses.DPO", "mt.losses.DPO", mt.losses.DPO)
    yield "### mt.losses.TokenLoss\n"
    yield _text(mt.losses.TokenLoss)
    for name, shown in (("inputs", "loss.inputs"), ("units", None), ("__call__", None)):
        member = getattr(mt.losses.TokenLoss, name)
        shown = shown or _signature("loss" if name == "__call__" else f"loss.{name}", member)
        yield f"- `{shown}`: {' '.join(_text(member).split())}"
    yield ""


def _trainers() -> Iterator[str]:
    yield from _entry("## mt.StreamedTrainerMixin", "mt.StreamedTrainerMixin", mt.StreamedTrainerMixin)
    yield "How to use it, and what it refuses: [trainers.md](trainers.md).\n"


def _errors() -> Iterator[str]:
    yield "## Errors\n"
    yield "In `megatrain.errors`; the first three of the subclasses are in `megatrain`, too.\n"
    yield "| error | |\n|---|---|"
    for name, error in vars(errors).items():
        if inspect.isclass(error) and issubclass(error, errors.MegaTrainError):
            yield f"| `{name}` | {' '.join(_text(error).split())} |"
    yield ""


def _entry(heading: str, name: str, what: Any) -> Iterator[str]:
    """A heading, the signature and the docstring, whose arguments stand in columns."""
    yield f"{heading}\n\n```python\n{_signature(name, what)}\n```\n"
    yield _text(what)


def _signature(name: str, what: Any) -> str:
    shown = []
    bare_star = False
    for parameter in inspect.signature(what).parameters.values():
        if parameter.name == "self" or parameter.name.startswith("_"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not bare_star:
            shown.append("*")
            bare_star = True
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        bare_star = bare_star or stars == "*"
        shown.append(f"{stars}{parameter.name}{_default(parameter.default)}")
    line = f"{name}({', '.join(shown)})"
    return line if len(line) <= _WIDTH else f"{name}(\n    " + ",\n    ".join(shown) + ",\n)"


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return ""
    return f"={json.dumps(value) if isinstance(value, str) else repr(value)}"


def _text(what: Any) -> str:
    """The docstring. Lists of arguments, in columns, become code, so that the columns stay."""
    paragraphs = (inspect.getdoc(what) or "").split("\n\n")
    return "\n\n".join(f"```\n{one}\n```" if _COLUMNS.search(one) else one for one in paragraphs) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(page(), encoding="utf-8")
