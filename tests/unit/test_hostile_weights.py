"""safetensors files and indexes that lie: one line with the file and what would be right, soon, in little memory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_files import entry, model_folder, safetensors_file
from safetensors.torch import load_file, save_file
from test_no_pickle import commands
from tiny_models import tiny_config

import megatrain as mt
from megatrain import cli
from megatrain.data.tokenizer import train_bpe
from megatrain.errors import ConfigError
from megatrain.model import loading
from megatrain.model.safetensors_header import MAX_HEADER_BYTES, read_header

NOT_WHOLE = "is not a whole safetensors file: "
ONE = {"a": entry(0, 8)}

HEADERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it has 0 bytes; expected a header's length in the first 8"),
    "half a length": (b"\1\0\0", "it has 3 bytes; expected a header's length"),
    "no header": (bytes(8), "its header is not JSON"),
    "a zip, as torch.save writes": (b"PK\3\4" + bytes(60), "its header would take 67324752 bytes; 56 follow"),
    "header beyond the end": (safetensors_file(ONE, bytes(8), length=1000), "its header would take 1000 bytes"),
    "header of all bytes": (b"\xff" * 40, f"its header would take {2**64 - 1} bytes; 32 follow"),
    "not JSON": (safetensors_file(b"{'a': 1}"), "its header is not JSON: "),
    "not UTF-8": (safetensors_file(b'{"\xff": 1}'), "its header is not UTF-8 text"),
    "UTF-16": (safetensors_file(json.dumps(ONE).encode("utf-16"), bytes(8)), "its header is not UTF-8 text"),
    "JSON that is no mapping": (safetensors_file([1, 2]), "its header is [1, 2]; expected a mapping of tensors"),
    "nested": (safetensors_file(b"[" * 100_000), "its header is nested too deeply"),
    "many digits": (safetensors_file(b'{"a": ' + b"9" * 5000 + b"}"), "Exceeds the limit"),
    "a name twice": (
        safetensors_file(b'{"a": {}, "a": {}}'),
        "'a' is described twice in its header",
    ),
    "a key twice": (
        safetensors_file(b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)),
        "'dtype' is described twice in its header",
    ),
    "metadata that is no text": (safetensors_file({"__metadata__": {"x": 1}}), "expected a mapping of texts"),
    "a tensor that is none": (safetensors_file({"a": 3}), "tensor 'a' is 3; expected dtype, shape and data_offsets"),
    "more keys": (safetensors_file({"a": entry(0, 8) | {"x": 1}}, bytes(8)), "expected dtype, shape and data_offsets"),
    "unknown dtype": (safetensors_file({"a": entry(0, 8, dtype="F99")}, bytes(8)), "has dtype 'F99'; expected one of"),
    "dtype that is no text": (
        safetensors_file({"a": entry(0, 8) | {"dtype": ["F32"]}}, bytes(8)),
        "has dtype ['F32']; expected one of",
    ),
    "dtype of another width": (
        safetensors_file({"a": entry(0, 8, dtype="F64")}, bytes(8)),
        "tensor 'a' has 8 bytes; expected 16 for F64 of shape [2]",
    ),
    "half a byte": (
        safetensors_file({"a": entry(0, 1, dtype="F4", shape=[1])}, bytes(1)),
        "tensor 'a' has 1 bytes; expected 4 bits for F4 of shape [1]",
    ),
    "negative size": (safetensors_file({"a": entry(0, 8, shape=[-2, -1])}, bytes(8)), "has shape [-2, -1]; expected"),
    "a size that is true": (safetensors_file({"a": entry(0, 4, shape=[True])}, bytes(4)), "has shape [True]; expected"),
    "a size with a point": (safetensors_file({"a": entry(0, 8, shape=[2.0])}, bytes(8)), "has shape [2.0]; expected"),
    "a size that is NaN": (
        safetensors_file(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', bytes(8)),
        "has shape [nan]; expected",
    ),
    "a size that is infinite": (
        safetensors_file(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, Infinity]}}', bytes(8)),
        "has data_offsets [0, inf]; expected [begin, end]",
    ),
    "a product that overflows": (
        safetensors_file({"a": entry(0, 0, shape=[2**62, 4])}),
        "tensor 'a' has 0 bytes; expected 73786976294838206464 for F32",
    ),
    "a product of very many": (
        safetensors_file({"a": entry(0, 0, shape=[2**62] * 60)}),
        "tensor 'a' has 0 bytes; expected ",
    ),
    "very many sizes": (safetensors_file({"a": entry(0, 4, shape=[1] * 9999)}, bytes(4)), "expected at most 64 whole"),
    "a huge size": (safetensors_file({"a": entry(0, 0, shape=[2**64])}), "whole numbers below 2**63"),
    "negative offsets": (
        safetensors_file({"a": entry(0, 8) | {"data_offsets": [-8, 0]}}, bytes(8)),
        "has data_offsets [-8, 0]; expected [begin, end]",
    ),
    "offsets the wrong way": (
        safetensors_file({"a": entry(0, 8) | {"data_offsets": [8, 0]}}, bytes(8)),
        "has data_offsets [8, 0]; expected [begin, end]",
    ),
    "one offset": (safetensors_file({"a": entry(0, 8) | {"data_offsets": [0]}}, bytes(8)), "expected [begin, end]"),
    "overlap": (
        safetensors_file({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
        "tensor 'b' begins at 4 and overlaps the tensor before it; expected 8",
    ),
    "the same bytes twice": (
        safetensors_file({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)),
        "overlaps the tensor before it; expected 8",
    ),
    "hole": (
        safetensors_file({"a": entry(0, 8), "b": entry(12, 16)}, bytes(16)),
        "tensor 'b' begins at 12 and leaves out bytes before it; expected 8",
    ),
    "hole at the front": (safetensors_file({"a": entry(4, 12)}, bytes(12)), "begins at 4 and leaves out bytes"),
    "offsets beyond the end": (
        safetensors_file({"a": entry(0, 2**40)}, bytes(8)),
        "bytes where its header describes 10995",
    ),
    "truncated data": (safetensors_file(ONE, bytes(7)), "bytes where its header describes"),
    "data that nobody described": (safetensors_file(ONE, bytes(9)), "bytes where its header describes"),
    "no tensors, but data": (safetensors_file({}, bytes(9)), "bytes where its header describes"),
}


def refused(folder: Path, message: str) -> None:
    """By the cheap check and by loading."""
    for load in (loading.check_weights, loading.load_pretrained):
        with pytest.raises(ConfigError) as caught:
            load(folder)
        assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 1000
        assert str(folder) in str(caught.value)


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_lies(kind: str, tmp_path: Path) -> None:
    content, message = HEADERS[kind]
    weights = model_folder(tmp_path) / "model.safetensors"
    weights.write_bytes(content)
    refused(tmp_path, message)
    with pytest.raises(ConfigError, match=f"^{weights} {NOT_WHOLE}"):
        read_header(weights)


def test_what_the_library_accepts_is_accepted(tmp_path: Path) -> None:
    """Odd but right: no tensors, empty ones, scalars, spaces, another order, 16 dtypes."""
    from safetensors import safe_open

    dtypes = [torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn, torch.complex64]
    tensors = {str(dtype): torch.zeros(3, dtype=dtype) for dtype in dtypes}
    files = [
        safetensors_file({}),
        safetensors_file({"a": entry(0, 0, shape=[0, 7]), "b": entry(0, 4, shape=[])}, bytes(4)),
        safetensors_file(json.dumps({"b": entry(8, 16), "a": entry(0, 8)}).encode() + b"   ", bytes(16)),
    ]
    save_file(tensors, tmp_path / "3")
    for number, content in enumerate(files):
        (tmp_path / str(number)).write_bytes(content)
    for number in range(len(files) + 1):
        with safe_open(tmp_path / str(number), framework="pt") as whole:
            assert set(read_header(tmp_path / str(number))) == set(whole.keys())
            for name, tensor in read_header(tmp_path / str(number)).items():
                assert tensor.shape == tuple(whole.get_tensor(name).shape)


def test_what_is_no_file(tmp_path: Path) -> None:
    weights = model_folder(tmp_path) / "model.safetensors"
    weights.mkdir()
    refused(tmp_path, "it is a folder; expected a regular file")
    weights.rmdir()
    os.mkfifo(weights)
    refused(tmp_path, "it is a pipe; expected a regular file")
    weights.unlink()
    for target, what in (("/dev/zero", "it is a device; expected"), ("nowhere", "No such file"), (weights, "symbolic")):
        weights.symlink_to(target)
        refused(tmp_path, what)
        weights.unlink()


# ---- whole models ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama in three files, with a tokenizer."""
    folder = tmp_path_factory.mktemp("saved") / "llama"
    tokenizer = train_bpe(["some text to train on\n"] * 20, 280)
    config = tiny_config("llama")
    config.update({"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1})
    loading.initialise(config, seed=1).save_pretrained(folder, max_shard_size="50KB")
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) >= 3
    return folder


@pytest.fixture
def sharded(saved: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def change_index(folder: Path, change: Any) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


def name_file(name: Any) -> Any:
    return lambda weight_map: weight_map.update({"lm_head.weight": name})


@pytest.mark.parametrize(
    "name",
    [
        *("../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "a\\x.safetensors", "c:x.safetensors", ""),
        *("..", 7, None, ["x.safetensors"], "pytorch_model-00001-of-00001.bin", "x.safetensors\n", "~/x.safetensors"),
    ],
)
def test_an_index_names_plain_safetensors_files(name: Any, sharded: Path, tmp_path: Path) -> None:
    for place in (tmp_path, sharded):
        (place / "x.safetensors").write_bytes(safetensors_file(ONE, bytes(8)))
    change_index(sharded, name_file(name))
    refused(sharded, "expected the name of a .safetensors file beside it")


def test_an_index_that_lies(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    whole = index.read_text()
    first, *_ = sorted(set(json.loads(whole)["weight_map"].values()))

    change_index(sharded, name_file("none.safetensors"))
    refused(sharded, "lacks none.safetensors, which its model.safetensors.index.json names")
    index.write_text(whole)
    change_index(sharded, lambda weight_map: weight_map.update({"extra": first}))
    refused(sharded, f"does not fit its files: it has extra in {first}, and it is in none")
    index.write_text(whole)
    change_index(sharded, lambda weight_map: weight_map.pop("model.norm.weight"))
    refused(sharded, "it has model.norm.weight in none, and it is in model-")
    for content in ([], {}, {"weight_map": None}, {"weight_map": []}, {"weight_map": {}}):
        index.write_text(json.dumps(content))
        refused(sharded, "expected a mapping from weights to files")
    for text, message in (("{", "is damaged"), ("[" * 99_999, "nested too deeply"), ("\0", "is damaged")):
        index.write_text(text)
        refused(sharded, message)
    index.unlink()
    os.mkfifo(index)
    refused(sharded, "it is a pipe")


def test_a_tensor_in_two_files(sharded: Path) -> None:
    one, two, *_ = sorted(sharded.glob("model-*.safetensors"))
    tensors = load_file(two)
    name = next(iter(load_file(one)))
    save_file(tensors | {name: torch.ones(3)}, two, metadata={"format": "pt"})
    refused(sharded, f"{name} is in {one.name} and in {two.name}; expected one of them")


def test_a_damaged_shard_is_named(sharded: Path) -> None:
    last = max(sharded.glob("model-*.safetensors"))
    last.write_bytes(last.read_bytes()[:-1])
    refused(sharded, f"{last} {NOT_WHOLE}")


def test_links_that_lead_out_of_the_folder_are_followed(saved: Path, tmp_path: Path) -> None:
    """As in the hub's cache, where names are links to blobs; shards are named after what the index says."""
    expected = loading.load_pretrained(saved)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(saved.iterdir()):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    for one, other in zip(loading.load_pretrained(snapshot).parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


CACHED = """
import sys, torch
from megatrain.model.loading import load_config, load_pretrained
one, other = load_pretrained(sys.argv[1]), load_pretrained("org/name")
assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
assert load_config("org/name").hidden_size == 32 and other.name_or_path == "org/name"
print("equal")
"""


def test_a_model_of_the_hubs_cache(saved: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / ("a" * 40)
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(saved.iterdir()):
        (repository / "blobs" / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", CACHED, str(saved)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.parametrize("command", ["train", "export", "generate"])
def test_commands_say_it_in_one_line(
    command: str, sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_index(sharded, name_file("\x1b[2J/../x.safetensors"))
    assert cli.main(commands(sharded, tmp_path)[command]) == 2
    error = capsys.readouterr().err
    assert "expected the name of a .safetensors file beside it" in error and error.count("\n") == 1
    assert "\x1b" not in error and "Traceback" not in error
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()


def test_a_strangers_names_do_not_reach_the_terminal_raw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(tmp_path / "a\x1b[2J\u202eb"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert r"a\x1b[2J\u202eb" in error and error.count("\n") == 1 and "\x1b" not in error


def with_entries(saved: Path, folder: Path, **entries: Any) -> Path:
    """A copy of a whole model, with other entries in its configuration."""
    shutil.copytree(saved, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))
    return folder


@pytest.mark.parametrize("command", ["train", "export", "generate"])
@pytest.mark.parametrize("entry", ["vocab_size", "intermediate_size"])
def test_files_that_do_not_fit_are_no_question_of_memory(
    command: str, entry: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_entries(saved, tmp_path / "huge", **{entry: 10**9})
    assert cli.main(commands(folder, tmp_path)[command]) == 2
    error = capsys.readouterr().err
    assert f"{folder} does not fit its config.json, which describes a model of " in error and error.count("\n") == 1


def test_an_engine_compares_files_and_configuration_first(saved: Path, tmp_path: Path) -> None:
    folder = with_entries(saved, tmp_path / "huge", vocab_size=10**9)
    with pytest.raises(ConfigError, match=r"does not fit its config.json, which describes a model of \d\d,"):
        mt.Engine.from_pretrained(folder, device="cpu")


# ---- memory and time -------------------------------------------------------------------------------

BOUNDED = """
import resource, signal, sys, time
from pathlib import Path
from megatrain.errors import ConfigError
from megatrain.memory.limits import peak_resident_bytes
from megatrain.model.loading import check_weights, load_config, load_pretrained
signal.alarm(100)
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (2 << 30),) * 2)
for folder in sys.argv[1:]:
    before, start = peak_resident_bytes(), time.monotonic()
    try:
        load_pretrained(folder)
    except ConfigError as error:
        print(peak_resident_bytes() - before, time.monotonic() - start, str(error)[:200], sep="|")
"""


def bounded(folders: list[Path]) -> list[tuple[int, float, str]]:
    """Peak memory added, seconds and message for each, in one process that may not take 2 GiB."""
    done = subprocess.run([sys.executable, "-c", BOUNDED, *map(str, folders)], capture_output=True, text=True)
    lines = [line.split("|", 2) for line in done.stdout.splitlines()]
    assert len(lines) == len(folders), done.stderr[-2000:]
    return [(int(peak), float(seconds), message) for peak, seconds, message in lines]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_huge_headers_take_neither_memory_nor_time(tmp_path: Path) -> None:
    names = ("sparse", "too long", "all of it", "configuration", "index")
    folders = {name: model_folder(tmp_path / name.replace(" ", "-")) for name in names}
    with (folders["sparse"] / "model.safetensors").open("wb") as stream:  # 1 TiB, of which a block is on disk
        stream.write(safetensors_file(b"", length=1 << 39))
        stream.truncate(1 << 40)
    with (folders["too long"] / "model.safetensors").open("wb") as stream:
        stream.write(safetensors_file(b"", length=MAX_HEADER_BYTES + 1))
        stream.truncate(MAX_HEADER_BYTES << 1)
    many = b'{"a":[' + b"1," * (MAX_HEADER_BYTES // 2 - 20) + b"1]}"
    (folders["all of it"] / "model.safetensors").write_bytes(safetensors_file(many))
    for name, file in (("configuration", "config.json"), ("index", "model.safetensors.index.json")):
        with (folders[name] / file).open("wb") as stream:
            stream.truncate(1 << 40)
    expected = ("expected at most 33554432", "expected at most 33554432", "expected dtype, shape", "more than", "more")
    for (peak, seconds, message), part in zip(bounded(list(folders.values())), expected, strict=True):
        assert part in message
        assert peak < 600 << 20 and seconds < 10, message


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_sizes_that_files_do_not_hold_take_no_memory(saved: Path, tmp_path: Path) -> None:
    """As much as a configuration may ask for and as little too much as is refused; tables that are no weights, too."""
    wrong = [{"vocab_size": 10**9}, {"vocab_size": 4 * 10**7}, {"hidden_size": 10**9}, {"intermediate_size": 10**7}]
    folders = [with_entries(saved, tmp_path / str(number), **entries) for number, entries in enumerate(wrong)]
    for peak, seconds, message in bounded(folders):
        assert " does not fit its config.json, which describes a model of " in message
        assert peak < 300 << 20 and seconds < 10, message
