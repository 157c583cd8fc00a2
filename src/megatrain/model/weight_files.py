"""A checkpoint's weight files: found, checked, and shown to transformers under our own names with nothing beside them.

transformers looks for more than `model.safetensors` in a folder: adapters, shards of distributed checkpoints, files
that a configuration or a model's class names, some of them pickles. It therefore never sees a stranger's folder, but a
folder of links to the files that were checked.
"""

import contextlib
import json
import os
import reprlib
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from megatrain.errors import ConfigError
from megatrain.model.config_entries import MAX_CONFIG_BYTES
from megatrain.model.safetensors_header import StoredTensor, read_header
from megatrain.regular_file import read_regular

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20

_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_NO_PICKLES = (
    "only safetensors weights are read (nothing is unpickled), convert others with transformers' save_pretrained"
)
_LINKED = ("config.json", "generation_config.json")
_MAX_NAMES_IN_ERROR = 4


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """safetensors files, and the tensors of each by name."""

    tensors: dict[Path, dict[str, StoredTensor]]

    def most_common_dtype(self) -> str:
        """The format's name of the dtype that holds most bytes."""
        n_bytes: Counter[str] = Counter()
        for tensors in self.tensors.values():
            for tensor in tensors.values():
                n_bytes[tensor.dtype] += tensor.end - tensor.begin
        return max(n_bytes, key=lambda name: n_bytes[name], default="F32")

    @contextlib.contextmanager
    def as_folder(self, others: dict[str, Path]) -> Iterator[Path]:
        """A folder of links to these files, and to `others` by name, for as long as it takes to load them."""
        with tempfile.TemporaryDirectory(prefix="megatrain-model-") as name:
            folder = Path(name)
            weight_map: dict[str, str] = {}
            for number, (file, tensors) in enumerate(self.tensors.items(), start=1):
                link = f"model-{number:05d}-of-{len(self.tensors):05d}.safetensors"
                (folder / (link if len(self.tensors) > 1 else WEIGHTS_NAME)).symlink_to(file.absolute())
                weight_map |= dict.fromkeys(tensors, link)
            if len(self.tensors) > 1:
                (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
            for link, file in others.items():
                (folder / link).symlink_to(file.absolute())
            yield folder


def find_file(source: str, name: str, where: dict[str, Any]) -> Path | None:
    """File `name` of a model folder, or of a hub id after a download; None where there is none.

    `where`: local_files_only and revision, for the hub, which raises OSError and ValueError.
    """
    if os.path.isdir(source):
        path = Path(source, name)
        return path if os.path.lexists(path) else None
    found = cached_file(source, name, _raise_exceptions_for_missing_entries=False, trust_remote_code=False, **where)
    return None if found is None else Path(found)


def _fetch(source: str, name: str, where: dict[str, Any]) -> Path | None:
    """As `find_file`; ConfigError where the hub does not give it."""
    try:
        return find_file(source, name, where)
    except (OSError, ValueError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"cannot fetch {name} of {source}: {reason[:300]}") from error


def find_weights(source: str, where: dict[str, Any]) -> WeightFiles:
    """The weights of a model folder or hub id; where they are safetensors, files of other kinds do not matter.

    Raises ConfigError where there are none, or a file or the index is damaged or not what it should be.
    """
    single = _fetch(source, WEIGHTS_NAME, where)
    if single is not None:
        return WeightFiles({single: read_header(single)})
    index = _fetch(source, INDEX_NAME, where)
    if index is None:
        raise ConfigError(f"{source} has no {WEIGHTS_NAME} and no {INDEX_NAME}; {_NO_PICKLES}")
    weight_map = _read_index(index)
    found: dict[str, Path] = {}
    missing = []
    for name in sorted(set(weight_map.values())):
        file = _fetch(source, name, where)
        if file is None:
            missing.append(name)
        else:
            found[name] = file
    if missing:
        raise ConfigError(f"{source} lacks {some(missing)}, which its {INDEX_NAME} names")
    tensors = {name: read_header(file) for name, file in found.items()}
    _check_agreement(index, weight_map, tensors)
    return WeightFiles({found[name]: tensors[name] for name in found})


def find_others(source: str, model_files: tuple[str, ...], where: dict[str, Any]) -> dict[str, Path]:
    """What transformers may read of a model beside its weights, by name: its configurations, and the safetensors files
    that the model's class in transformers names. Raises ConfigError where one of these is damaged."""
    found = {name: _fetch(source, name, where) for name in (*_LINKED, *model_files)}
    others = {name: file for name, file in found.items() if file is not None and file.is_file()}
    for name in set(model_files) & others.keys():
        read_header(others[name])
    for name in set(_LINKED) & others.keys():
        if (size := others[name].stat().st_size) > MAX_CONFIG_BYTES:
            raise ConfigError(f"{others[name]} has {size} bytes; expected at most {MAX_CONFIG_BYTES}")
    return others


def refuse_pickles(folder: Path) -> None:
    """Raise ConfigError where a folder's weights are pickles alone. None of them is opened."""
    names = {entry.name for entry in folder.iterdir()}
    pickles = sorted(name for name in names if _PICKLES & set(Path(name).suffixes))
    if pickles and not names & {WEIGHTS_NAME, INDEX_NAME}:
        raise ConfigError(f"{folder} has {some(pickles)} and no {WEIGHTS_NAME}; {_NO_PICKLES}")


def some(names: list[str]) -> str:
    """The first few of many names, without what would move a terminal's cursor."""
    more = len(names) - _MAX_NAMES_IN_ERROR
    shown = [name if name.isprintable() else ascii(name) for name in names[:_MAX_NAMES_IN_ERROR]]
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def _read_index(index: Path) -> dict[str, str]:
    """Weight -> name of the file beside the index that holds it."""
    try:
        content = json.loads(read_regular(index, MAX_INDEX_BYTES).decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read {index}: {error.strerror}") from None
    except RecursionError:
        raise ConfigError(f"{index} is damaged: nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{index} is damaged: {error}") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(
            f"{index} is damaged: weight_map is {reprlib.repr(weight_map)}; expected a mapping from weights to files"
        )
    for name in weight_map.values():
        if not _is_plain(name):
            raise ConfigError(
                f"{index} is damaged: it names {reprlib.repr(name)}; expected the name of a .safetensors file beside it"
            )
    return weight_map


def _is_plain(name: Any) -> bool:
    """Whether it names a file of the same folder, on every system."""
    plain = isinstance(name, str) and name.isprintable() and not set(name) & set("/\\:")
    return plain and str(name).endswith(".safetensors")


def _check_agreement(index: Path, weight_map: dict[str, str], tensors: dict[str, dict[str, StoredTensor]]) -> None:
    """Raise ConfigError unless every file holds exactly the weights that the index says."""
    holder: dict[str, str] = {}
    for file, names in tensors.items():
        for name in names:
            if name in holder:
                raise ConfigError(f"{index}: {some([name])} is in {holder[name]} and in {file}; expected one of them")
            holder[name] = file
    differing = sorted(name for name in weight_map.keys() | holder if weight_map.get(name) != holder.get(name))
    if differing:
        first = differing[0]
        raise ConfigError(
            f"{index} does not fit its files: it has {some([first])} in {weight_map.get(first, 'none')}, and it is in "
            f"{holder.get(first, 'none')}" + (f"; {len(differing) - 1} more differ" if len(differing) > 1 else "")
        )
