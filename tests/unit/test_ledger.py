"""The ledger: its chain, what a crash or a full disk leave of it, and whatever else is found in its place."""

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ledgers import CHECKPOINT, START, ZEROS, encode, read_lines, step_line, write_chain

from megatrain.errors import ConfigError, IntegrityError
from megatrain.trust import ledger as module
from megatrain.trust.ledger import Head, History, LedgerWriter, number, read_ledger

RESUME = {**START, "kind": "resume", "checkpoint": "step-000002", "manifest_sha256": ZEROS, "step": 2}
del RESUME["units"]
RUN = [START, step_line(1), step_line(2), {**CHECKPOINT, "step": 2}, step_line(3)]


def write(path: Path, lines: list[dict[str, Any]], vouched: Head | None = None) -> LedgerWriter:
    ledger = LedgerWriter(path, vouched)
    for line in lines:
        ledger.append(**line)
    return ledger


def wrong(path: Path) -> str:
    with pytest.raises(IntegrityError) as caught:
        read_ledger(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_what_is_written_is_read_and_private(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = write(path, RUN)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = read_ledger(path)
    assert [{"kind": e.kind, **e.fields} for e in found.entries] == RUN and not found.torn_bytes
    assert ledger.head == Head(5, found.entries[-1].sha256) and not ledger.unwritten
    ledger.sync()
    ledger.close()
    again = write(path, [step_line(4)], ledger.head)
    assert [e.number for e in read_ledger(path).entries] == [1, 2, 3, 4, 5, 6]
    again.close()
    by_hand = tmp_path / "by hand"
    write_chain(by_hand, [*RUN, step_line(4)])
    assert by_hand.read_bytes() == path.read_bytes()


def test_numbers_come_back_to_the_last_bit(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 5e-324, 1.7976931348623157e308, -0.0, 3.0, 1 / 3]
    lines = [{**step_line(n + 1), "loss": number(value)} for n, value in enumerate(values)]
    write(tmp_path / "l", [START, *lines]).close()
    assert [repr(e["loss"]) for e in read_ledger(tmp_path / "l").entries[1:]] == [repr(value) for value in values]
    assert [number(float(text)) for text in ("inf", "-inf", "nan")] == ["inf", "-inf", "nan"]


@pytest.mark.parametrize(
    ("change", "line", "message"),
    [
        (lambda lines: lines.__setitem__(1, lines[1].replace(b"1.1", b"1.2")), 3, "it follows a line with sha256"),
        (lambda lines: lines.pop(1), 2, "it follows a line with sha256"),
        (lambda lines: lines.pop(0), 1, "it follows a line with sha256"),
        (lambda lines: lines.insert(2, lines[1]), 3, "it follows a line with sha256"),
        (lambda lines: lines.__setitem__(slice(1, 3), lines[2:0:-1]), 2, "it follows a line with sha256"),
        (lambda lines: lines.__setitem__(1, lines[1].replace(b":7", b": 7")), 2, "not the one text of its content"),
        (lambda lines: lines.__setitem__(1, b"\n"), 2, "Expecting value"),
        (lambda lines: lines.__setitem__(1, b"\xff\n"), 2, "'ascii' codec"),
        (lambda lines: lines.__setitem__(1, b"[" * 100_000 + b"\n"), 2, "nested too deeply"),
    ],
)
def test_a_changed_missing_added_or_exchanged_line_is_named(
    change: Callable[[list[bytes]], object], line: int, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "ledger.jsonl"
    write_chain(path, RUN)
    lines = path.read_bytes().splitlines(keepends=True)
    change(lines)
    path.write_bytes(b"".join(lines))
    assert wrong(path).startswith(f"line {line} is wrong: ") and message in wrong(path)


def test_lines_that_are_gone_from_the_end_are_not_noticed_by_the_chain_alone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    write_chain(path, RUN)
    head = Head(5, read_ledger(path).entries[-1].sha256)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert len(read_ledger(path).entries) == 4
    with pytest.raises(
        ConfigError, match=r"--resume: .* is not the one that the checkpoint recorded: line 5 had sha256"
    ):
        LedgerWriter(path, head)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([START, step_line(1), step_line(3)], "line 3 is wrong: step 3 follows step 1"),
        ([START, step_line(1), step_line(1)], "line 3 is wrong: step 1 follows step 1"),
        ([step_line(1)], "line 1 is wrong: step without a start or resume before it"),
        ([START, {**CHECKPOINT, "step": 1}], "line 2 is wrong: a checkpoint of step 1 follows step 0"),
        ([START, {"kind": "end", "step": 1, "files": {}, "units": {}}], "the end after step 1 follows step 0"),
        ([START, {"kind": "end", "step": 0, "files": {}, "units": {}}, step_line(1)], "without a start or resume"),
        ([{**START, "more": 1}], "start holds config, engine, facts, units, and nothing else"),
        ([{**START, "kind": "stop"}], "it is no entry of kind start, resume, step, checkpoint, evaluation, end"),
        ([{**START, "units": {"a": "0"}}], "units of start is {'a': '0'}"),
        ([START, {**step_line(1), "step": True}], "step of step is True"),
        ([START, {**step_line(1), "loss": 1}], "loss of step is 1"),
        ([START, {**step_line(1), "loss": "Infinity"}], "loss of step is 'Infinity'"),
        ([{**START, "facts": {"data": [{"path": 1}]}}], "facts of start is"),
        ([{**START, "engine": {}}], "engine of start is {}"),
    ],
)
def test_a_chain_that_is_whole_still_has_to_make_sense(lines: list[Any], message: str, tmp_path: Path) -> None:
    write_chain(tmp_path / "ledger.jsonl", lines)
    assert message in wrong(tmp_path / "ledger.jsonl")


@pytest.mark.parametrize("left", [1, 40, -1])
def test_a_line_that_a_crash_has_torn_is_left_out_and_gone_on_behind(
    left: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "ledger.jsonl"
    write_chain(path, RUN)
    *whole, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole) + last[:left])
    found = read_ledger(path)
    assert len(found.entries) == 4 and found.torn_bytes == len(last[:left])
    write(path, [RESUME, step_line(3)], Head(3, found.entries[2].sha256)).close()
    assert [e.kind for e in read_ledger(path).entries[3:]] == ["checkpoint", "resume", "step"]
    assert path.read_bytes().startswith(b"".join(whole))
    assert f"the last {len(last[:left])} bytes are no whole line" in caplog.text


def test_what_lost_power_has_made_of_lines_after_the_checkpoint_goes(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    write_chain(path, RUN)
    lines = path.read_bytes().splitlines(keepends=True)
    head = Head(3, read_ledger(path).entries[2].sha256)
    path.write_bytes(b"".join(lines[:3]) + bytes(len(lines[3])) + b"\n" + lines[4])
    assert wrong(path).startswith("line 4 is wrong")
    write(path, [RESUME], head).close()
    assert [e.kind for e in read_ledger(path).entries] == ["start", "step", "step", "resume"]


def test_a_full_disk_delays_lines_and_breaks_no_chain(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a line, then nothing for two lines; when there is room again everything is there."""
    path, room, pwrite = tmp_path / "ledger.jsonl", [10**6], os.pwrite

    def limited(descriptor: int, data: bytes, offset: int) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = pwrite(descriptor, bytes(data)[: room[0]], offset)
        room[0] -= done
        return done

    monkeypatch.setattr(module.os, "pwrite", limited)
    ledger = write(path, RUN[:2])
    room[0] = 50
    ledger.append(**RUN[2])
    ledger.append(**RUN[3])
    assert ledger.unwritten and ledger.head is None
    assert len(read_ledger(path).entries) == 2 and read_ledger(path).torn_bytes == 50
    room[0] = 10**6
    ledger.append(**RUN[4])
    assert not ledger.unwritten and [e.kind for e in read_ledger(path).entries] == [line["kind"] for line in RUN]
    assert caplog.text.count("No space left on device; training goes on, and its lines wait") == 1
    ledger.close()


def test_what_was_taken_back_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    again = {**step_line(3), "loss": 9.5}
    write_chain(path, [*RUN, step_line(4), {**CHECKPOINT, "step": 4}, RESUME, again])
    history = History(read_ledger(path).entries)
    assert sorted(history.steps) == [1, 2, 3] and history.steps[3]["loss"] == 9.5 and history.last_step == 3
    assert sorted(history.checkpoints) == [2] and history.checkpoints[2].kind == "checkpoint"
    assert [(step, entry.kind) for step, entry in history.beginnings] == [(0, "start"), (2, "resume")]
    write_chain(path, [*RUN, START, step_line(1)])
    history = History(read_ledger(path).entries)
    assert sorted(history.steps) == [1] and not history.checkpoints and len(history.beginnings) == 1


def test_what_is_no_ledger(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no ledger.jsonl; expected a run's folder"):
        read_ledger(tmp_path / "ledger.jsonl")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    write_chain(tmp_path / "there", RUN)
    (tmp_path / "link").symlink_to(tmp_path / "there")
    for name in ("pipe", "folder", "link"):
        with pytest.raises(IntegrityError, match="cannot be read"):
            read_ledger(tmp_path / name)
        with pytest.raises(ConfigError, match="cannot write to"):
            LedgerWriter(tmp_path / name)


# -- anything at all ----------------------------------------------------------------------------------------------

often = settings(max_examples=80, deadline=10_000, suppress_health_check=list(HealthCheck))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([ZEROS, 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = sorted({name for line in (*RUN, RESUME) for name in line})


@st.composite
def damaged(draw: st.DrawFn) -> list[dict[str, Any]]:
    lines = [dict(line) for line in draw(st.lists(st.sampled_from([*RUN, RESUME]), min_size=1, max_size=5))]
    for _ in range(draw(st.integers(0, 3))):
        draw(st.sampled_from(lines))[draw(st.sampled_from(NAMES))] = draw(values)
    return lines


def read_or_refuse(path: Path) -> None:
    refused = ""
    try:
        History(read_ledger(path).entries)
    except IntegrityError as error:
        refused = str(error)
    assert "\n" not in refused


@often
@given(lines=damaged())
def test_any_lines_in_a_chain_are_read_or_refused_in_one_line(
    lines: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.jsonl"
    try:
        write_chain(path, lines)
    except (ValueError, UnicodeEncodeError):  # what JSON itself cannot say
        path.write_bytes(json.dumps(str(lines)).encode())
    read_or_refuse(path)


@often
@given(
    data=st.binary(max_size=60)
    | st.lists(
        st.sampled_from([encode({**START, "previous": ZEROS}), b"\n", b"{", b'"', b"1e999", b"9" * 5000, b"\0"])
    ).map(b"".join)
)
def test_any_bytes_are_read_or_refused_in_one_line(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.jsonl"
    path.write_bytes(data)
    read_or_refuse(path)


@often
@given(place=st.integers(0), value=st.integers(0, 255))
def test_no_byte_can_be_changed_unnoticed(place: int, value: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """But in the last line, which nothing follows; there the content is another one, or refused."""
    path = tmp_path_factory.getbasetemp() / "changed.jsonl"
    write_chain(path, RUN)
    data = bytearray(path.read_bytes())
    place %= len(data) - len(data.splitlines()[-1]) - 1
    changed = data[place] != value
    data[place] = value
    path.write_bytes(data)
    if changed:
        wrong(path)
    else:
        assert read_lines(path)
