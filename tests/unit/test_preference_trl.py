"""DPO step by step beside TRL's trainer: same pairs, same weights, same numbers."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_runs import rows
from test_engine_toys import make_engine
from token_losses import make
from torch import Tensor

import megatrain as mt
from megatrain.data.tokenizer import train_bpe
from megatrain.losses import DPO, REFERENCE

pytest.importorskip("trl")


def interleaved(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """TRL has all chosen rows first."""
    pairs = {n: torch.stack(t.chunk(2), dim=1).flatten(0, 1) for n, t in inputs.items() if isinstance(t, Tensor)}
    labels = pairs["input_ids"].masked_fill(pairs["completion_mask"] == 0, -100)
    return {"input_ids": pairs["input_ids"], "attention_mask": pairs["attention_mask"], "labels": labels}


@pytest.mark.xdist_group("trl")
@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_three_steps_are_those_of_trl(kind: str, tmp_path: Path) -> None:
    """Losses, rewards and norms within 1e-4: sums are of another order, and AdamW's first update is a sign."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    seen: list[dict[str, Tensor]] = []

    class Watched(DPOTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(interleaved(inputs))
            return super().compute_loss(model, inputs, *args, **kwargs)

    settings = DPOConfig(
        output_dir=str(tmp_path),
        beta=0.3,
        loss_type=[kind],
        per_device_train_batch_size=2,
        max_steps=3,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=0.0,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    tokenizer = train_bpe((" ".join(row.values()) for row in rows()), 300)
    model = make("llama", vocab_size=300)
    theirs, reference, data = copy.deepcopy(model), copy.deepcopy(model), Dataset.from_list(rows())
    trainer = Watched(theirs, reference, args=settings, train_dataset=data, processing_class=tokenizer)
    trainer.train()

    optimizer = mt.AdamW(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    engine = make_engine(model, device="cpu", optimizer=optimizer, clip_norm=None)
    for batch in seen:
        batch[REFERENCE] = engine.log_probabilities(batch).sum(-1)
    for batch, expected in zip(seen, trainer.state.log_history, strict=False):
        stats = engine.train_step([batch], loss=DPO(0.3, kind=kind))
        assert stats.loss == pytest.approx(expected["loss"], rel=1e-4)
        assert stats.grad_norm == pytest.approx(expected["grad_norm"], rel=1e-4)
        for name, value in stats.loss_values.items():
            assert value == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    assert len(seen) == 3 and stats.loss_values["rewards/margins"] > 1
    engine.close()
