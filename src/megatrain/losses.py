"""Losses that are functions of the log-probabilities of target tokens, for `engine.train_step(batches, loss=...)`.

Such a loss sees a small tensor, [batch, tokens], and never logits: those exist for a chunk of tokens at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from megatrain.errors import ConfigError

REFERENCE = "reference_log_probabilities"
_KINDS = ("sigmoid", "ipo")


class TokenLoss(Protocol):
    """What a step asks of a loss. It takes the place of the model's own loss function; what a model adds to that
    (auxiliary losses of experts) stays."""

    @property
    def inputs(self) -> Sequence[str]:
        """Entries of a batch that are the loss's alone: the model is not given them."""

    def units(self, batch: Mapping[str, Any]) -> float:
        """How many units (pairs, sequences, a sum of weights) a micro-batch has: a step's loss is the mean over those
        of all its micro-batches. One without any is left out."""

    def __call__(
        self, log_probabilities: Tensor, targets: Tensor, batch: Mapping[str, Any]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The sum over the micro-batch's units, differentiable, and sums of what else is reported, by name.

        `log_probabilities` fp32 in the shape of `labels`, at the place of its label each, 0 where there is no target;
        `targets` bool, where there is one; `batch` all entries, on the compute device."""


@dataclass(frozen=True)
class DPO:
    """Direct preference optimization, over pairs: rows 0, 2, 4, ... of a batch are chosen, the row behind each is the
    rejected one. `reference_log_probabilities`, fp32 [rows], are the sums over each row's targets under the weights
    that training begins with: `engine.log_probabilities(batch).sum(-1)`.

    beta:            how strongly the reference holds (for 'ipo': tau).
    label_smoothing: the share of pairs that are taken to be the wrong way round ('sigmoid' only).
    kind:            'sigmoid' (Rafailov et al., 2023) or 'ipo' (Azar et al., 2023; means over tokens, as in TRL).
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    kind: str = "sigmoid"

    def __post_init__(self) -> None:
        if not 0 < self.beta < float("inf"):
            raise ConfigError(f"beta is {self.beta!r}; it must be a number above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"label_smoothing is {self.label_smoothing!r}; it must be at least 0 and below 0.5")
        if self.kind not in _KINDS:
            raise ConfigError(f"kind is {self.kind!r}; it must be one of {', '.join(_KINDS)}")
        if self.kind == "ipo" and self.label_smoothing:
            raise ConfigError(f"label_smoothing is {self.label_smoothing!r}; with kind 'ipo' it must be 0")

    @property
    def inputs(self) -> Sequence[str]:
        return (REFERENCE,)

    def units(self, batch: Mapping[str, Any]) -> int:
        rows = len(batch["labels"])
        if rows % 2:
            raise ConfigError(f"labels: {rows} rows are no pairs; chosen and rejected follow each other, row by row")
        reference = batch.get(REFERENCE)
        if not isinstance(reference, Tensor) or tuple(reference.shape) != (rows,):
            given = list(reference.shape) if isinstance(reference, Tensor) else type(reference).__name__
            raise ConfigError(f"{REFERENCE} is {given}; it must be a tensor of [{rows}], one number per row")
        return rows // 2

    def __call__(
        self, log_probabilities: Tensor, targets: Tensor, batch: Mapping[str, Any]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        sums = log_probabilities.sum(-1)
        ratios = sums - batch[REFERENCE]
        chosen, rejected = ratios[0::2], ratios[1::2]
        if self.kind == "ipo":
            means = ratios / targets.sum(-1).clamp(min=1)
            losses = (means[0::2] - means[1::2] - 1 / (2 * self.beta)) ** 2
        else:
            scores = self.beta * (chosen - rejected)
            losses = -F.logsigmoid(scores)
            if self.label_smoothing:
                losses = (1 - self.label_smoothing) * losses - self.label_smoothing * F.logsigmoid(-scores)
        reported = {
            "rewards/chosen": self.beta * chosen.detach().sum(),
            "rewards/rejected": self.beta * rejected.detach().sum(),
            "rewards/accuracies": (chosen > rejected).float().sum(),
            "rewards/margins": self.beta * (chosen - rejected).detach().sum(),
            "logps/chosen": sums[0::2].detach().sum(),
            "logps/rejected": sums[1::2].detach().sum(),
        }
        return losses.sum(), reported
