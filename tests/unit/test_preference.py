"""train.method dpo: pairs, their reference log-probabilities, and a run that goes on and is audited as any other."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
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
from megatrain.train.method import loss_of, with_method
from megatrain.train.reference import REFERENCE_NAME, facts_of, read_reference, score_pairs, to_bytes
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


def test_what_is_read_back_is_what_was_recorded(tmp_path: Path) -> None:
    reference = np.arange(6, dtype=np.float32).reshape(3, 2)
    (tmp_path / REFERENCE_NAME).write_bytes(to_bytes(reference))
    assert np.array_equal(read_reference(tmp_path, facts_of(reference), 3), reference)
    with pytest.raises(ConfigError, match=r"holds numbers of shape \[3, 2\], and data.train makes 4 pairs"):
        read_reference(tmp_path, facts_of(reference), 4)
    with pytest.raises(ConfigError, match="is not what the run has recorded"):
        read_reference(tmp_path, facts_of(reference + 1), 3)
    with pytest.raises(ConfigError, match="is not what the run has recorded"):
        read_reference(tmp_path, {}, 3)
    (tmp_path / REFERENCE_NAME).unlink()
    with pytest.raises(ConfigError, match="which no later ones can tell"):
        read_reference(tmp_path, facts_of(reference), 3)


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
    found = np.load(checkpoint / REFERENCE_NAME)
    (checkpoint / REFERENCE_NAME).write_bytes(to_bytes(found + 1))
    settings = str(finished.parent / "settings.yaml")
    arguments = ["train", settings, "--output", str(tmp_path / "run"), "--resume", str(checkpoint)]
    assert cli.main(arguments) == cli.WRONG
    assert REFERENCE_NAME in capsys.readouterr().err
    assert cli.main([*arguments, "--no-verify"]) == cli.WRONG
    assert "is not what the run has recorded" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_other_settings_of_dpo_are_another_run(finished: Path, tmp_path: Path, capsys: Output) -> None:
    settings, checkpoint = str(finished.parent / "settings.yaml"), str(finished / "checkpoints" / "step-000002")
    arguments = ["train", settings, "--output", str(tmp_path / "run"), "--resume", checkpoint]
    assert cli.main([*arguments, "--train.dpo_beta=0.1"]) == cli.WRONG
    assert "train.dpo_beta is 0.1, was 0.5" in capsys.readouterr().err
