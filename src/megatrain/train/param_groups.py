"""optimizer.param_groups: from patterns to the parameters that they mean."""

import glob
import re
from typing import Any

from megatrain.config import OptimizerConfig
from megatrain.errors import ConfigError
from megatrain.optim.adamw import AdamW


def make_optimizer(settings: OptimizerConfig, model: Any) -> AdamW:
    """AdamW as `settings` say; `model` (on the meta device will do) tells the names that its patterns match.

    Raises ConfigError for a pattern that matches nothing, and for a group that is left without parameters.
    """
    every_name = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    left = every_name
    groups: list[dict[str, Any]] = []
    for number, group in enumerate(settings.param_groups):
        key = f"optimizer.param_groups[{number}]"
        if settings.lr == 0 and group.get("lr"):
            # the schedule moves all rates together, in proportion to optimizer.lr
            raise ConfigError(f"{key}.lr: {group['lr']} is wrong; expected 0, as optimizer.lr is 0")
        matched = _matched(group["match"], left, every_name, key)
        left = [name for name in left if name not in set(matched)]
        values = {name: value for name, value in group.items() if name != "match"}
        groups.append({"params": [glob.escape(name) for name in matched], **values})
    return AdamW(
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        param_groups=groups,
        moments=settings.moments,
    )


def _matched(patterns: tuple[str, ...], left: list[str], every_name: list[str], key: str) -> list[str]:
    """The names among those `left` that one of `patterns` finds."""
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in every_name):
            raise ConfigError(
                f"{key}.match: {pattern!r} matches no parameter; their names are such as {', '.join(every_name[:3])}"
            )
    found = [name for name in left if any(re.search(pattern, name) for pattern in patterns)]
    if not found:
        raise ConfigError(f"{key}.match: all parameters that {list(patterns)} match belong to groups before it")
    return found
