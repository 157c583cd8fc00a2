"""What the run came from and left, and what of it this page has checked: only what is said here."""

import json
from typing import Any

from megatrain.report.charts import table
from megatrain.report.folder import Checkpoint, Run
from megatrain.report.markup import Html, join, tag
from megatrain.sizes import format_bytes
from megatrain.trust.ledger import Entry

_MOST_FILES = 200  # of data, in the table


def code_and_machine(run: Run) -> Html:
    """Versions and hardware as each beginning of the run found them, the last first."""
    history = run.history
    if history is None or not history.beginnings:
        return tag("p", "There is no ledger, so code, libraries, hardware and data were not recorded.", class_="muted")
    blocks = [_beginning(step, entry) for step, entry in reversed(history.beginnings)]
    return join(blocks[0], *(tag("details", tag("summary", "Before that"), block) for block in blocks[1:]))


def _beginning(step: int, entry: Entry) -> Html:
    facts, engine = entry["facts"], entry["engine"]
    code, hardware = facts["code"], facts["hardware"]
    began = "began" if entry.kind == "start" else f"went on from step {step:,} ({entry['checkpoint']})"
    rows = [
        ("the run", began),
        ("MegaTrain", f"{code.get('version')}, sources sha256 {code.get('sha256')}"),
        (
            "libraries",
            ", ".join(f"{name} {version or 'not installed'}" for name, version in facts["libraries"].items()),
        ),
        ("computes on", f"{hardware.get('device')}: {engine['precision']}, {engine['kernels']}"),
        ("host", _host(hardware)),
        ("deterministic kernels", "yes" if engine["deterministic"] else "no"),
        ("settings", f"sha256 {facts.get('config_sha256')}"),
    ]
    return definitions(rows)


def _host(hardware: dict[str, Any]) -> str:
    memory = hardware.get("memory_bytes")
    size = f", {format_bytes(memory)} of memory" if isinstance(memory, int) else ""
    return f"{_said(hardware.get('cpu'))}, {_said(hardware.get('cores'))} cores{size}"


def _said(value: object) -> str:
    return "not known" if value is None else str(value)


def definitions(rows: list[tuple[str, str]]) -> Html:
    return tag("dl", *(join(tag("dt", name), tag("dd", value)) for name, value in rows))


def data_files(run: Run) -> Html:
    settings = run.settings
    if settings is None:
        return Html("")
    files = settings["facts"]["data"]
    sizes = [file.get("bytes") for file in files if isinstance(file.get("bytes"), int)]
    rows = [
        [file["path"], format_bytes(file["bytes"]) if isinstance(file.get("bytes"), int) else "", file["sha256"]]
        for file in files[:_MOST_FILES]
    ]
    more = f"; the first {_MOST_FILES} are here" if len(files) > _MOST_FILES else ""
    summary = f"{len(files):,} data files, {format_bytes(sum(sizes))}{more}"
    listed = tag("details", tag("summary", summary), table(["file", "bytes", "sha256"], rows))
    return tag("div", listed, class_="panel")


def ledger(run: Run) -> Html:
    """What reading the ledger showed."""
    if run.ledger is None or not run.ledger.entries:
        return tag("p", "No ledger that can be read.", class_="muted")
    last, history = run.ledger.entries[-1], run.history
    rows = [
        ("ledger", f"{len(run.ledger.entries):,} lines; each holds the hash of the line before it (read to the end)"),
        ("its head", f"sha256 {last.sha256}"),
    ]
    if history is not None and history.end is not None:
        files = history.end["files"]
        hashes = "".join(f"\n{sha256}  {name}" for name, sha256 in sorted(files.items()))
        rows.append(
            ("model files", f"{len(files)}, with these sha256 when they were saved:{hashes}" if files else "none saved")
        )
    return join(
        definitions(rows),
        tag(
            "p",
            "Hashes on this page are those recorded by the run. Files were not read again to make it: ",
            tag("code", "megatrain verify RUN"),
            " compares them, ",
            tag("code", "megatrain audit RUN"),
            " computes steps again.",
            class_="muted",
        ),
    )


def checkpoints(run: Run) -> Html:
    if not run.checkpoints:
        return tag("p", "None in the run's folder.", class_="muted")
    rows = [
        [
            one.name,
            f"{one.step:,}",
            "–" if one.bytes is None else format_bytes(one.bytes),
            "–" if one.manifest is None else one.manifest.sha256,
            _in_ledger(run, one),
        ]
        for one in run.checkpoints
    ]
    shown = table(["checkpoint", "step", "size", "sha256 of its manifest", "the ledger"], rows)
    return tag("div", shown, class_="panel")


def _in_ledger(run: Run, one: Checkpoint) -> str:
    """What comparing the manifest's hash with the ledger showed."""
    history = run.history
    if one.manifest is None:
        return "manifest cannot be read"
    entry = None if history is None else history.checkpoints.get(one.step)
    if entry is None:
        return "does not record it"
    return "records this manifest" if entry["manifest_sha256"] == one.manifest.sha256 else "RECORDS ANOTHER MANIFEST"


def plain(value: object, most: int = 4000) -> str:
    """A value of the run as text, cut where it is very long."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} more characters)"
