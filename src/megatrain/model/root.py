"""What the engine changes about a model as a whole: caches under gradients, checkpointing, moves and casts."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from typing import Any, cast

import torch
from torch import nn

from megatrain.errors import UnsupportedModelError
from megatrain.model.deferred_masks import documents_at
from megatrain.model.foreign import ForeignTensorError
from megatrain.model.moves import moved
from megatrain.model.stand_in import StandIn
from megatrain.model.trees import CacheError

_HOST = torch.device("cpu")
_CACHES = ("past_key_values", "cache_params")
_CAPTURE_FLAGS = ("output_router_logits", "output_hidden_states", "output_attentions")


def configurations(model: nn.Module) -> list[Any]:
    """Distinct transformers configurations in the module tree, sub-configurations included."""
    found: dict[int, Any] = {}

    def add(config: Any) -> None:
        if hasattr(config, "model_type") and id(config) not in found:
            found[id(config)] = config
            for key in getattr(config, "sub_configs", {}) or {}:
                add(getattr(config, key, None))

    for module in model.modules():
        add(getattr(module, "config", None))
    return list(found.values())


def _elements(arguments: list[Any]) -> int:
    """Of the largest tensor among a forward's arguments: the measure of its size. 0 where there is none."""
    return max((value.numel() for value in arguments if isinstance(value, torch.Tensor)), default=0)


def on_device(arguments: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Arguments of a transformers model where it computes. A mask of ones is left out on a device of its own: attention
    is then causal and nothing else, for which there are faster kernels; it is looked at here, on the host. Not beside
    position_ids, which transformers takes for several sequences in one where they begin anew, if there is no mask."""
    mask = arguments.get("attention_mask")
    looked_at = device.type != "cpu" and arguments.get("position_ids") is None
    on_host = isinstance(mask, torch.Tensor) and mask.device.type == "cpu" and mask.ndim == 2
    if looked_at and on_host and bool(torch.all(cast(torch.Tensor, mask))):
        arguments = {name: value for name, value in arguments.items() if name != "attention_mask"}
    return moved_arguments(arguments, device)


def moved_arguments(arguments: Mapping[Any, Any], device: torch.device) -> dict[Any, Any]:
    return {n: moved(value, device) if isinstance(value, torch.Tensor) else value for n, value in arguments.items()}


class RootForward:
    """Stands in for the model's forward, for the sake of caches, which are on by default.

    With gradients off they pass through, so `generate` works. With gradients on, units see empty ones (`trees`); a
    model whose caches cannot be treated so runs with `use_cache` off from its first call on.
    """

    def __init__(
        self,
        model: nn.Module,
        flush: Callable[[], None],
        forward_pass: Callable[[int], AbstractContextManager[None]],
        hiding: Callable[[], AbstractContextManager[None]] = nullcontext,
        device: torch.device = _HOST,
    ) -> None:
        self.model = model
        self._device = device
        self._flush = flush
        self._forward_pass = forward_pass
        self._hiding = hiding
        self.forward: Callable[..., Any] = model.forward
        self.__signature__ = signature(model.forward)  # trainers read off it which columns and arguments a model takes
        self._configs = configurations(model)
        self._caches_off = False
        self._stand_in: StandIn | None = None
        self._removed = False

    def install(self) -> None:
        self._stand_in = StandIn(self.model, "forward", self)

    def remove(self) -> None:
        """Give the model its forward back. What somebody has wrapped around this one goes on calling it."""
        self._removed = True
        if self._stand_in is not None:
            self._stand_in.remove()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._removed:
            return self.forward(*args, **kwargs)
        return self.run(self._call, args, kwargs)

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`forward(args, kwargs)` as the model's own: another forward that somebody has made of its parts."""
        self._flush()  # the model's own code may read any parameter, not only through the unit that owns it
        with self._forward_pass(_elements([*args, *kwargs.values()])), self._hiding():
            return forward(*self._placed(args, kwargs))

    def _placed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments where the model computes: callers may leave their batches on the host."""
        if self._device.type == "cpu":
            return args, kwargs
        # other models may take a mask for something else, and a cache has its own idea of what a mask covers
        left_out = self._configs and not any(kwargs.get(name) is not None for name in _CACHES)
        place = on_device if left_out else moved_arguments
        return tuple(moved_arguments(dict(enumerate(args)), self._device).values()), place(kwargs, self._device)

    def _call(self, args: Any, kwargs: Any) -> Any:
        if self._configs and _holds_several_documents(kwargs):
            # beside a cache, even an empty one, transformers does not look where position_ids begin anew
            with self._set(("use_cache",)), documents_at(kwargs["position_ids"]):
                return self.forward(*args, **(kwargs | ({"use_cache": False} if kwargs.get("use_cache") else {})))
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        if not self._caches_off and any(c.__dict__.get("use_cache") for c in self._configs):
            try:
                return self.forward(*args, **kwargs)
            except (CacheError, ForeignTensorError):  # or states that it keeps on its modules, for a cache
                if any(kwargs.get(name) is not None for name in _CACHES):
                    raise  # the caller's own cache
                self._caches_off = True
        if kwargs.get("use_cache"):
            kwargs["use_cache"] = False
        with self._set(("use_cache",)):
            return self.forward(*args, **kwargs)

    @contextmanager
    def capturing_off(self) -> Iterator[None]:
        """No captured outputs while the head runs by itself."""
        with self._set(_CAPTURE_FLAGS):
            yield

    @contextmanager
    def caches_off(self) -> Iterator[None]:
        """No caches with gradients off either: nothing is generated."""
        with self._set(("use_cache",)):
            yield

    @contextmanager
    def _set(self, names: tuple[str, ...]) -> Iterator[None]:
        changed = [(c, n, c.__dict__[n]) for c in self._configs for n in names if c.__dict__.get(n)]
        for config, name, _ in changed:
            config.__dict__[name] = False
        try:
            yield
        finally:
            for config, name, value in changed:
                config.__dict__[name] = value


def _holds_several_documents(arguments: Mapping[str, Any]) -> bool:
    """Whether position_ids begin anew within a row. Not beside a cache, or a mask that says what is attended to."""
    positions = arguments.get("position_ids")
    if not isinstance(positions, torch.Tensor) or positions.is_meta or positions.shape[-1] < 2:
        return False
    if any(arguments.get(name) is not None for name in (*_CACHES, "attention_mask")):
        return False
    return bool((positions.diff(dim=-1) != 1).any())


def report_device(model: nn.Module, device: torch.device) -> Callable[[], None]:
    """Make `model.device`, of this model and those inside it, say where they compute: transformers reads it off the
    first parameter, which stays on the host. Returns what undoes it."""
    changed = [(m, type(m)) for m in model.modules() if isinstance(getattr(type(m), "device", None), property)]
    for module, own in changed:
        members = {"device": property(lambda _self: device), "__module__": own.__module__, "__doc__": own.__doc__}
        module.__class__ = type(own.__name__, (own,), members)

    def undo() -> None:
        for module, own in changed:
            module.__class__ = own

    return undo


def guard(model: nn.Module, device: torch.device) -> list[StandIn]:
    """Refuse what would detach parameters from the host store, and make recomputation's rival a no-op.

    `.to(compute device)` does nothing (trainers call it); other moves, casts and copies raise in every submodule, and
    so does another size of the vocabulary.
    """
    guards = []
    for module in model.modules():
        if any(True for _ in module.parameters()):
            guards += [
                StandIn(module, "_apply", _Refusal(module)),
                StandIn(module, "to", _To(module, device)),
                StandIn(module, "__reduce_ex__", _NoCopy(module)),  # what copy.deepcopy, pickle and torch.save ask
            ]
        if hasattr(module, "resize_token_embeddings"):
            guards.append(StandIn(module, "resize_token_embeddings", _OneSize(module)))
    for name in ("gradient_checkpointing_enable", "activation_checkpointing_enable"):
        if hasattr(model, name):
            guards.append(StandIn(model, name, _no_checkpointing))
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) is True:
            module.gradient_checkpointing = False  # type: ignore[assignment]
    return guards


def _no_checkpointing(*_args: Any, **_kwargs: Any) -> None:
    """Units are recomputed by the engine already; a second recomputation inside would only cost time."""


class _Refusal:
    def __init__(self, module: nn.Module) -> None:
        self._name = type(module).__name__

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        raise UnsupportedModelError(
            f"{self._name}: the engine owns this model's parameters; it cannot be moved or cast. Choose device and"
            " precision when making the Engine, or engine.close() first"
        )


class _NoCopy:
    def __init__(self, module: nn.Module) -> None:
        self._name = type(module).__name__

    def __call__(self, _protocol: object) -> Any:
        raise UnsupportedModelError(
            f"{self._name}: the engine runs this model; it cannot be copied or pickled. Write it with"
            " engine.save_pretrained(folder), copy its engine.model.state_dict(), or engine.close() first"
        )


class _OneSize:
    """In place of transformers' `resize_token_embeddings`, which trainers call for the size that there is, too."""

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = module
        self._resize: Any = self._module.resize_token_embeddings

    def __call__(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        tokens = self._module.get_input_embeddings().weight.shape[0]
        wanted = tokens if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            wanted += -wanted % pad_to_multiple_of
        if wanted == tokens:
            return self._resize(new_num_tokens, pad_to_multiple_of, *args, **kwargs)
        raise UnsupportedModelError(
            f"{type(self._module).__name__}: its {tokens} token embeddings cannot become {wanted} while an engine runs"
            " it; resize the model before mt.Engine takes it over. A trainer's chat_template_path resizes it, too:"
            " call trl.clone_chat_template(model, tokenizer, path) before mt.Engine, and leave chat_template_path out"
        )


class _To:
    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module = module
        self._device = device

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        same_device = device is None or device.type == self._device.type
        if same_device and (dtype is None or all(p.dtype == dtype for p in self._module.parameters())):
            return self._module
        _Refusal(self._module)()
        return self._module
