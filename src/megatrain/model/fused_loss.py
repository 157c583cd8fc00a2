"""The head's linear layer and its cross-entropy in one, where a head is nothing more.

Run one after the other they hold a chunk's logits several times over: in the head's precision, in fp32, and the
gradients of both. A fused loss holds them once and turns them into their gradient in place. It knows a linear layer, a
bias, a soft-cap and the cross-entropy, so it may stand in only where a model does just that. Whether it does is tried
out, as for the chunks (`head.py`): on random hidden states, with logits of ordinary size and with large ones, both
have to give the same loss and the same gradients.

The gradient is computed in the forward, for a sum over targets, and multiplied in backward by the gradient of the
loss, in place: any factor is right, a second backward of the same graph is not. Scaling a loss against underflow has
no effect on what underflowed before; bf16 and fp32 have the range not to need it.
"""

import math
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatrain.model.block import DirectLeaves, UnitForward

IGNORED = -100  # transformers' label for "no target here"

# (hidden [tokens, hidden], weight [vocabulary, hidden], bias, targets [tokens], soft-cap) -> sum of losses, fp32
FusedLoss = Callable[[Tensor, Tensor, Tensor | None, Tensor, float | None], Tensor]
# (hidden [1, tokens, hidden], shifted labels [1, tokens], target count, the batch's other arguments) -> loss
ChunkLoss = Callable[[Tensor, Tensor, int, Mapping[str, Any]], Tensor]

_TOKENS = 16  # of the probe
_LOGITS = (1.0, 30.0)  # standard deviation of its logits: a soft-cap shows in the larger ones
_ROWS = 64  # of the weight's gradient that are compared, beside its norm


def liger_loss() -> FusedLoss:
    """Liger's, on the whole chunk at once: left to itself it would cut it into pieces too small for a large vocabulary,
    and round their sum to the weight's precision after each."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, soft_cap: float | None) -> Tensor:
        vocabulary, width = weight.shape
        result: Tensor = liger_fused_linear_cross_entropy(
            hidden,
            weight,
            targets,
            bias,
            ignore_index=IGNORED,
            reduction="sum",
            softcap=soft_cap,
            chunk_mem_const=-(-vocabulary // width),
        )
        return result

    return loss


class FusedHead:
    """Computes the loss inside the head's unit, where its weights are bound, in place of its logits."""

    def __init__(self, module: nn.Linear, loss: FusedLoss, soft_cap: float | None) -> None:
        self.soft_cap = soft_cap
        self._module = module
        self._loss = loss
        self._unit: UnitForward = module.forward  # type: ignore[assignment]
        self._forward = self._unit.forward
        self._local = threading.local()
        self._unit.forward = self._run

    def remove(self) -> None:
        self._unit.forward = self._forward

    def takes(self, batch: Mapping[str, Any]) -> bool:
        """Whether the loss of `batch` has no argument that the fused one lacks, and nothing watches the head."""
        return "ignore_index" not in batch and not (self._module._forward_hooks or self._module._forward_pre_hooks)

    def chunk_loss(self, hidden: Tensor, labels: Tensor, target_count: int) -> Tensor:
        """Loss of some tokens: sum over their targets / `target_count`. `labels` are shifted already."""
        self._local.labels = labels
        try:
            loss: Tensor = self._module(hidden)
        finally:
            self._local.labels = None
        return loss / target_count

    def _run(self, hidden: Tensor) -> Tensor:
        labels: Tensor | None = getattr(self._local, "labels", None)
        if labels is None:
            return self._forward(hidden)  # type: ignore[no-any-return]
        flat = hidden.reshape(-1, hidden.shape[-1])
        return self._loss(flat, self._module.weight, self._module.bias, labels.reshape(-1), self.soft_cap)


def fuse_head(
    module: nn.Module,
    loss: FusedLoss,
    soft_caps: list[float],
    own_loss: ChunkLoss,
    direct: Callable[[], AbstractContextManager[DirectLeaves]],
    device: torch.device,
) -> tuple[FusedHead | None, str]:
    """The fused head, where it equals `own_loss` on a probe, with none or one of `soft_caps`; else None, and why."""
    if type(module) is not nn.Linear:
        return None, f"the head is a {type(module).__name__}"
    if not isinstance(module.__dict__.get("forward"), UnitForward):
        return None, "the head is part of a larger unit"
    probe = _Probe(module, direct, device)
    if not probe.row_size > 0:
        return None, "the head's weights are zero"
    expected = [probe.run(own_loss, size, {}) for size in _LOGITS]
    masked = probe.run(own_loss, _LOGITS[0], {"attention_mask": probe.mask})
    if (found := probe.difference(masked, expected[0])) is not None:
        return None, f"its own loss depends on the attention mask: {found}"
    reason = ""
    for soft_cap in (None, *soft_caps):
        head = FusedHead(module, loss, soft_cap)
        try:
            results = (probe.run(lambda *args, head=head: head.chunk_loss(*args[:3]), size, {}) for size in _LOGITS)
            differences = (probe.difference(*pair) for pair in zip(results, expected, strict=True))
            found = next((text for text in differences if text is not None), None)
        except BaseException:
            head.remove()
            raise
        if found is None:
            return head, f"soft-cap {soft_cap}"
        head.remove()
        reason = reason or f"on a probe {found}"
    return None, reason


@dataclass(frozen=True, slots=True)
class _Result:
    """Of one run over the probe: the loss and, by name, what of its gradients is compared."""

    loss: float
    gradients: dict[str, Tensor]


class _Probe:
    """Random hidden states and targets, and a bound on how far two losses of them may be apart: 1e-4 of the loss, and
    of a gradient's largest element, in fp32; 2e-2 in lower precision, where a model may round its logits twice."""

    def __init__(
        self, module: nn.Linear, direct: Callable[[], AbstractContextManager[DirectLeaves]], device: torch.device
    ) -> None:
        weight = module.weight.detach()
        vocabulary, width = weight.shape
        self._direct = direct
        self._dtype = weight.dtype
        self._tolerance = 1e-4 if weight.dtype == torch.float32 else 2e-2
        self._hidden = torch.randn(1, _TOKENS, width, device=device)
        self._labels = torch.randint(0, vocabulary, (1, _TOKENS), device=device)
        self._rows = torch.cat([self._labels.flatten(), torch.randint(0, vocabulary, (_ROWS,), device=device)])
        self._labels[0, 3] = IGNORED
        self.mask = torch.ones_like(self._labels)
        self.mask[0, -2:] = 0
        # random hidden states times a row are as large as the row
        self.row_size = float(weight[:: max(1, vocabulary // _ROWS)].float().norm(dim=1).mean())

    def run(self, loss_of: ChunkLoss, logits: float, batch: Mapping[str, Any]) -> _Result:
        """Loss and gradients, where the logits have about that standard deviation."""
        hidden = (self._hidden * (logits / self.row_size)).to(self._dtype).requires_grad_()
        with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
            with self._direct() as weights:
                loss = loss_of(hidden, self._labels, _TOKENS, batch)
            loss.backward()
        gradients = {"hidden states": hidden.grad} | {f"weight {n}": leaf.grad for n, leaf in weights.leaves.items()}
        compared: dict[str, Tensor] = {}
        for name, gradient in gradients.items():
            if gradient is not None:
                large = gradient.ndim == 2 and len(gradient) > len(self._rows)
                compared[name] = (gradient[self._rows] if large else gradient).float()
                compared[f"{name}, norm"] = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        return _Result(float(loss.detach()), compared)

    def difference(self, found: _Result, expected: _Result) -> str | None:
        """What is further apart than the bound; None where nothing is."""
        if not math.isclose(found.loss, expected.loss, rel_tol=self._tolerance):
            return f"the loss is {found.loss:.6f} instead of {expected.loss:.6f}"
        if found.gradients.keys() != expected.gradients.keys():
            return "other weights get a gradient"
        for name, gradient in expected.gradients.items():
            size, apart = float(gradient.abs().max()), float((found.gradients[name] - gradient).abs().max())
            if not apart <= self._tolerance * size:
                return f"the gradient of {name} is {apart:.3g} away, of {size:.3g}"
        return None
