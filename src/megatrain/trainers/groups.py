"""The engine's optimizer as a trainer would have made its own."""

from collections.abc import Collection
from typing import Any

from megatrain.engine.engine import Engine


def as_stated(engine: Engine, args: Any, decayed: Collection[str]) -> None:
    """A fresh optimizer with the learning rate, betas, epsilon and weight decay of TrainingArguments; `decayed`: names
    of parameters that decay."""
    common = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    named = [(name, p) for name, p in engine.model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if name in decayed], "weight_decay": args.weight_decay, **common},
        {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0, **common},
    ]
    engine.set_param_groups(groups)
    engine.load_optimizer_state({})
