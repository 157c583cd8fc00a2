"""Small folders with manifests, as a run would leave them, for tests of what verifies them."""

from pathlib import Path

from megatrain.trust.manifest import Parent, parent_of, write_manifest

FILES = {
    "model/config.json": b'{"model_type": "llama"}\n',
    "model/model.safetensors": bytes(range(256)) * 20,
    "state/moments.safetensors": b"\x07" * 9000,
    "training.json": b'{"step": 100}\n',
}


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def make_checkpoint(folder: Path, step: int = 100, parent: Parent | None = None) -> Path:
    fill(folder, {**FILES, "training.json": b'{"step": %d}\n' % step})
    write_manifest(folder, {"step": step}, parent)
    return folder


def make_run(folder: Path, steps: tuple[int, ...] = (100, 200, 1000)) -> Path:
    """A run whose checkpoints go on from each other."""
    parent = None
    for step in steps:
        checkpoint = make_checkpoint(folder / "checkpoints" / f"step-{step:06d}", step, parent)
        parent = parent_of(checkpoint)
    return folder
