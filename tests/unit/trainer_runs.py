"""The same trainer on a resident model and on a streamed one."""

import copy
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import megatrain as mt

ROWS, TOKENS = 12, 9
SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 1,
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}


@pytest.fixture(scope="module", autouse=True)
def cheap_collections() -> Iterator[None]:
    """accelerate collects garbage before each training: what is there already need not be looked at each time."""
    gc.freeze()
    yield
    gc.unfreeze()


class Streamed(mt.StreamedTrainerMixin, Trainer):
    pass


class Rows(Dataset):
    """Rows with differing numbers of targets, and a column that no model takes."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        ids = torch.randint(0, 96, (TOKENS,), generator=torch.Generator().manual_seed(row))
        labels = ids.clone()
        labels[3 + row % 6 :] = -100
        return {"input_ids": ids, "labels": labels, "row": torch.tensor(row)}


def tiny_llama(tied: bool = False, cls: type[nn.Module] = LlamaForCausalLM, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        **settings,
    )
    return cls(config).float()


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), **{**SETTINGS, **settings})


def make_engine(model: nn.Module, device: str = "cpu", precision: str = "fp32", **settings: Any) -> mt.Engine:
    return mt.Engine(model, device=device, precision=precision, threads=1, **settings)


def train_both(
    folder: Path,
    model: Any,
    make: Callable[[type[Trainer], Any, Path], Trainer],
    trainer: type[Trainer] = Trainer,
    device: str = "cpu",
) -> tuple[Trainer, Trainer]:
    """`make(class, model, folder)` gives a trainer: of the resident model, and of the same one streamed. Both have
    trained, and the streamed one's updates are over."""
    streamed_class = type("Streamed", (mt.StreamedTrainerMixin, trainer), {})
    streamed_model = copy.deepcopy(model)
    resident = make(trainer, model, folder / "resident")
    resident.train()
    engine = make_engine(streamed_model, device)
    streamed = make(streamed_class, engine.model, folder / "streamed")
    streamed.train()
    engine.flush()
    return resident, streamed


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    differences = []
    for (name, mine), (other_name, theirs) in pairs:
        assert name == other_name
        differences.append(float((mine - theirs).abs().max()))
    return max(differences)


def logged(trainer: Trainer, *names: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history for name in names if name in entry]
