"""`ledger.jsonl`: what a run did, line by line, each holding the SHA-256 of the line before it.

    start        the run begins: settings, data, code, machine, and SHA-256 of each unit of the new model
    step         one optimizer step: its batch, loss, norm, learning rate
    checkpoint   one is on disk: its manifest, and SHA-256 of each unit
    resume       the run goes on from a checkpoint, as it is set now; recorded steps after that one do not count
    end          the run is over: its units, and the files of its model

Lines are only ever added. A line is canonical JSON, so that one entry has one text; docs/integrity.md shows some.
"""

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatrain import files
from megatrain.errors import ConfigError, IntegrityError
from megatrain.private_files import private
from megatrain.trust.hashing import open_regular

LEDGER_NAME = "ledger.jsonl"

_log = logging.getLogger(__name__)
_NOTHING = hashlib.sha256(b"").hexdigest()  # before the first line
_MOST_LINE_BYTES = 256 << 20  # `start` names each file of data
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NOT_FINITE = ("inf", "-inf", "nan")


@dataclass(frozen=True, slots=True)
class Entry:
    """A line: its number, from 1, and the SHA-256 of its text with the line end."""

    number: int
    sha256: str
    kind: str
    fields: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]


@dataclass(frozen=True, slots=True)
class Head:
    """The ledger up to a line: how many there are, and the SHA-256 of the last, which vouches for all."""

    lines: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Ledger:
    entries: list[Entry]
    torn_bytes: int
    """After the last line end: of a line that was not written to its end."""


def number(value: float) -> float | str:
    """As a line holds it: JSON has no infinity and no NaN."""
    return float(value) if math.isfinite(value) else str(float(value))


# -- writing --------------------------------------------------------------------------------------------------


class LedgerWriter:
    """Adds lines to the ledger at `path`, private to the user, in the order in which `append` is called.

    What cannot be written (a full disk) is said once, waits in memory, and is written as soon as that can be: training,
    which may have taken days, is worth more than an account of it, and the chain has no holes. An existing ledger is
    gone on with behind its last whole line. `vouched`: what a checkpoint recorded of it; raises ConfigError where that
    is not in it, or the file cannot be used.
    """

    def __init__(self, path: Path, vouched: Head | None = None) -> None:
        self._path = path
        self._lines, self._previous, self._size = 0, _NOTHING, 0
        self._waiting = bytearray()  # of which the file may hold nothing, or a part of the first line
        self._said = False
        try:
            if os.path.lexists(path):
                self._go_on(vouched)
            self._file = open(path, "r+b" if self._size else "w+b", buffering=0, opener=private)  # noqa: SIM115
            self._file.truncate(self._size)
        except OSError as error:
            raise ConfigError(f"output: cannot write to {str(path)!r}: {error.strerror}") from None

    def _go_on(self, vouched: Head | None) -> None:
        entries, self._size, wrong = _read_good_part(self._path)
        if vouched is not None:
            there = entries[vouched.lines - 1].sha256 if 0 < vouched.lines <= len(entries) else "none"
            if there != vouched.sha256:
                raise ConfigError(
                    f"--resume: {self._path} is not the one that the checkpoint recorded: line {vouched.lines} had"
                    f" sha256 {vouched.sha256}, there is {wrong or there}; move it away to begin a new one"
                )
        cut = self._path.stat().st_size - self._size
        if cut:
            _log.warning("%s: the last %d bytes are no whole line, and go", self._path, cut)
        if entries:
            self._lines, self._previous = len(entries), entries[-1].sha256

    @property
    def unwritten(self) -> bool:
        """Whether lines wait for room on the disk."""
        return bool(self._waiting)

    @property
    def head(self) -> Head | None:
        """Of what the system has been given; None while lines wait."""
        return None if self._waiting or not self._lines else Head(self._lines, self._previous)

    def append(self, kind: str, **fields: Any) -> None:
        """One line, given to the system before this returns."""
        line = _encode({"kind": kind, "previous": self._previous, **fields})
        self._previous = hashlib.sha256(line).hexdigest()
        self._lines += 1
        self._waiting += line
        try:
            while self._waiting:  # a part that was written stays: what comes next goes on behind it
                count = os.pwrite(self._file.fileno(), self._waiting, self._size)
                del self._waiting[:count]
                self._size += count
        except OSError as error:
            if not self._said:
                reason = f"{error.strerror}; training goes on, and its lines wait until they can be written"
                _log.warning("output: cannot write to %r: %s", str(self._path), reason)
            self._said = True

    def sync(self) -> None:
        """What has been written is on disk when this returns. Any thread may call it. Raises OSError."""
        os.fsync(self._file.fileno())
        files.sync_folder(self._path.parent)

    def close(self) -> None:
        self._file.close()


def _encode(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n").encode("ascii")


# -- reading --------------------------------------------------------------------------------------------------


def read_ledger(path: Path) -> Ledger:
    """All lines, each of which is what it has to be. Raises ConfigError where there is no ledger, IntegrityError that
    names the first line that is wrong. A last line without an end is what a crash leaves, and is left out."""
    try:
        entries, good_bytes, wrong = _read_good_part(path)
        size = path.stat().st_size
    except FileNotFoundError:
        raise ConfigError(f"{str(path.parent)!r} holds no {path.name}; expected a run's folder") from None
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read: {error.strerror}") from None
    if wrong is not None:
        raise IntegrityError(f"{path}: {wrong}")
    return Ledger(entries, size - good_bytes)


def _read_good_part(path: Path) -> tuple[list[Entry], int, str | None]:
    """(entries, bytes of them, what is wrong with the next line: None where there is none, or a part of one)."""
    if path.is_symlink():
        raise OSError(0, "it is a link", str(path))
    entries: list[Entry] = []
    good_bytes, order = 0, _Order()
    with open(open_regular(path), "rb") as stream:
        while (line := stream.readline(_MOST_LINE_BYTES)).endswith(b"\n"):
            previous = entries[-1].sha256 if entries else _NOTHING
            try:
                entry = _decode(len(entries) + 1, line, previous)
                order.take(entry)
            except (ValueError, RecursionError) as error:  # JSON's own errors are ValueErrors
                what = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
                return entries, good_bytes, f"line {len(entries) + 1} is wrong: {what}"
            entries.append(entry)
            good_bytes += len(line)
    if len(line) == _MOST_LINE_BYTES:
        return entries, good_bytes, f"line {len(entries) + 1} is wrong: it is longer than {_MOST_LINE_BYTES} bytes"
    return entries, good_bytes, None


def _decode(line_number: int, line: bytes, previous: str) -> Entry:
    """Raises ValueError or RecursionError."""
    data = json.loads(line.decode("ascii"))
    if not isinstance(data, dict) or not isinstance(data.get("kind"), str) or data["kind"] not in _FIELDS:
        raise ValueError(f"it is no entry of kind {', '.join(_FIELDS)}")
    if data.get("previous") != previous:
        raise ValueError(f"it follows a line with sha256 {str(data.get('previous'))[:64]!r}, not {previous}")
    fields = _FIELDS[data["kind"]]
    if data.keys() != fields.keys() | {"kind", "previous"}:
        raise ValueError(f"{data['kind']} holds {', '.join(sorted(fields))}, and nothing else")
    for name, check in fields.items():
        if not check(data[name]):
            raise ValueError(f"{name} of {data['kind']} is {data[name]!r:.60}")
    if _encode(data) != line:
        raise ValueError("it is not the one text of its content (a key twice, another order, other spaces)")
    content = {name: value for name, value in data.items() if name not in ("kind", "previous")}
    return Entry(line_number, hashlib.sha256(line).hexdigest(), data["kind"], content)


class _Order:
    """What may follow what. A chain that was made anew around a line that is missing is found here."""

    def __init__(self) -> None:
        self._step = -1  # that was recorded last; -1: a beginning has to come

    def take(self, entry: Entry) -> None:
        """Raises ValueError."""
        if entry.kind == "start":
            self._step = 0
        elif entry.kind == "resume":
            self._step = entry["step"]
        elif self._step < 0:
            raise ValueError(f"{entry.kind} without a start or resume before it")
        elif entry.kind == "step":
            if entry["step"] != self._step + 1:
                raise ValueError(f"step {entry['step']} follows step {self._step}")
            self._step += 1
        elif entry.kind == "checkpoint":
            if entry["step"] > self._step:
                raise ValueError(f"a checkpoint of step {entry['step']} follows step {self._step}")
        elif entry.kind == "evaluation":
            if entry["step"] != self._step:
                raise ValueError(f"an evaluation of step {entry['step']} follows step {self._step}")
        else:
            if entry["step"] != self._step:
                raise ValueError(f"the end after step {entry['step']} follows step {self._step}")
            self._step = -1


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _is_number(value: object) -> bool:
    return type(value) is float or value in _NOT_FINITE


def _counts_from(least: int) -> Callable[[object], bool]:
    return lambda value: type(value) is int and least <= value < 1 << 63


def _is_sums(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_sha256, value.values()))


def _is_results(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(one, dict)
        and one.keys() == {"loss", "target_tokens"}
        and _is_number(one["loss"])
        and _counts_from(0)(one["target_tokens"])
        for one in value.values()
    )


def _is_engine(value: object) -> bool:
    kinds = {"deterministic": bool, "device": str, "kernels": str, "precision": str, "threads": int}
    return isinstance(value, dict) and {name: type(item) for name, item in value.items()} == kinds


def is_data(value: object) -> bool:
    """Whether these are files that were trained on, as `facts.describe_files` describes them."""
    return isinstance(value, list) and all(
        isinstance(file, dict)
        and _is_text(file.get("path"))
        and _is_sha256(file.get("sha256"))
        and _counts_from(0)(file.get("bytes"))
        for file in value
    )


def _is_facts(value: object) -> bool:
    if not isinstance(value, dict) or not is_data(value.get("data")):
        return False
    return all(isinstance(value.get(name), dict) for name in ("code", "hardware", "libraries"))


_SETTINGS: dict[str, Callable[[object], bool]] = {"config": _is_text, "engine": _is_engine, "facts": _is_facts}
_FIELDS: dict[str, dict[str, Callable[[object], bool]]] = {
    "start": _SETTINGS | {"units": _is_sums},
    "resume": _SETTINGS | {"checkpoint": _is_text, "manifest_sha256": _is_sha256, "step": _counts_from(0)},
    "step": {
        "batch_sha256": _is_sha256,
        "grad_norm": _is_number,
        "loss": _is_number,
        "lr": _is_number,
        "step": _counts_from(1),
        "target_tokens": _counts_from(0),
    },
    "checkpoint": {"manifest_sha256": _is_sha256, "step": _counts_from(1), "units": _is_sums},
    "evaluation": {"results": _is_results, "step": _counts_from(0)},
    "end": {"files": _is_sums, "step": _counts_from(0), "units": _is_sums},
}


# -- what counts ----------------------------------------------------------------------------------------------


class History:
    """The steps and checkpoints that the run's state comes from: what a later `start` or `resume` took back is not
    among them."""

    def __init__(self, entries: list[Entry]) -> None:
        self.steps: dict[int, Entry] = {}
        self.checkpoints: dict[int, Entry] = {}
        """By step: a `checkpoint`, or the `resume` that went on from one that was never entered."""
        self.beginnings: list[tuple[int, Entry]] = []
        """(steps done, `start` or `resume`), one after the other."""
        self.end: Entry | None = None
        for entry in entries:
            if entry.kind == "step":
                self.steps[entry["step"]] = entry
            elif entry.kind == "checkpoint":
                self.checkpoints[entry["step"]] = entry
            elif entry.kind == "end":
                self.end = entry
            elif entry.kind != "evaluation":  # which says something of weights that are recorded, and changes none
                self._begin(entry)

    def _begin(self, entry: Entry) -> None:
        step = entry["step"] if entry.kind == "resume" else 0
        self.end = None
        for entered in (self.steps, self.checkpoints):
            for later in [one for one in entered if one > step]:
                del entered[later]
        while self.beginnings and self.beginnings[-1][0] >= step:
            self.beginnings.pop()
        self.beginnings.append((step, entry))
        if entry.kind == "resume":
            self.checkpoints.setdefault(step, entry)

    @property
    def last_step(self) -> int:
        return max(self.steps, default=0)

    def missing(self, first: int, last: int) -> Iterator[int]:
        """Steps of these that were not recorded."""
        return (step for step in range(first, last + 1) if step not in self.steps)


def head_recorded(facts: Mapping[str, Any]) -> Head | None:
    """What a manifest says of the ledger; None where it says nothing."""
    found = facts.get("ledger")
    if isinstance(found, dict) and type(found.get("lines")) is int and isinstance(found.get("sha256"), str):
        return Head(found["lines"], found["sha256"])
    return None
