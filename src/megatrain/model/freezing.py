"""Which parameters are not trained, by patterns of their names (model.freeze).

A frozen parameter is what PyTorch has for that: one that requires no gradient. What follows from it (no optimizer
state, no gradient, no second run of a unit that nothing has to pass back through) is decided where it is done.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from torch import nn

from megatrain.errors import ConfigError

_SHOWN = 3


def freeze(model: nn.Module, patterns: str | Sequence[str] | None) -> Callable[[], None]:
    """Freeze the parameters whose name one of these regular expressions finds (`re.search`); returns what undoes it. A
    tied parameter goes by all of its names.

    Raises ConfigError, with nothing changed, for a pattern that finds none, and where none is left to train.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    expressions = _compiled(patterns)
    for expression in expressions:
        if not any(expression.search(name) for name, _ in named):
            raise ConfigError(_no_match(expression.pattern, [name for name, _ in named]))
    found = {id(p): p for name, p in named if any(expression.search(name) for expression in expressions)}
    if found and not any(p.requires_grad for _, p in named if id(p) not in found):
        count = len({id(p) for _, p in named})
        raise ConfigError(
            f"model.freeze: {[e.pattern for e in expressions]} leave none of {count} parameters to train; one has to be"
        )
    changed = [p for p in found.values() if p.requires_grad]
    for parameter in changed:
        parameter.requires_grad_(False)
    return partial(_unfreeze, changed)


def _unfreeze(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(True)


def _compiled(patterns: str | Sequence[str] | None) -> list[re.Pattern[str]]:
    found = []
    if patterns is not None and not isinstance(patterns, (str, list, tuple)):
        raise ConfigError(f"model.freeze: {patterns!r} is wrong; expected a regular expression, or a list of these")
    for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
        try:
            found.append(re.compile(pattern))
        except (re.error, TypeError, OverflowError, RecursionError) as error:
            raise ConfigError(f"model.freeze: {pattern!r} is wrong; expected a regular expression ({error})") from None
    return found


def _no_match(pattern: str, names: list[str]) -> str:
    """What is wrong with a pattern, with parts of the model whose names are nearly like it."""
    parts = [".".join(words[:n]) for words in (name.split(".") for name in names) for n in range(1, len(words) + 1)]
    text = re.sub(r"[^\w.]", "", pattern).strip(".")
    likeness = {part: max(_likeness(text, part), _likeness(text, part.rpartition(".")[2])) for part in parts}
    near = sorted((p for p, ratio in likeness.items() if ratio >= 0.6), key=lambda p: (-likeness[p], len(p)))
    if near:
        return f"model.freeze: {pattern!r} matches no parameter; did you mean {' or '.join(near[:_SHOWN])}?"
    return f"model.freeze: {pattern!r} matches no parameter; their names are such as {', '.join(names[:_SHOWN])}"


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()
