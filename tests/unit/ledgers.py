"""Ledgers made by hand, and the rewriting of real ones, for tests of what notices it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatrain.trust.ledger import LEDGER_NAME
from megatrain.trust.manifest import MANIFEST_NAME, Parent, read_manifest, write_manifest

Line = dict[str, Any]
ZEROS = "0" * 64
FACTS = {"code": {}, "data": [], "hardware": {}, "libraries": {}}
ENGINE = {"deterministic": False, "device": "cpu", "kernels": "torch", "precision": "fp32", "threads": 1}
START = {"kind": "start", "config": "{}", "engine": ENGINE, "facts": FACTS, "units": {}}
CHECKPOINT = {"kind": "checkpoint", "manifest_sha256": ZEROS, "units": {"layer": ZEROS}}


def step_line(step: int) -> Line:
    numbers = {"grad_norm": 1.5, "loss": 0.1 + step, "lr": 1e-05}
    return {"kind": "step", "batch_sha256": ZEROS, "step": step, "target_tokens": 7, **numbers}


def encode(line: Line) -> bytes:
    return (json.dumps(line, sort_keys=True, separators=(",", ":")) + "\n").encode()


def read_lines(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def write_chain(path: Path, lines: list[Line]) -> None:
    """With a chain that is right, whatever is in the lines."""
    text, previous = b"", hashlib.sha256(b"").hexdigest()
    for line in lines:
        encoded = encode(line | {"previous": previous})
        text, previous = text + encoded, hashlib.sha256(encoded).hexdigest()
    path.write_bytes(text)


def forge(run: Path, change: Callable[[list[Line]], object]) -> None:
    """Change the ledger's lines, and make everything that records hashes of them anew, as somebody could who has all of
    the folder: the chain, and the manifests of the checkpoints with theirs."""
    path = run / LEDGER_NAME
    lines = read_lines(path)
    before = {line["step"]: line for line in lines if line["kind"] == "checkpoint"}
    heads = {step: read_manifest(_checkpoint(run, step)).facts["ledger"]["lines"] for step in before}
    change(lines)
    parent = None
    for step in sorted(heads):
        write_chain(path, lines)
        folder, digest = _checkpoint(run, step), hashlib.sha256()
        digest.update(path.read_bytes().splitlines(keepends=True)[heads[step] - 1])
        facts = read_manifest(folder).facts | {"ledger": {"lines": heads[step], "sha256": digest.hexdigest()}}
        (folder / MANIFEST_NAME).unlink()
        manifest = write_manifest(folder, facts, parent)
        parent = Parent(folder.name, manifest)
        for line in lines:
            if line.get("step") == step and "manifest_sha256" in line:
                line["manifest_sha256"] = manifest
    write_chain(path, lines)


def _checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"
