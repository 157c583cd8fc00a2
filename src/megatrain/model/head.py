"""Head and loss in chunks of tokens, so that the logits of a whole batch never exist.

A causal language model of transformers is a base that makes hidden states, a head and a loss function. Its own
forward runs twice over: once with the real base, whose hidden states are kept while the rest of the forward sees one
token of them (auxiliary losses come out of this run), then once per chunk with a stand-in base that returns that
chunk's hidden states (so soft-caps and logit scales stay the model's own code), followed at once by its backward.

Whether a model can be treated so is tried out, not looked up: a probe with random hidden states compares the model's
own loss with the chunked one, in training and in evaluation mode. What a probe cannot know, because a model does it
only later or it is too small to show, each run looks for in the graph of its loss (`loss_terms.py`). Where one or the
other finds something, whole logits are used.
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

from megatrain.errors import CapacityError, MegaTrainError
from megatrain.model.block import DirectLeaves
from megatrain.model.fused_loss import IGNORED as IGNORED
from megatrain.model.fused_loss import FusedHead, FusedLoss, fuse_head
from megatrain.model.log_probabilities import label_log_probabilities, put_loss_function
from megatrain.model.loss_terms import InseparableLossError, LossStandIn, zero_like_loss
from megatrain.model.moves import moved
from megatrain.model.root import RootForward
from megatrain.model.side_effects import RandomState

BYTES_PER_LOGIT = 16  # while a chunk is differentiated: fp32 logits, their log-softmax, two gradients; and bf16 ones


@dataclass(slots=True)
class Mode:
    """What the base and the loss function do on this thread. `kind`: 'collect', 'stub' (the loss of a chunk), 'score'
    (its log-probabilities) or 'probe'."""

    kind: str
    hidden: Tensor | None = None  # collect: found; else to be returned, [batch, tokens, hidden]
    template: Any = None  # the base's real output, around other hidden states
    labels: Tensor | None = None  # stub and score: targets of this chunk, already shifted, [batch, tokens]
    target_count: int = 0  # stub: target tokens of the whole global batch
    loss: Tensor | None = None
    loss_calls: int = 0
    stand_in: LossStandIn | None = None  # collect, stub and score: what the model's code gets for the loss
    arguments: dict[str, Any] = field(default_factory=dict)  # collect: what the loss function was called with
    token: Tensor | None = None  # collect: the hidden states that the rest of the forward sees
    weights: DirectLeaves | None = None  # collect: those that the rest of the forward was run with
    random: RandomState | None = None
    rest: ExitStack = field(default_factory=ExitStack)  # collect: in force from the end of the base on


class ChunkedHead:
    """Runs a causal language model's base and head apart. `reason` says why not, or is None where it can.

    `direct` is the context in which units join the surrounding graph instead of being nodes of their own.
    `chunk_tokens`: how many tokens to a chunk, given what the logits of one take while they are differentiated, and
    the size of the vocabulary.
    """

    def __init__(
        self,
        model: nn.Module,
        root: RootForward,
        device: torch.device,
        direct: Callable[[], AbstractContextManager[DirectLeaves]],
        chunk_tokens: Callable[[int, int], int],
    ) -> None:
        self.model = model
        self._direct = direct
        self.root = root
        self.device = device
        self._local = threading.local()
        self.base = base_of(model)
        self.fused: FusedHead | None = None
        self.reason: str | None = None
        if self.base is None:
            self.reason = f"{type(model).__name__} has no base model, output embeddings and loss function of its own"
            return
        self._base_forward = self.base.forward
        self._own_base_forward = "forward" in self.base.__dict__
        self._loss_function: Callable[..., Any] = cast(Any, model.loss_function)
        self.base.forward = self._run_base  # type: ignore[assignment]
        self._put_back_loss_function = put_loss_function(model, self._run_loss)
        try:
            self.reason = self._probe()
            if self.reason is not None:
                self.remove()
                return
            vocabulary: int = max(p.shape[0] for p in _output_embeddings(model).parameters())
            self._token_bytes = BYTES_PER_LOGIT * vocabulary
            self.chunk_tokens = chunk_tokens(self._token_bytes, vocabulary)
        except BaseException:
            self.remove()
            raise

    def fuse(self, loss: FusedLoss) -> str:
        """From here on compute head and loss by `loss`, where the model's head proves to be nothing more: why, or why
        not. A pass of the units goes with it, which is the caller's to end."""
        if self.reason is not None:
            return self.reason
        if _qualified_name(self._loss_function) != "transformers.loss.loss_utils.ForCausalLMLoss":
            return "the model's loss function is not that of transformers' causal language models"
        random, trained = RandomState(self.device), [(m, m.training) for m in self.model.modules()]
        try:
            self.model.train()  # with the dropout that a head may have
            module, caps = _output_embeddings(self.model), _soft_caps(self.model)
            self.fused, reason = fuse_head(module, loss, caps, self._probed_loss, self._direct, self.device)
        except Exception as error:  # whatever the model's own code raises on a stand-in
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        finally:
            self._local.mode = None
            random.restore()
            for module, training in trained:
                module.training = training
        return reason

    def _probed_loss(self, hidden: Tensor, labels: Tensor, target_count: int, batch: Mapping[str, Any]) -> Tensor:
        return self.chunk_loss(hidden, labels, _ProbeOutput(last_hidden_state=hidden), batch, target_count)

    def remove(self) -> None:
        """Give the model its own head, base and loss function back."""
        if self.fused is not None:
            self.fused.remove()
            self.fused = None
        if self.base is not None:
            if self._own_base_forward:
                self.base.forward = self._base_forward  # type: ignore[assignment]
            else:
                del self.base.__dict__["forward"]
            self._put_back_loss_function()
            self.base = None

    # -- the two runs -----------------------------------------------------------------------------------------

    def hidden_states(self, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """(hidden states [batch, tokens, hidden], the base's whole output), without a loss, gradients off.

        Raises InseparableLossError as `run_base` does where the model's own code cannot do with one token."""
        mode = Mode("collect")
        with _errors_after_base(mode), mode.rest, self._mode(mode), self.root.caches_off():
            self.model(**{name: value for name, value in batch.items() if name != "labels"})
        assert mode.hidden is not None
        return mode.hidden, mode.template

    def run_base(self, batch: Mapping[str, Any]) -> tuple[Tensor, Any, Tensor | None]:
        """(hidden states [batch, tokens, hidden], the base's whole output, auxiliary loss or None), with graphs.

        Raises InseparableLossError where the loss of this batch is more than its chunks' and the auxiliary one."""
        mode = Mode("collect")
        with _errors_after_base(mode):
            with mode.rest, self._mode(mode):
                loss = self.model(**batch).loss
            self._check_loss(mode, loss, batch["labels"])
        assert mode.hidden is not None and mode.random is not None and mode.stand_in is not None
        mode.random.restore()  # as if the rest of the forward had not run yet
        return mode.hidden, mode.template, None if mode.stand_in.is_all_of(loss) else loss

    @staticmethod
    def _check_loss(mode: Mode, loss: Any, labels: Tensor) -> None:
        """Raise InseparableLossError where chunks would not give `loss`, or not of these labels."""
        if mode.stand_in is None or mode.token is None or mode.weights is None or mode.loss_calls != 1:
            raise InseparableLossError(f"its loss_function is called {mode.loss_calls} times after its base model")
        if not _are_labels(mode.arguments, labels):
            raise InseparableLossError("its loss_function gets other labels than the batch has")
        mode.stand_in.check(loss, [mode.token, *mode.weights.leaves.values()])

    def give_up(self, reason: str) -> None:
        """From here on whole logits are used."""
        self.remove()
        self.reason = reason

    def chunk_loss(
        self, hidden: Tensor, labels: Tensor, template: Any, batch: Mapping[str, Any], target_count: int
    ) -> Tensor:
        """Loss of some tokens: sum over their targets / `target_count`. `labels` are shifted already.

        Raises InseparableLossError where the model's own forward adds to it what depends on these tokens."""
        if self.fused is not None and self.fused.takes(batch):
            return self.fused.chunk_loss(hidden, labels, target_count)
        return self._run_stub(Mode("stub", hidden, template, labels, target_count), batch)

    def chunk_log_probabilities(
        self, hidden: Tensor, labels: Tensor, template: Any, batch: Mapping[str, Any]
    ) -> Tensor:
        """Log-probabilities of `labels`, which are shifted already, in their shape: fp32, 0 where there is none.

        Raises InseparableLossError as `chunk_loss` does."""
        return self._run_stub(Mode("score", hidden, template, labels), batch)

    def _run_stub(self, mode: Mode, batch: Mapping[str, Any]) -> Tensor:
        """The rest of the model's own forward on a chunk; what its loss function has to give for it."""
        assert mode.hidden is not None and mode.labels is not None
        hidden, labels = mode.hidden, mode.labels
        rest = {k: v for k, v in batch.items() if k not in ("input_ids", "inputs_embeds", "position_ids", "labels")}
        rest = {k: v for k, v in rest.items() if not k.startswith("output_")}
        with self._mode(mode), self.root.capturing_off():
            result = self.model(input_ids=labels.clamp(min=0), labels=labels, **rest)
        assert mode.loss is not None
        if mode.stand_in is not None:
            mode.stand_in.check(result.loss, [hidden])
        return mode.loss

    def chunks(self, hidden: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """(hidden states, shifted labels, token range) per chunk; the original shape where one chunk is enough.

        `hidden` [batch, tokens, hidden], `labels` [batch, tokens] as given by the user, on the host. Chunks without a
        target are left out: their gradient is zero.
        """
        shifted = shift_labels(labels)
        tokens = shifted.numel()
        size = self.chunk_tokens
        if tokens <= size:
            yield hidden, moved(shifted, hidden.device), slice(0, tokens)
            return
        flat, targets = hidden.reshape(1, tokens, -1), shifted.reshape(1, tokens)
        for start in range(0, tokens, size):
            part = slice(start, min(start + size, tokens))
            if bool((targets[:, part] != IGNORED).any()):
                yield flat[:, part], moved(targets[:, part], hidden.device), part

    def logits_bytes(self, tokens: int) -> int:
        """What the logits of a chunk of so many tokens take while they are differentiated."""
        return self._token_bytes * tokens

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
            mode.weights = mode.rest.enter_context(self._direct())  # the head's run on one token is thrown away
            mode.token = mode.hidden[:, :1].detach().requires_grad_()
            return _with_hidden(mode.template, mode.token)
        return _with_hidden(mode.template, mode.hidden)

    def _run_loss(self, logits: Tensor, labels: Any = None, vocab_size: Any = None, *args: Any, **kwargs: Any) -> Any:
        mode: Mode | None = getattr(self._local, "mode", None)
        if mode is None:
            return self._loss_function(logits, labels, vocab_size, *args, **kwargs)
        mode.loss_calls += 1
        if mode.kind == "collect":
            mode.arguments = {"labels": labels, **kwargs}
            mode.stand_in = LossStandIn(zero_like_loss(logits))
            return mode.stand_in.tensor
        if mode.kind == "probe":
            mode.loss = self._loss_function(logits, labels, vocab_size, *args, **kwargs)
            return mode.loss
        if mode.kind == "score":
            assert mode.labels is not None
            mode.loss = label_log_probabilities(logits, mode.labels)
            value = zero_like_loss(logits)
        else:
            kwargs |= {"num_items_in_batch": mode.target_count, "shift_labels": mode.labels}
            value = mode.loss = self._loss_function(logits, None, vocab_size, *args, **kwargs)
        if not torch.is_grad_enabled():
            return value
        mode.stand_in = LossStandIn(value)
        return mode.stand_in.tensor

    # -- the probe --------------------------------------------------------------------------------------------

    def _probe(self) -> str | None:
        """None where the chunked loss equals the model's own on random hidden states; else what went wrong."""
        random, training = RandomState(self.device), {module: module.training for module in self.model.modules()}
        try:
            with torch.no_grad(), self.root.capturing_off():
                for mode in (False, True):
                    self.model.train(mode)
                    if (reason := self._compare_losses()) is not None:
                        return reason
                return None
        except (CapacityError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # whatever the model's own code raises on a stand-in: it needs the real thing
            return f"{type(error).__name__}: {error}".splitlines()[0]
        finally:
            self._local.mode = None
            random.restore()
            for module, was in training.items():
                module.training = was

    def _compare_losses(self) -> str | None:
        weight = next(_output_embeddings(self.model).parameters())
        width = _hidden_size(self.model) or weight.shape[-1]
        hidden = torch.randn(1, 6, width, dtype=weight.dtype, device=self.device)
        labels = torch.randint(0, weight.shape[0], (1, 6), device=self.device)
        labels[0, 2] = IGNORED
        losses = []
        for _ in range(2):
            with self._mode(Mode("probe", hidden=hidden)) as own:
                losses.append(float(self.model(input_ids=labels.clamp(min=0), labels=labels).loss))
        if own.loss_calls != 1 or own.loss is None:
            return "its loss does not come from its loss_function"
        if self.model.training and losses[0] != losses[1]:
            return None  # dropout before the head: values say nothing, and each chunk draws numbers of its own
        template = _ProbeOutput(last_hidden_state=hidden)
        shifted = shift_labels(labels)
        count = int((shifted != IGNORED).sum())
        parts = [
            self.chunk_loss(hidden[:, part], shifted[:, part], template, {}, count)
            for part in (slice(0, 3), slice(3, 6))
        ]
        chunked, whole = float(sum(parts)), losses[0]
        tolerance = 1e-4 if weight.dtype == torch.float32 else 2e-2
        if not math.isclose(chunked, whole, rel_tol=tolerance):
            return f"its loss on a probe is {whole:.6f}, and in chunks {chunked:.6f}"
        return None


@contextmanager
def _errors_after_base(mode: Mode) -> Iterator[None]:
    """What the model's own code raises on one token becomes InseparableLossError: an error of the batch will come again
    with whole logits."""
    try:
        yield
    except (MegaTrainError, InseparableLossError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if mode.hidden is None:
            raise
        raise InseparableLossError(f"{type(error).__name__}: {error}".splitlines()[0]) from error


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


def _are_labels(arguments: Mapping[str, Any], labels: Tensor) -> bool:
    """Whether a loss function called so takes its targets from the batch's `labels`, and counts them itself."""
    given, expected = arguments["labels"], labels
    if arguments.get("shift_labels") is not None:
        given, expected = arguments["shift_labels"], shift_labels(labels)
    same = isinstance(given, Tensor) and (given is expected or torch.equal(given, expected))
    return same and arguments.get("num_items_in_batch") is None


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


def _qualified_name(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"


def _output_embeddings(model: nn.Module) -> nn.Module:
    return cast(Any, model).get_output_embeddings()  # type: ignore[no-any-return]


def _soft_caps(model: nn.Module) -> list[float]:
    """Numbers that the configuration calls a soft-cap, of whatever: which one the head has is tried out."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config  # type: ignore[union-attr, operator]
    named = {name: value for name, value in vars(config).items() if "soft" in name and "cap" in name}
    return sorted({float(v) for v in named.values() if isinstance(v, (int, float)) and v > 0})


def _hidden_size(model: nn.Module) -> int | None:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config  # type: ignore[union-attr, operator]
    size = getattr(config, "hidden_size", None)
    return size if isinstance(size, int) else None
