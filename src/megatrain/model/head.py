"""Head and loss in chunks of tokens, so that the logits of a whole batch never exist.

A causal language model of transformers is a base that makes hidden states, a head and a loss function. Its own
forward runs twice over: once with the real base, whose hidden states are kept while the rest of the forward sees one
token of them (auxiliary losses come out of this run), then once per chunk with a stand-in base that returns that
chunk's hidden states (so soft-caps and logit scales stay the model's own code), followed at once by its backward.

Whether a model can be treated so is tried out, not looked up: a probe with random hidden states compares the model's
own loss with the chunked one. Where they differ, whole logits are used.
"""

import copy
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from megatrain.model.root import RootForward
from megatrain.model.side_effects import RandomState

IGNORED = -100  # transformers' label for "no target here"
_LOGITS_BYTES = 16 * 1024**2  # of one chunk in fp32


@dataclass(slots=True)
class Mode:
    """What the base and the loss function do on this thread. `kind`: 'collect', 'stub' or 'probe'."""

    kind: str
    hidden: Tensor | None = None  # collect: found; stub and probe: to be returned, [batch, tokens, hidden]
    template: Any = None  # the base's real output, around other hidden states
    labels: Tensor | None = None  # stub: targets of this chunk, already shifted, [batch, tokens]
    target_count: int = 0  # stub: target tokens of the whole global batch
    loss: Tensor | None = None
    loss_calls: int = 0
    random: RandomState | None = None
    rest: ExitStack = field(default_factory=ExitStack)  # collect: in force from the end of the base on


class ChunkedHead:
    """Runs a causal language model's base and head apart. `reason` says why not, or is None where it can.

    `direct` is the context in which units join the surrounding graph instead of being nodes of their own.
    """

    def __init__(
        self,
        model: nn.Module,
        root: RootForward,
        device: torch.device,
        direct: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.model = model
        self._direct = direct
        self.root = root
        self.device = device
        self._local = threading.local()
        self.base = base_of(model)
        self.reason: str | None = None
        if self.base is None:
            self.reason = f"{type(model).__name__} has no base model, output embeddings and loss function of its own"
            return
        self._base_forward = self.base.forward
        self._own_base_forward = "forward" in self.base.__dict__
        self._own_loss_function = bool({"loss_function", "_loss_function"} & set(model.__dict__))
        self._loss_function: Callable[..., Any] = cast(Any, model.loss_function)
        self.base.forward = self._run_base  # type: ignore[assignment]
        model.loss_function = self._run_loss  # type: ignore[assignment]
        self.reason = self._probe()
        if self.reason is not None:
            self.remove()

    def remove(self) -> None:
        """Give the model its own base and loss function back."""
        if self.base is not None:
            if self._own_base_forward:
                self.base.forward = self._base_forward  # type: ignore[assignment]
            else:
                del self.base.__dict__["forward"]
            if self._own_loss_function:
                self.model.loss_function = self._loss_function  # type: ignore[assignment]
            else:
                self.model.__dict__.pop("_loss_function", None)
            self.base = None

    # -- the two runs -----------------------------------------------------------------------------------------

    def run_base(self, batch: Mapping[str, Any]) -> tuple[Tensor, Any, Tensor | None]:
        """(hidden states [batch, tokens, hidden], the base's whole output, auxiliary loss or None), with graphs."""
        mode = Mode("collect")
        with mode.rest, self._mode(mode):
            result = self.model(**batch)
        if mode.random is not None:
            mode.random.restore()  # as if the rest of the forward had not run yet
        assert mode.hidden is not None
        loss = result.loss
        return mode.hidden, mode.template, loss if loss is not None and loss.requires_grad else None

    def chunk_loss(
        self, hidden: Tensor, labels: Tensor, template: Any, batch: Mapping[str, Any], target_count: int
    ) -> Tensor:
        """Loss of some tokens: sum over their targets / `target_count`. `labels` are shifted already."""
        rest = {k: v for k, v in batch.items() if k not in ("input_ids", "inputs_embeds", "labels")}
        rest = {k: v for k, v in rest.items() if not k.startswith("output_")}
        mode = Mode("stub", hidden=hidden, template=template, labels=labels, target_count=target_count)
        with self._mode(mode), self.root.capturing_off():
            self.model(input_ids=labels.clamp(min=0), labels=labels, **rest)
        assert mode.loss is not None
        return mode.loss

    def chunks(self, hidden: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """(hidden states, shifted labels, token range) per chunk; the original shape where one chunk is enough.

        `hidden` [batch, tokens, hidden], `labels` [batch, tokens] as given by the user, on the host. Chunks without a
        target are left out: their gradient is zero.
        """
        shifted = shift_labels(labels)
        tokens = shifted.numel()
        size = self.chunk_tokens()
        if tokens <= size:
            yield hidden, shifted.to(hidden.device, non_blocking=True), slice(0, tokens)
            return
        flat, targets = hidden.reshape(1, tokens, -1), shifted.reshape(1, tokens)
        for start in range(0, tokens, size):
            part = slice(start, min(start + size, tokens))
            if bool((targets[:, part] != IGNORED).any()):
                yield flat[:, part], targets[:, part].to(hidden.device, non_blocking=True), part

    def chunk_tokens(self) -> int:
        return chunk_tokens(max(p.shape[0] for p in _output_embeddings(self.model).parameters()))

    # -- stand-ins --------------------------------------------------------------------------------------------

    @contextmanager
    def _mode(self, mode: Mode) -> Iterator[Mode]:
        assert getattr(self._local, "mode", None) is None
        self._local.mode = mode
        try:
            yield mode
        finally:
            self._local.mode = None

    def _run_base(self, *args: Any, **kwargs: Any) -> Any:
        mode: Mode | None = getattr(self._local, "mode", None)
        if mode is None:
            return self._base_forward(*args, **kwargs)
        if mode.kind == "probe":
            return _ProbeOutput(last_hidden_state=mode.hidden)
        if mode.kind == "collect":
            mode.template = self._base_forward(*args, **kwargs)
            mode.hidden = mode.template.last_hidden_state
            mode.random = RandomState(self.device)
            mode.rest.enter_context(self._direct())  # the head's run on one token is thrown away
            return _with_hidden(mode.template, mode.hidden[:, :1].detach())
        return _with_hidden(mode.template, mode.hidden)

    def _run_loss(self, logits: Tensor, labels: Any = None, vocab_size: Any = None, *args: Any, **kwargs: Any) -> Any:
        mode: Mode | None = getattr(self._local, "mode", None)
        if mode is None:
            return self._loss_function(logits, labels, vocab_size, *args, **kwargs)
        mode.loss_calls += 1
        if mode.kind == "collect":
            return logits.new_zeros((), dtype=torch.float32)
        if mode.kind == "probe":
            mode.loss = self._loss_function(logits, labels, vocab_size, *args, **kwargs)
            return mode.loss
        kwargs |= {"num_items_in_batch": mode.target_count, "shift_labels": mode.labels}
        mode.loss = self._loss_function(logits, None, vocab_size, *args, **kwargs)
        return mode.loss

    # -- the probe --------------------------------------------------------------------------------------------

    def _probe(self) -> str | None:
        """None where the chunked loss equals the model's own on random hidden states; else what went wrong."""
        random = RandomState(self.device)
        try:
            with torch.no_grad(), self.root.capturing_off():
                return self._compare_losses()
        except Exception as error:  # whatever the model's own code raises on a stand-in: it needs the real thing
            return f"{type(error).__name__}: {error}".splitlines()[0]
        finally:
            self._local.mode = None
            random.restore()

    def _compare_losses(self) -> str | None:
        weight = next(_output_embeddings(self.model).parameters())
        width = _hidden_size(self.model) or weight.shape[-1]
        hidden = torch.randn(1, 6, width, dtype=weight.dtype, device=self.device)
        labels = torch.randint(0, weight.shape[0], (1, 6), device=self.device)
        labels[0, 2] = IGNORED
        with self._mode(Mode("probe", hidden=hidden)) as own:
            result = self.model(input_ids=labels.clamp(min=0), labels=labels)
        if own.loss_calls != 1 or own.loss is None:
            return "its loss does not come from its loss_function"
        template = _ProbeOutput(last_hidden_state=hidden)
        shifted = shift_labels(labels)
        count = int((shifted != IGNORED).sum())
        parts = [
            self.chunk_loss(hidden[:, part], shifted[:, part], template, {}, count)
            for part in (slice(0, 3), slice(3, 6))
        ]
        chunked, whole = float(sum(parts)), float(result.loss)
        tolerance = 1e-4 if weight.dtype == torch.float32 else 2e-2
        if not math.isclose(chunked, whole, rel_tol=tolerance):
            return f"its loss on a probe is {whole:.6f}, and in chunks {chunked:.6f}"
        return None


def chunk_tokens(vocabulary: int) -> int:
    """Tokens whose fp32 logits take about 16 MiB, in whole multiples of 64."""
    return max(64, _LOGITS_BYTES // (4 * vocabulary) // 64 * 64)


class _ProbeOutput(dict):  # type: ignore[type-arg]
    """A base output of which only the hidden states exist: anything else reads as None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        return self.get("last_hidden_state") if key == 0 else self.get(key)


def shift_labels(labels: Tensor) -> Tensor:
    """Labels [batch, tokens] moved so that position t holds the target of token t; the last position has none."""
    return nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:].contiguous()


def _with_hidden(template: Any, hidden: Tensor | None) -> Any:
    output = copy.copy(template)
    output["last_hidden_state"] = hidden
    return output


def base_of(model: nn.Module) -> nn.Module | None:
    base = getattr(model, getattr(model, "base_model_prefix", "") or "-", None)
    embeddings = _output_embeddings(model) if hasattr(model, "get_output_embeddings") else None
    if not isinstance(base, nn.Module) or base is model or embeddings is None or not hasattr(model, "loss_function"):
        return None
    return None if getattr(model.config, "is_encoder_decoder", False) else base


def _output_embeddings(model: nn.Module) -> nn.Module:
    return cast(Any, model).get_output_embeddings()  # type: ignore[no-any-return]


def _hidden_size(model: nn.Module) -> int | None:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config  # type: ignore[union-attr, operator]
    size = getattr(config, "hidden_size", None)
    return size if isinstance(size, int) else None
