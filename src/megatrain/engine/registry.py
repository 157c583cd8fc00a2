"""Which engine runs a model, for code that is given only the model, and for what must not be done behind its back."""

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from megatrain.errors import ConfigError

if TYPE_CHECKING:
    from megatrain.engine.engine import Engine

# by id, since a model's own `__eq__` is nobody's business; entries go with their engine
_ENGINES: "weakref.WeakValueDictionary[int, Engine]" = weakref.WeakValueDictionary()


def engine_of(model: object) -> "Engine | None":
    """The open engine that runs `model`, or None."""
    engine = _ENGINES.get(id(model))
    return engine if engine is not None and engine.model is model else None


def note_engine(engine: "Engine") -> Callable[[], object]:
    """Let `engine_of` find it; returns what undoes that."""
    key = id(engine.model)
    _ENGINES[key] = engine
    return lambda: _ENGINES.pop(key, None)


def refuse_other_optimizers(engine: "Engine") -> Callable[[], object]:
    """From here on raise ConfigError where another optimizer is about to step over a parameter that the engine trains:
    it would hold a second state, and what it writes would lack the masters' low bits. Returns what undoes that."""
    found = weakref.ref(engine, lambda _: hook.remove())
    trained = {id(slot.parameter): slot.name for slot in engine.partition.slots if slot.parameter.requires_grad}

    def before_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        engine = found()
        if engine is None or optimizer is engine.optimizer:
            return
        name = next((trained[id(p)] for g in optimizer.param_groups for p in g["params"] if id(p) in trained), None)
        if name is not None:
            raise ConfigError(
                f"{type(optimizer).__name__} was about to update {name}, which an Engine trains: use engine.optimizer,"
                " and with a trainer of transformers or TRL a class of your own,"
                " class Streamed(mt.StreamedTrainerMixin, Trainer)"
            )

    hook = register_optimizer_step_pre_hook(before_step)
    return hook.remove
