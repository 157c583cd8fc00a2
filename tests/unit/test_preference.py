"""train.method dpo: pairs, their reference log-probabilities, and a run that goes on and is audited as any other."""

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from preference_runs import SETTINGS, train
from test_engine_toys import make_engine
from token_losses import make

from megatrain import cli
from megatrain.config import parse_config
from megatrain.data.batches import StepBatches, batch_sha256
from megatrain.data.examples import Examples, PreferenceExamples
from megatrain.data.pairs import PairRows, pair_rows
from megatrain.errors import ConfigError
from megatrain.losses import DPO, REFERENCE
from megatrain.train.evaluate import evaluate
from megatrain.train.held_out_pairs import first_pairs, pair_set
from megatrain.train.method import loss_of, with_method
from megatrain.train.reference import FACTS, FILES, Scored, read_reference, score, score_pairs, to_bytes
from megatrain.trust.ledger import LEDGER_NAME, read_ledger

Output = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def pairs() -> PreferenceExamples:
    """Ten, with prompts of three tokens, of those that the tiny models know."""
    generator = np.random.default_rng(0)
    prompts = generator.integers(1, 96, (10, 3))
    return PreferenceExamples(*(_answers(generator, prompts) for _ in range(2)))


def _answers(generator: np.random.Generator, prompts: Any) -> Examples:
    answers = [generator.integers(1, 96, 2 + n % 5) for n in generator.permutation(len(prompts))]
    rows = [np.concatenate(both).astype(np.uint16) for both in zip(prompts, answers, strict=True)]
    targets = np.concatenate([np.arange(len(row)) >= 3 for row in rows])
    return Examples(np.concatenate(rows), targets, np.cumsum([0, *map(len, rows)]), 0)


# -- pairs ------------------------------------------------------------------------------------------------------------


def batches(pairs: Any, reference: Any = None, *, shuffle: bool = True) -> StepBatches:
    given = np.arange(20, dtype=np.float32).reshape(10, 2) if reference is None else reference
    return StepBatches(PairRows(pairs, given, shuffle=shuffle, seed=0), micro_batch=2, rows_per_step=4)


def test_both_answers_of_a_pair_follow_each_other(pairs: Any) -> None:
    for batch in batches(pairs, shuffle=False).of_step(1):
        for row, reference in enumerate(batch[REFERENCE].tolist()):
            pair, side = divmod(int(reference), 2)
            examples = (pairs.chosen, pairs.rejected)[side]
            length = examples.lengths[pair]
            assert row % 2 == side
            assert batch["input_ids"][row, :length].tolist() == examples.tokens_of(pair).tolist()
            assert batch["labels"][row, :length].tolist() == examples.labels_of(pair).tolist()
            assert (batch["labels"][row, length:] == -100).all()
            assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (batch["labels"].shape[1] - length)


def test_an_epoch_has_each_pair_once_in_an_order_of_its_own(pairs: Any) -> None:
    seen = [int(n) // 2 for step in range(5) for b in batches(pairs).of_step(step) for n in b[REFERENCE][::2]]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:] and seen[:10] != list(range(10))
    again = batches(pairs).of_step(3)
    assert batch_sha256(again) == batch_sha256(batches(pairs).of_step(3)) != batch_sha256(batches(pairs).of_step(2))


def test_the_batch_hash_covers_rejected_answers_and_the_reference(pairs: Any) -> None:
    before = batch_sha256(batches(pairs).of_step(0))
    other = np.arange(20, dtype=np.float32).reshape(10, 2)
    other[:, 1] += 1
    assert batch_sha256(batches(pairs, other).of_step(0)) != before
    swapped = type(pairs)(pairs.chosen, pairs.chosen)
    assert batch_sha256(batches(swapped).of_step(0)) != before


# -- the reference ----------------------------------------------------------------------------------------------------


def test_scores_are_sums_over_targets_whatever_passes_together(pairs: Any) -> None:
    engine = make_engine(make("llama").train(), device="cpu")
    found = score_pairs(engine, pairs, 3)
    assert engine.model.training
    for pair in range(len(pairs)):
        batch = pair_rows(pairs, [pair])
        alone = engine.log_probabilities(batch).sum(-1)
        np.testing.assert_allclose(found[pair], alone.numpy(), rtol=1e-5)
        assert alone[0] != alone[1]
    engine.close()


@pytest.mark.parametrize("key", ["data.train", "data.eval"])
def test_what_is_read_back_is_what_was_recorded(key: str, pairs: PreferenceExamples, tmp_path: Path) -> None:
    reference = np.arange(2 * len(pairs), dtype=np.float32).reshape(-1, 2)
    scored = Scored(key, pairs, reference)
    path = tmp_path / FILES[key]
    for name, content in scored.files.items():
        (tmp_path / name).write_bytes(content)
    assert np.array_equal(read_reference(tmp_path, key, scored.facts, pairs), reference)
    assert np.array_equal(score(None, key, pairs, 1, tmp_path, scored.facts).reference, reference)  # type: ignore[arg-type]
    fewer = first_pairs(pairs, int(pairs.chosen.lengths[0] + pairs.rejected.lengths[0]))
    assert len(fewer) == 1
    with pytest.raises(ConfigError, match=rf"is of other pairs than {key} makes now"):
        read_reference(tmp_path, key, scored.facts, fewer)
    path.write_bytes(to_bytes(reference[:1]))
    with pytest.raises(ConfigError, match=r"holds numbers of shape \[1, 2\], and data\.\w+ makes \d+ pairs"):
        read_reference(tmp_path, key, {FACTS[key]: scored.facts[FACTS[key]] | {"sha256": sha256(path)}}, pairs)
    with pytest.raises(ConfigError, match="is not what the run has recorded"):
        read_reference(tmp_path, key, scored.facts, pairs)
    with pytest.raises(ConfigError, match="is not what the run has recorded"):
        read_reference(tmp_path, key, {}, pairs)
    path.unlink()
    with pytest.raises(ConfigError, match="which no later ones can tell"):
        read_reference(tmp_path, key, scored.facts, pairs)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- settings ---------------------------------------------------------------------------------------------------------


def config(kind: str | None = None, **changes: Any) -> Any:
    settings = {section: dict(keys) for section, keys in SETTINGS.items()}
    settings["model"]["tokenizer"], settings["data"]["train"] = "somewhere", "pairs.jsonl"
    for name, value in changes.items():
        section, _, key = name.partition("__")
        settings[section][key] = value
    parsed = parse_config(settings)
    return parsed if kind is None else with_method(parsed, kind)


def test_auto_is_what_the_data_say() -> None:
    assert [config(kind).train.method for kind in ("text", "chat", "preference")] == ["pretrain", "sft", "dpo"]
    assert loss_of(config("text")) is None and loss_of(config("chat")) is None
    changes = {"train__dpo_beta": 0.2, "train__dpo_label_smoothing": 0.1}
    assert loss_of(config("preference", **changes)) == DPO(0.2, 0.1)
    assert loss_of(config("preference", train__dpo_loss="ipo")) == DPO(0.5, kind="ipo")
    dpo = config("preference", train__tokens_per_step=None)
    assert (dpo.sequences_together, dpo.tokens_per_step) == (4, 96)  # two pairs


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("text", {"train__method": "dpo"}, "train.method: dpo is wrong for data.train, whose rows are of kind text"),
        ("chat", {"train__method": "pretrain"}, "of kind chat; expected sft or auto"),
        ("preference", {"train__method": "sft"}, "expected dpo or auto"),
        ("preference", {"train__tokens_per_step": 48}, r"a multiple of 2 \* engine.micro_batch \* data.seq_len = 96"),
        (None, {"train__dpo_beta": 0}, "train.dpo_beta: 0 is wrong"),
        (None, {"train__dpo_label_smoothing": 0.5}, "train.dpo_label_smoothing: 0.5 is wrong"),
        (None, {"train__dpo_loss": "hinge"}, "train.dpo_loss: 'hinge' is wrong; expected one of sigmoid, ipo"),
        (None, {"train__dpo_loss": "ipo", "train__dpo_label_smoothing": 0.1}, "is not for dpo_loss ipo"),
    ],
)
def test_wrong_settings(kind: str | None, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(kind, **changes)


# -- measuring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [DPO(0.3, 0.1), DPO(0.5, kind="ipo")], ids=["sigmoid", "ipo"])
@pytest.mark.parametrize("device", ["cpu", "lagged"])
def test_held_out_pairs_are_measured_by_the_loss_that_is_trained_on(device: str, loss: DPO, pairs: Any) -> None:
    """Three at a time, against one at a time in plain PyTorch."""
    reference = -np.arange(20, dtype=np.float32).reshape(10, 2)
    model, losses, right = make("llama").eval(), [], 0
    for pair in range(len(pairs)):
        batch = pair_rows(pairs, [pair])
        with torch.no_grad():
            logits = model(**{name: batch[name] for name in batch if name != "labels"}).logits.log_softmax(-1)
        labels, mask = batch["labels"][:, 1:], batch["labels"][:, 1:] != -100
        scores = logits[:, :-1].gather(-1, labels.clamp(min=0)[..., None])[..., 0] * mask
        gained = scores.sum(-1) - torch.from_numpy(reference[pair])
        means, difference = gained / mask.sum(-1), loss.beta * (gained[0] - gained[1])
        sure = -torch.nn.functional.logsigmoid(difference)
        smoothed = (1 - loss.label_smoothing) * sure + loss.label_smoothing * (sure + difference)
        losses.append(smoothed if loss.kind == "sigmoid" else (means[0] - means[1] - 1 / (2 * loss.beta)) ** 2)
        right += int(gained[0] > gained[1])
    with make_engine(make("llama").eval(), device=device) as engine:
        found = evaluate(engine, pair_set(pairs, reference, loss, 3))
    assert found is not None and found.pairs == 10 and found.perplexity is None and found.bits_per_byte is None
    assert found.loss == pytest.approx(float(sum(losses)) / 10, rel=1e-5)
    assert found.values["rewards/accuracies"] == pytest.approx(right / 10)


def test_losses_of_other_pairs_or_settings_are_not_compared(pairs: Any) -> None:
    reference = np.zeros((10, 2), np.float32)
    sets = [
        pair_set(these, reference, loss, 2) for these in (pairs, first_pairs(pairs, 30)) for loss in (DPO(), DPO(1))
    ]
    assert len({one.sha256 for one in sets}) == 4
    assert pair_set(pairs, reference, DPO(), 3).sha256 == sets[0].sha256


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps, checkpoints after steps 2 and 4."""
    return train(tmp_path_factory.mktemp("runs"), "run")


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_to_prefer(finished: Path) -> None:
    lines = lines_of(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-2)  # bf16; padding is other than when it was scored
    assert lines[-1]["loss"] < 0.3 and lines[-1]["rewards/accuracies"] == 1
    for line in lines:
        difference = line["rewards/chosen"] - line["rewards/rejected"]
        assert line["rewards/margins"] == pytest.approx(difference, abs=1e-5)
    assert yaml.safe_load((finished / "config.yaml").read_text())["train"]["method"] == "dpo"
    start = read_ledger(finished / LEDGER_NAME).entries[0]
    assert start["facts"]["reference"]["pairs"] == 10


def evaluations_of(run: Path) -> list[dict[str, Any]]:
    return [line["eval"] | {"step": line["step"]} for line in lines_of(run) if "eval" in line]


def test_what_is_held_out_is_measured_as_it_is_trained(tmp_path: Path, capsys: Output) -> None:
    """On the pairs of training itself, which can only become better; also where the run goes on, whose weights can tell
    nothing of the first ones."""
    held_out = [
        "--data.eval",
        str(tmp_path / "pairs.jsonl"),
        "--eval.every",
        "2",
        "--eval.at_start",
        "true",
        "--eval.prompts",
        "1",
    ]
    run = train(tmp_path, "run", *held_out)
    said = capsys.readouterr()
    assert "rewards/accuracies 1  rewards/margins" in said.out and "perplexity" not in said.out + said.err
    found = evaluations_of(run)
    assert [one["step"] for one in found] == [0, 2, 4] and {one["pairs"] for one in found} == {10}
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-2) and "perplexity" not in found[0]
    assert found[0]["loss"] > found[1]["loss"] > found[2]["loss"] and found[2]["rewards/accuracies"] == 1
    assert (run / "checkpoints" / "best.txt").read_text() == "step-000004\n"
    checkpoint = run / "checkpoints" / "step-000002"
    again = train(tmp_path, "again", *held_out, "--resume", str(checkpoint))
    assert evaluations_of(again) == found[2:]
    assert (again / "model" / "model.safetensors").read_bytes() == (run / "model" / "model.safetensors").read_bytes()

    settings = str(tmp_path / "settings.yaml")
    arguments = ["train", settings, "--output", str(tmp_path / "new"), "--resume", str(checkpoint), *held_out]
    assert cli.main([*arguments, "--eval.max_tokens", "10"]) == cli.WRONG
    assert "reference-eval.npy' is of other pairs than data.eval makes now" in capsys.readouterr().err


def test_only_pairs_can_be_held_out(tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "text.txt").write_text("not a pair")
    with pytest.raises(AssertionError):
        train(tmp_path, "run", "--data.eval", str(tmp_path / "text.txt"))
    assert "data.eval: has rows of kind text, which the loss of train.method dpo" in capsys.readouterr().err


def test_it_goes_on_from_a_checkpoint_to_the_last_bit(finished: Path) -> None:
    again = train(finished.parent, "again", "--resume", str(finished / "checkpoints" / "step-000002"))
    exact = ("step", "loss", "grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen")
    found = [[[line[name] for name in exact] for line in lines_of(run)] for run in (again, finished)]
    assert found[0] == found[1][2:]
    for path in (finished / "model").iterdir():
        assert (again / "model" / path.name).read_bytes() == path.read_bytes(), path.name
    hashes = [{e["step"]: e["batch_sha256"] for e in read_ledger(run / LEDGER_NAME).entries if e.kind == "step"}
              for run in (again, finished)]  # fmt: skip
    assert hashes[0] == {step: sha for step, sha in hashes[1].items() if step > 2}


def test_it_is_computed_again_from_its_start_and_from_a_checkpoint(finished: Path, capsys: Output) -> None:
    assert cli.main(["audit", str(finished)]) == cli.DONE
    assert "steps 1 to 4 come from the recorded data, code and settings" in capsys.readouterr().out
    assert cli.main(["audit", str(finished), "--steps", "4:4"]) == cli.DONE
    assert "again from step-000002" in capsys.readouterr().err


def test_a_reference_that_was_changed_is_refused(finished: Path, tmp_path: Path, capsys: Output) -> None:
    """By the checkpoint's manifest, and without looking at that by what it says of the reference."""
    checkpoint = shutil.copytree(finished / "checkpoints" / "step-000002", tmp_path / "step-000002")
    found = np.load(checkpoint / FILES["data.train"])
    (checkpoint / FILES["data.train"]).write_bytes(to_bytes(found + 1))
    settings = str(finished.parent / "settings.yaml")
    arguments = ["train", settings, "--output", str(tmp_path / "run"), "--resume", str(checkpoint)]
    assert cli.main(arguments) == cli.WRONG
    assert FILES["data.train"] in capsys.readouterr().err
    assert cli.main([*arguments, "--no-verify"]) == cli.WRONG
    assert "is not what the run has recorded" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_other_settings_of_dpo_are_another_run(finished: Path, tmp_path: Path, capsys: Output) -> None:
    settings, checkpoint = str(finished.parent / "settings.yaml"), str(finished / "checkpoints" / "step-000002")
    arguments = ["train", settings, "--output", str(tmp_path / "run"), "--resume", checkpoint]
    assert cli.main([*arguments, "--train.dpo_beta=0.1"]) == cli.WRONG
    assert "train.dpo_beta is 0.1, was 0.5" in capsys.readouterr().err
