"""From a checkpoint back to the start, by the hash of its parent's manifest that each manifest records."""

import os
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from megatrain.errors import IntegrityError
from megatrain.trust.compare import Difference
from megatrain.trust.manifest import MANIFEST_NAME, Manifest, read_manifest


@dataclass(frozen=True, slots=True)
class Chain:
    """How far it could be followed."""

    links: int
    """Parents whose manifest is the recorded one."""
    broken: Difference | None = None
    lost: str | None = None
    """What is said of a parent that is not there any more."""


def follow_parents(folder: Path, manifest: Manifest, checked: Container[Path] = ()) -> Chain:
    """Follow the chain from `folder` to its start, or to a folder of `checked`, whose own chain is followed elsewhere.

    A parent that is gone is no difference: retention removes old checkpoints, and nothing that was recorded is lost
    but the files themselves.
    """
    links = 0
    while manifest.parent is not None:
        parent, child = manifest.parent, folder.name
        folder = folder.with_name(parent.folder)
        # under the child's own name stands the child: it has taken its parent's place
        if parent.folder == child or not os.path.lexists(folder / MANIFEST_NAME):
            had = f"its manifest had sha256 {parent.manifest_sha256}"
            return Chain(links, lost=f"{parent.folder}, the parent of {child}, is not here; {had}")
        name, expected = f"{child}/{MANIFEST_NAME}", f"parent {parent.folder} with manifest sha256 "
        try:
            manifest = read_manifest(folder)
        except IntegrityError as error:
            return Chain(links, Difference("parent", name, expected + parent.manifest_sha256, str(error)))
        if manifest.sha256 != parent.manifest_sha256:
            found = f"one with sha256 {manifest.sha256}"
            return Chain(links, Difference("parent", name, expected + parent.manifest_sha256, found))
        links += 1
        if folder in checked:
            break
    return Chain(links)
