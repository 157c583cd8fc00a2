"""Losses of log-probabilities in plain PyTorch, on whole logits, and pairs to train on."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from reference import Batch, MasterTrainer, PlainTrainer
from tiny_models import TEXT
from torch import Tensor, nn

import megatrain as mt
from megatrain.engine.random_streams import stream_seed
from megatrain.losses import REFERENCE

VOCABULARY: int = TEXT["vocab_size"]


def make(kind: str = "llama", **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**TEXT, "pad_token_id": 0, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config)
    nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
    return model


def pairs(seed: int, count: int = 1, tokens: int = 12) -> dict[str, Tensor]:
    """Chosen and rejected by turns, of differing lengths, the first third of each a prompt."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (2 * count, tokens), generator=generator)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, : tokens // 3] = -100
    for row in range(2 * count):
        end = tokens - row % 4
        labels[row, end:], mask[row, end:] = -100, 0
    reference = -20 - 20 * torch.rand(2 * count, generator=generator)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, REFERENCE: reference}


def step_of_pairs(step: int, counts: Sequence[int] = (1, 3)) -> list[dict[str, Tensor]]:
    return [pairs(10 * step + n, count, 9 + 3 * n) for n, count in enumerate(counts)]


def plain_log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """At the places of the labels."""
    flat = logits[:, :-1].float().reshape(-1, logits.shape[-1])
    losses = F.cross_entropy(flat, labels[:, 1:].reshape(-1), reduction="none")
    return F.pad(-losses.view(len(labels), -1), (1, 0))


def plain_dpo(found: Tensor, batch: Batch, loss: mt.losses.DPO) -> Tensor:
    """The sum over pairs, written down from the papers."""
    policy, reference = found.sum(-1), batch[REFERENCE]
    ratio_chosen, ratio_rejected = policy[::2] - reference[::2], policy[1::2] - reference[1::2]
    if loss.kind == "ipo":
        lengths = (batch["labels"][:, 1:] != -100).sum(-1)
        return ((ratio_chosen / lengths[::2] - ratio_rejected / lengths[1::2] - 1 / (2 * loss.beta)) ** 2).sum()
    logits = loss.beta * (ratio_chosen - ratio_rejected)
    right, wrong = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    share = loss.label_smoothing
    return ((1 - share) * right + share * wrong if share else right).sum()


class _UnderLoss:
    """A plain trainer whose loss is `loss`, a mean over pairs; what the model adds to its own loss stays. With
    `whole_loss` the sum of both is differentiated, as it is where the head cannot run by itself."""

    loss: mt.losses.DPO

    def backward(self: Any, batches: Sequence[Batch], **_: Any) -> float:
        counts = [len(batch["labels"]) // 2 for batch in batches]
        value = 0.0
        for number, (batch, count) in enumerate(zip(batches, counts, strict=True)):
            torch.manual_seed(stream_seed(self.seed, self.step_count, number))
            given = {name: entry for name, entry in batch.items() if name != REFERENCE}
            own, self.model.loss_function = self.model.loss_function, lambda *_, **__: torch.zeros(())
            try:
                output = self.model(**given)
            finally:
                self.model.loss_function = own
            found = plain_log_probabilities(output.logits, batch["labels"])
            if self.whole_loss:
                mean, share = plain_dpo(found, batch, self.loss) / count + output.loss, count / sum(counts)
                mean.backward(torch.full_like(mean, share))
                value += mean.item() * share
                continue
            ends = [plain_dpo(found, batch, self.loss) / sum(counts)]
            gradients = [torch.ones_like(ends[0])]
            value += ends[0].item()
            if output.loss.requires_grad:
                share = count / sum(counts)
                ends.append(output.loss)
                gradients.append(torch.full_like(output.loss, share))
                value += output.loss.item() * share
            torch.autograd.backward(ends, gradients)
            self.tied.collect()
        self.tied.combine()
        return value


class PlainUnderLoss(_UnderLoss, PlainTrainer):
    pass


class MasterUnderLoss(_UnderLoss, MasterTrainer):
    pass


def plain_under(loss: mt.losses.DPO, model: nn.Module, precision: str = "fp32", *, whole: bool = False) -> Any:
    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "clip_norm": 0.5, "seed": 3, "whole_loss": whole}
    if precision == "fp32":
        trainer: Any = PlainUnderLoss(copy.deepcopy(model), **settings)
    else:
        trainer = MasterUnderLoss(copy.deepcopy(model), keeps_fp32=lambda _: False, **settings)
    trainer.loss = loss
    return trainer
