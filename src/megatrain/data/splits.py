"""Parts of a source by their rows: what `split: train[:90%]` takes, as the datasets library reads such words."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatrain.data.bad_rows import names_of
from megatrain.errors import ConfigError

WHOLE = "train"  # the name of the only split of what has none
_NO_END = sys.maxsize


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of those that `files` have one after the other; with `stop` None to their end."""

    split: str
    files: tuple[Path, ...]
    start: int = 0
    stop: int | None = None

    @property
    def whole(self) -> bool:
        return self.start == 0 and self.stop is None

    def has(self, row: int) -> bool:
        return self.start <= row and (self.stop is None or row < self.stop)

    @property
    def range(self) -> list[Any]:
        """As JSON."""
        return [self.split, self.start, self.stop]


def parts_of(
    wanted: str | None, files: Mapping[str, Sequence[Path]], count: Callable[[str], int], where: str
) -> tuple[Part, ...]:
    """What `wanted` takes of the splits, whose files are given by name; None: the only one. Rows of a split are counted
    where they have to be. Raises ConfigError, whose message begins with `where`."""
    from megatrain.model.loading import one_line

    wanted = WHOLE if wanted is None else wanted
    if wanted in files:
        return (Part(wanted, tuple(files[wanted])),)
    instruction = _instruction(wanted, where)
    # without percentages and places told from the end, nothing depends on how many rows there are
    counts = {name: count(name) if "%" in wanted or "-" in wanted else _NO_END for name in _names(wanted, files, where)}
    try:
        absolute = instruction.to_absolute(counts)
    except ValueError as error:
        raise ConfigError(f"{where} split {wanted!r} is wrong: {one_line(error)}") from None
    parts = []
    for one in absolute:
        name, rows = one.splitname, counts[one.splitname]
        if one.to <= one.from_:
            raise ConfigError(f"{where} split {wanted!r} takes no row{'' if rows == _NO_END else f' of {rows:,}'}")
        stop = None if one.to == _NO_END else one.to
        parts.append(Part(name, tuple(files[name]), one.from_, stop))
    return tuple(parts)


def _instruction(wanted: str, where: str) -> Any:
    from datasets import ReadInstruction

    try:
        return ReadInstruction.from_spec(wanted)
    except (ValueError, AssertionError):
        raise ConfigError(
            f"{where} split {wanted!r} is not known; expected a name or a part such as train[:90%] or train[1000:]"
        ) from None


def _names(wanted: str, files: Mapping[str, Sequence[Path]], where: str) -> list[str]:
    """The splits of which something is wanted, each once."""
    names = list(dict.fromkeys(one.split("[")[0].split("(")[0].strip() for one in wanted.split("+")))
    for name in names:
        if name not in files:
            raise ConfigError(f"{where} has no split {name!r}; it has: {names_of(list(files))}")
    return names


def shared_file(some: Iterable[Part], others: Iterable[Part]) -> Path | None:
    """A file of which both have a row, as far as can be told: rows are compared where both read the same files."""
    others = list(others)
    for one in some:
        for other in others:
            shared = sorted(set(one.files) & set(other.files))
            apart = one.files == other.files and (_ends_before(one, other) or _ends_before(other, one))
            if shared and not apart:
                return shared[0]
    return None


def _ends_before(one: Part, other: Part) -> bool:
    return one.stop is not None and one.stop <= other.start
