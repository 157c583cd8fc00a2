"""Configurations of strangers: no code, no other files, and no work that their size does not warrant."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hostile_files import LLAMA, model_folder
from test_no_pickle import commands

from megatrain import cli
from megatrain.data.tokenizer import load_tokenizer
from megatrain.errors import ConfigError
from megatrain.model import loading


def nested(depth: int) -> str:
    return '{"model_type": "llama", "x": ' + '{"x": ' * depth + "1" + "}" * (depth + 1)


TEXTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not JSON: "),
    "a list": (b"[1, 2]", "is [1, 2]; expected a mapping with an entry model_type"),
    "a text": (b'"llama"', "is 'llama'; expected a mapping"),
    "nothing": (b"null", "is None; expected a mapping"),
    "not UTF-8": (b'{"model_type": "\xff"}', "is not UTF-8 text"),
    "zero bytes": (bytes(100), "is not JSON"),
    "nested beyond Python": (nested(100_000).encode(), "nested too deeply"),
    "nested": (nested(200).encode(), ": x.x.x: nested more than 32 levels deep"),
    "many digits": (b'{"model_type": "llama", "hidden_size": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
}

ENTRIES: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"num_hidden_layers": 10**12}, "num_hidden_layers: 1000000000000 is wrong; expected at most 10000"),
    "layers elsewhere": ({"text_config": {"num_layers": 10**6}}, "text_config.num_layers: 1000000 is wrong"),
    "labels": ({"num_labels": 10**12}, "num_labels: 1000000000000 is wrong; expected at most 1000000 labels"),
    "experts": ({"model_type": "mixtral", "num_local_experts": 10**9}, "num_local_experts: 1000000000 is wrong"),
    "beyond 64 bits": ({"hidden_size": 2**63}, "hidden_size: 9223372036854775808 is wrong; expected a whole number"),
    "NaN": ({"rms_norm_eps": float("nan")}, "rms_norm_eps: NaN is wrong; expected a number"),
    "NaN in a list": ({"x": [1, {"y": float("nan")}]}, "x.1.y: NaN is wrong"),
    "no type": ({"model_type": None}, "needs an entry model_type"),
    "unknown code": ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.C"}}, "code from a model repository is"),
    "nested code": ({"text_config": {"auto_map": {"AutoModel": "org/evil--m.M"}}}, "text_config.auto_map: code from a"),
    "kernels": ({"attn_implementation": "org/kernel"}, "attn_implementation: 'org/kernel' is code from a hub"),
    "their kernels": ({"_attn_implementation": "org/kernel@v1:f"}, "is code from a hub"),
    "kernels by part": ({"attn_implementation": {"text_config": "paged|org/kernel"}}, "is code from a hub"),
    "experts' kernels": ({"x": {"experts_implementation": "org/kernel"}}, "is code from a hub"),
    "other files": ({"configuration_files": ["config.4.0.json"]}, "configuration_files: other configurations are not"),
}


def refused(folder: Path, message: str) -> None:
    for load in (loading.load_config, loading.load_pretrained):
        with pytest.raises(ConfigError) as caught:
            load(folder)
        text = str(caught.value)
        assert message in text and f"{folder}/config.json" in text and "\n" not in text and len(text) < 1000


@pytest.mark.parametrize("kind", TEXTS)
def test_a_file_that_is_no_configuration(kind: str, tmp_path: Path) -> None:
    content, message = TEXTS[kind]
    (tmp_path / "config.json").write_bytes(content)
    refused(tmp_path, message)


@pytest.mark.parametrize("kind", ENTRIES)
def test_an_entry_that_must_not_be_acted_upon(kind: str, tmp_path: Path) -> None:
    entries, message = ENTRIES[kind]
    refused(model_folder(tmp_path, **entries), message)
    # the same from a file of its own, and from a tokenizer's folder, whose configuration transformers builds, too
    with pytest.raises(ConfigError) as caught:
        loading.load_config(tmp_path / "config.json")
    assert message in str(caught.value)
    if "model_type" not in entries:
        with pytest.raises(ConfigError) as caught:
            load_tokenizer(str(tmp_path))
        assert message in str(caught.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.mkdir()
    refused(tmp_path, "it is a folder; expected a regular file")
    path.rmdir()
    os.mkfifo(path)
    refused(tmp_path, "it is a pipe; expected a regular file")
    path.unlink()
    for target, what in (("/dev/zero", "it is a device; expected"), ("nowhere", "No such file")):
        path.symlink_to(target)
        refused(tmp_path, what)
        path.unlink()


def test_infinity_is_a_number_that_some_models_use(tmp_path: Path) -> None:
    mamba = {"model_type": "mamba2", "num_hidden_layers": 1, "time_step_limit": [0.0, float("inf")]}
    (tmp_path / "config.json").write_text(json.dumps(mamba))
    assert loading.load_config(tmp_path).time_step_limit[1] == float("inf")
    with pytest.raises(ConfigError):
        loading.load_config(model_folder(tmp_path, hidden_size=float("inf")))


def test_code_of_a_type_that_transformers_knows_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Many models of the hub carry the code from before transformers knew them."""
    folder = model_folder(tmp_path / "model", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    config = loading.load_config(folder)
    loading.load_config(folder)
    assert caplog.text.count("comes with code of its own (auto_map), which is not run") == 1
    assert type(config).__module__.startswith("transformers.") and not hasattr(config, "auto_map")
    assert type(loading.build_on_meta(config)).__module__.startswith("transformers.")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("command", ["train", "plan", "export", "generate"])
@pytest.mark.parametrize("kind", ["layers", "unknown code", "kernels"])
def test_commands_say_it_in_one_line(
    command: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries, message = ENTRIES[kind]
    folder = model_folder(tmp_path / "model", **entries)
    assert cli.main(commands(folder, tmp_path)[command]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error


BOUNDED = """
import json, resource, signal, sys, time
from pathlib import Path
from megatrain.errors import ConfigError
from megatrain.model.loading import build_on_meta, load_config
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (1 << 30),) * 2)
for entries in json.loads(sys.argv[1]):
    signal.alarm(20)
    start = time.monotonic()
    try:
        build_on_meta(load_config(entries))
    except ConfigError:
        pass
    print(time.monotonic() - start, flush=True)
"""
NUMBERS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings", "head_dim"),
)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_huge_numbers_take_neither_memory_nor_time() -> None:
    """In a process that may not take a gigabyte more; an end by memory or by the alarm would be no ConfigError."""
    tried = [LLAMA | {name: number} for name in NUMBERS for number in (10**12, 2**62)]
    tried += [{"model_type": "gpt2", name: 10**12} for name in ("n_layer", "n_positions", "n_embd", "n_head")]
    tried += [{"model_type": "mixtral", "num_local_experts": 10**12}, LLAMA | {"num_labels": 10**12}]
    done = subprocess.run([sys.executable, "-c", BOUNDED, json.dumps(tried)], capture_output=True, text=True)
    seconds = [float(line) for line in done.stdout.split()]
    assert len(seconds) == len(tried), (tried[len(seconds)], done.stderr[-2000:])
    assert max(seconds) < 10
