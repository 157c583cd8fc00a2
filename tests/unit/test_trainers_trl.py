"""TRL's trainers on a streamed model: the weights of the same trainer on a resident one."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from tokenizers import Tokenizer, models, pre_tokenizers
from trainer_runs import SETTINGS, cheap_collections, largest_difference, logged, make_engine, tiny_llama, train_both
from transformers import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
    clone_chat_template,
)
from trl.trainer import grpo_trainer

import megatrain as mt
from megatrain.engine.registry import engine_of
from megatrain.trainers import direct_head

__all__ = ["cheap_collections"]
pytestmark = pytest.mark.xdist_group("trainers")
disable_progress_bar()

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<assistant> {% generation %}{{ m.content }} <eos> "
    "{% endgeneration %}{% else %}<user> {{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<user>", "<assistant>", "<unk>", *(f"w{n}" for n in range(60))]
    plain = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=plain, chat_template=TEMPLATE, **special)


def words(seed: int, count: int) -> str:
    return " ".join(f"w{(7 * seed + n * n) % 60}" for n in range(count))


def chats() -> Dataset:
    turns = [(words(n, 3 + n % 4), words(n + 1, 2 + n % 5)) for n in range(8)]
    roles = ("user", "assistant")
    return Dataset.from_list(
        [{"messages": [{"role": r, "content": t} for r, t in zip(roles, turn, strict=True)]} for turn in turns]
    )


def preferences() -> Dataset:
    return Dataset.from_list(
        [{"prompt": words(n, 3), "chosen": " " + words(n + 1, 3), "rejected": " " + words(n + 2, 4)} for n in range(4)]
    )


def make(config: type[Any], data: Dataset, tokenizer: Any, settings: dict[str, Any], **given: Any) -> Callable:
    def trainer(cls: type[Trainer], model: Any, folder: Path) -> Trainer:
        args = config(output_dir=str(folder), **{**SETTINGS, "max_steps": 2, "bf16": False, **settings})
        extra = {name: value() if callable(value) and name == "ref_model" else value for name, value in given.items()}
        return cls(model=model, args=args, train_dataset=data, processing_class=tokenizer, **extra)

    return trainer


@pytest.mark.parametrize(
    ("device", "tied", "settings"),
    [
        ("cpu", False, {"assistant_only_loss": True, "packing": True, "max_length": 16}),
        ("lagged", True, {"assistant_only_loss": True, "bf16": True, "max_grad_norm": 0.5}),
    ],
    ids=["assistant turns, packed", "tied weights, autocast, clipping"],
)
def test_sft(device: str, tied: bool, settings: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    """To the last bits: attention goes over packed documents one by one, not over a row with a mask; where gradients
    are clipped, the factor differs in them; where a weight has two uses and two micro-batches, the order of sums."""
    trainer = make(SFTConfig, chats(), tokenizer, settings)
    resident, streamed = train_both(tmp_path, tiny_llama(tied), trainer, SFTTrainer, device)
    assert largest_difference(resident.model, streamed.model) <= 1e-6
    assert largest_difference(streamed.model, tiny_llama(tied)) > 5e-3
    for name in ("loss", "mean_token_accuracy", "entropy"):
        assert logged(streamed, name) == pytest.approx(logged(resident, name), rel=1e-5)


def test_dpo(tokenizer: Any, tmp_path: Path) -> None:
    """Where the host computes, the reference model stays what it is."""
    trainer = make(DPOConfig, preferences(), tokenizer, {}, ref_model=tiny_llama)
    resident, streamed = train_both(tmp_path, tiny_llama(), trainer, DPOTrainer)
    assert largest_difference(resident.model, streamed.model) == 0.0
    assert logged(streamed, "rewards/margins") == logged(resident, "rewards/margins")
    assert streamed._frozen == []


class LooksAtUpdates(TrainerCallback):
    """Whether anything was still to be updated when callbacks at the end of a step were called."""

    def __init__(self) -> None:
        self.unseen: list[bool] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        engine = engine_of(model)
        if engine is not None:
            self.unseen.append(engine.updates.unseen)


@pytest.mark.parametrize("follows", [True, False])
def test_dpo_with_a_streamed_reference(follows: bool, tokenizer: Any, tmp_path: Path) -> None:
    """On a device of its own. One that follows the model reads its weights where they are, past the engine."""
    look = LooksAtUpdates()
    settings = {"sync_ref_model": follows, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
    given = {"ref_model": tiny_llama, "callbacks": [look]}
    trainer = make(DPOConfig, preferences(), tokenizer, settings, **given)
    resident, streamed = train_both(tmp_path, tiny_llama(), trainer, DPOTrainer, "lagged")
    assert largest_difference(resident.model, streamed.model) == 0.0
    assert largest_difference(resident.ref_model, streamed.ref_model) == 0.0
    assert (largest_difference(streamed.ref_model, tiny_llama()) > 1e-3) == follows
    assert [engine.model for engine in streamed._frozen] == [streamed.ref_model]
    assert look.unseen == 2 * [not follows]


def test_reward(tokenizer: Any, tmp_path: Path) -> None:
    def model() -> Any:
        return tiny_llama(cls=LlamaForSequenceClassification, num_labels=1)

    trainer = make(RewardConfig, preferences(), tokenizer, {})
    resident, streamed = train_both(tmp_path, model(), trainer, RewardTrainer, "lagged")
    assert largest_difference(resident.model, streamed.model) == 0.0
    assert largest_difference(streamed.model, model()) > 5e-3


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(completion.split()))) for completion in completions]


def test_grpo(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Generation runs through the streamed model; TRL loads the reference model by itself."""
    tiny_llama().save_pretrained(tmp_path / "model")
    load, asked = grpo_trainer.create_model_from_path, []
    monkeypatch.setattr(
        grpo_trainer, "create_model_from_path", lambda *a, **k: asked.append(k.get("device_map")) or load(*a, **k)
    )
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    settings = {"num_generations": 2, "max_completion_length": 3, "beta": 0.1}
    prompts = preferences().select_columns(["prompt"])
    trainer = make(GRPOConfig, prompts, tokenizer, settings, reward_funcs=reward)
    resident, streamed = train_both(tmp_path, model, trainer, GRPOTrainer, "lagged")
    assert largest_difference(resident.model, streamed.model) == 0.0
    assert largest_difference(streamed.model, tiny_llama()) > 5e-3
    assert logged(streamed, "reward") == logged(resident, "reward")
    assert [engine.model for engine in streamed._frozen] == [streamed.ref_model]
    assert asked == [None, "cpu"]  # and not onto the device, as a whole
    assert streamed.args.model_init_kwargs is None
    assert "model_init_kwargs" not in caplog.text  # which the user has not given


@pytest.mark.parametrize("given", [None, {"dtype": "float32"}])
def test_what_trl_is_told_for_its_references_is_gone_afterwards(
    given: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(tiny_llama(), "lagged")
    cls = type("Streamed", (mt.StreamedTrainerMixin, SFTTrainer), {})
    trainer = make(SFTConfig, chats(), tokenizer, {"model_init_kwargs": given})(cls, engine.model, tmp_path)
    assert trainer.args.model_init_kwargs == given
    assert ("You passed `model_init_kwargs`" in caplog.text) == (given is not None)  # as without the mixin
    engine.close()


def test_a_template_that_brings_tokens_has_to_come_before_the_engine(tokenizer: Any, tmp_path: Path) -> None:
    richer = copy.deepcopy(tokenizer)
    richer.add_tokens([f"<{n}>" for n in range(40)])  # more than the model has room for
    richer.save_pretrained(tmp_path / "richer")
    engine = make_engine(tiny_llama())
    cls = type("Streamed", (mt.StreamedTrainerMixin, SFTTrainer), {})
    trainer = make(SFTConfig, chats(), copy.deepcopy(tokenizer), {"chat_template_path": str(tmp_path / "richer")})
    with pytest.raises(mt.errors.UnsupportedModelError, match=r"chat_template_path .*clone_chat_template"):
        trainer(cls, engine.model, tmp_path)
    engine.close()
    model, own, _ = clone_chat_template(tiny_llama(), copy.deepcopy(tokenizer), str(tmp_path / "richer"))
    trainer = make(SFTConfig, chats(), own, {"max_steps": 1})
    with make_engine(model) as engine:
        trainer(cls, engine.model, tmp_path).train()


def test_without_a_head_of_its_own_the_fused_loss_finds_none(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `show_weights` is for: on a device of its own, the head's weights are nowhere else during a forward."""
    monkeypatch.setattr(mt.Engine, "show_weights", lambda *_: None)
    engine = make_engine(tiny_llama(), "lagged")
    cls = type("Streamed", (mt.StreamedTrainerMixin, SFTTrainer), {})
    trainer = make(SFTConfig, chats(), tokenizer, {})(cls, engine.model, tmp_path)
    with pytest.raises(mt.errors.UnsupportedModelError, match=r"lm_head.weight is read outside"):
        trainer.train()


def test_a_model_goes_from_one_trainer_to_the_next(tokenizer: Any, tmp_path: Path) -> None:
    """SFT and then DPO, against what SFT has made: TRL wraps its own forward a second time."""
    model = tiny_llama()
    engine = make_engine(copy.deepcopy(model), "lagged")
    for cls, own in ((SFTTrainer, model), (type("S", (mt.StreamedTrainerMixin, SFTTrainer), {}), engine.model)):
        make(SFTConfig, chats(), tokenizer, {"max_steps": 1})(cls, own, tmp_path).train()
    trainer = make(DPOConfig, preferences(), tokenizer, {"max_steps": 1, "precompute_ref_log_probs": True})
    for cls, own in ((DPOTrainer, model), (type("D", (mt.StreamedTrainerMixin, DPOTrainer), {}), engine.model)):
        trainer(cls, own, tmp_path).train()
    engine.flush()
    assert isinstance(engine.model.__dict__["forward"], direct_head.DirectHead)
    assert largest_difference(model, engine.model) == 0.0
    ids = torch.arange(6).view(1, 6)
    with torch.no_grad():
        expected = tiny_llama()
        expected.load_state_dict(model.state_dict())
        assert torch.equal(engine.model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("name", ["activation_offloading", "use_vllm", "cast_lm_head_to_fp32"])
def test_settings_of_trl_that_a_streamed_model_cannot_follow(name: str, tokenizer: Any, tmp_path: Path) -> None:
    engine = make_engine(tiny_llama())
    cls = type("Streamed", (mt.StreamedTrainerMixin, GRPOTrainer), {})
    args = GRPOConfig(output_dir=str(tmp_path), **{**SETTINGS, "num_generations": 2})
    setattr(args, name, True)
    with pytest.raises(mt.ConfigError, match=rf"{name} is True: "):
        cls(model=engine.model, args=args, reward_funcs=reward, train_dataset=preferences(), processing_class=tokenizer)
