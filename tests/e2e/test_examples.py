"""Every file in examples/, at toy size: a random model of the same family, a few rows, two steps."""

import json
import math
import re
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_vision import save_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from megatrain import cli
from megatrain.config import load_config
from megatrain.data.tokenizer import train_bpe
from megatrain.model.loading import load_pretrained
from megatrain.train import planning

pytestmark = pytest.mark.xdist_group("examples")

EXAMPLES = Path(__file__).parents[2] / "examples"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(n: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"what is {n} + {n}?"}, {"role": "assistant", "content": f"it is {2 * n}."}]


def preference(n: int) -> dict[str, Any]:
    question, answer = chat(n)
    return {"prompt": [question], "chosen": [answer], "rejected": [{**answer, "content": f"{n}, I think."}]}


def picture(n: int) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nwhat is in this picture?"}, {"from": "gpt", "value": "it is red."}]
    return {"conversations": turns, "image": f"photos/{n % 2}.png"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and data by the names that the examples have for them."""
    root = tmp_path_factory.mktemp("examples")
    rows: dict[str, Callable[[int], Any]] = {
        "books": lambda n: {"text": f"the book of {n}. " * (20 + n)},
        "chats": lambda n: {"messages": chat(n)},
        "held-out-chats": lambda n: {"messages": chat(n + 50)},
        "preferences": preference,
        "llava": picture,
    }
    for name, row in rows.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row(n)) + "\n" for n in range(8)))
    for name, numbers in {"corpus": range(80), "held-out": range(80, 90)}.items():
        (root / name).mkdir()
        (root / name / "a.txt").write_text("".join(f"{n} and {n} are {2 * n}.\n" for n in numbers))
    (root / "photos").mkdir()
    for n, color in enumerate(((255, 0, 0), (0, 0, 255))):
        Image.new("RGB", (20, 16), color).save(root / f"photos/{n}.png")
    save_qwen3(root / "qwen3", (root / "chats.jsonl").read_text())
    save_tiny("llava_next", root / "llava_next")
    return root


def save_qwen3(folder: Path, text: str) -> None:
    tokenizer = train_bpe([text] * 4, 320)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@pytest.fixture
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with all the data that the examples name."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    # what the machine can do takes seconds to measure, and changes nothing in a run
    monkeypatch.setattr(planning, "measured_here", lambda _c, _w, device: (planning.describe_machine(device), None))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


SHORT = {"data.seq_len": "64", "train.tokens_per_step": "256", "train.epochs": "null", "train.steps": "2"}
SHORT |= {"schedule.warmup_steps": "1", "engine.threads": "1"}
RUNS: dict[str, dict[str, str]] = {
    "continued-pretraining": {"eval.max_new_tokens": "4"},
    "chat-sft": {"eval.max_new_tokens": "4", "eval.every": "1", "checkpoint.every": "1"},
    "dpo": {},
    "long-context": {"data.seq_len": "256", "engine.sequence_chunk_tokens": "32"},
    "vision-language": {"data.seq_len": "256", "train.tokens_per_step": "1024"},
}


def arguments_of(name: str) -> list[str]:
    """The command line that makes an example a toy; `model.path` is the one thing that must not be a hub id."""
    overrides = {"model.path": "llava_next" if name == "vision-language" else "qwen3", **SHORT, **RUNS[name]}
    return [str(EXAMPLES / f"{name}.yaml"), *(f"--{key}={value}" for key, value in overrides.items())]


def metrics_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def train(name: str) -> Path:
    """The folder of the example's run, which has gone well, as has a look at its data."""
    assert cli.main(["data", *arguments_of(name), "--examples", "1"]) == cli.DONE
    assert cli.main(["train", *arguments_of(name)]) == cli.DONE
    run = Path("runs") / name
    assert [line["step"] for line in metrics_of(run)] == [1, 2]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in metrics_of(run))
    assert (run / "report.html").stat().st_size > 0 and (run / "model" / "model.safetensors").exists()
    return run


def test_all_are_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == set(RUNS)
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"own_loop.py", "trl_sft.py"}
    told = (EXAMPLES / "README.md").read_text()
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".yaml", ".py")}
    assert set(re.findall(r"\]\(([\w.-]+\.(?:yaml|py))\)", told)) == files


@pytest.mark.parametrize("name", RUNS)
def test_every_key_is_known(name: str) -> None:
    """As it is, with its hub id."""
    config = load_config(EXAMPLES / f"{name}.yaml", [])
    assert config.model.path is not None and not Path(config.model.path).exists()
    assert config.output == f"runs/{name}"


def test_continued_pretraining(here: Path, folder: Path) -> None:
    run = train("continued-pretraining")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval" in line] == [0, 2]
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 and all("80 and" in sample["prompt"] for sample in samples[::2])


def test_chat_sft(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train("chat-sft")
    assert "8 examples, best-fit packed into" in capsys.readouterr().err
    assert (run / "checkpoints" / "best.txt").exists()
    assert (run / "model" / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    answers = sum(line["target_tokens"] for line in metrics_of(run))
    assert 0 < answers < 2 * 256 / 2  # questions are not learned


def test_dpo(here: Path) -> None:
    run = train("dpo")
    first, last = metrics_of(run)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"} <= set(last)
    assert math.isfinite(last["rewards/margins"])


def test_long_context(here: Path) -> None:
    run = train("long-context")
    tokens = [line["target_tokens"] for line in metrics_of(run)]
    assert max(tokens) <= 255 and min(tokens) > 64  # one document to a row, of several chunks


def test_vision_language(here: Path, folder: Path) -> None:
    run = train("vision-language")
    before, after = (dict(load_pretrained(path).named_parameters()) for path in (folder / "llava_next", run / "model"))
    moved = {name for name, parameter in before.items() if not torch.equal(parameter, after[name].to(parameter.dtype))}
    assert moved and not any("vision_tower" in name for name in moved)
    assert any("multi_modal_projector" in name for name in moved)
    assert (run / "model" / "processor_config.json").exists()


# -- in Python ----------------------------------------------------------------------------------------------------


def run_script(script: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def test_trl_sft(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", here / "cache")
    small = ["--steps", "2", "--micro-batch", "2", "--accumulate", "2", "--max-length", "64", "--save-steps", "1"]
    run_script("trl_sft.py", "--model", "qwen3", "--data", "chats.jsonl", *small, monkeypatch=monkeypatch)
    run = here / "runs" / "trl-sft"
    state = json.loads((run / "checkpoint-2" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    before, after = (load_pretrained(path).state_dict() for path in (here / "qwen3", run / "model"))
    assert any(not torch.equal(before[name], after[name].to(before[name].dtype)) for name in before)


def test_own_loop_goes_on_as_it_would_have(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> list[float]:
        small = ["--steps", "2", "--rows", "4", "--micro-batch", "2", "--seq-len", "64", "--save-every", "1"]
        run_script("own_loop.py", "--model", "qwen3", "--data", "books.jsonl", *small, monkeypatch=monkeypatch)
        return [float(loss) for loss in re.findall(r"loss (\S+)", capsys.readouterr().out)]

    losses = run()
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    output = here / "runs" / "own-loop"
    model = (output / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(output / "model")
    shutil.rmtree(output / "step-000002")
    assert run() == losses[1:]
    assert (output / "model" / "model.safetensors").read_bytes() == model
