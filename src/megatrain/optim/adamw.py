"""AdamW as the user states it, and as a real torch Optimizer over the engine's host parameters."""

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor

from megatrain.errors import ConfigError
from megatrain.model.partition import ParameterSlot

MOMENTS = ("fp32", "int8")


@dataclass(frozen=True, slots=True)
class AdamW:
    """Hyper-parameters of AdamW (Loshchilov & Hutter, arXiv 1711.05101), bit-equal to torch's fused one.

    Weight decay applies to parameters with two or more dimensions, unless a group sets its own. `param_groups`
    is a sequence of mappings with `params` (name patterns such as `*.bias`) and any of lr, betas, eps,
    weight_decay; for each parameter the first group with a matching pattern counts. `moments`: fp32, or int8 with
    2.125 bytes per parameter for both in place of 8 (`int8_moments`): near torch's, not equal to it.
    """

    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    param_groups: Sequence[Mapping[str, Any]] = ()
    moments: str = "fp32"

    def __post_init__(self) -> None:
        _check("moments", self.moments, self.moments in MOMENTS, f"one of {', '.join(MOMENTS)}")
        _check("lr", self.lr, _is_finite(self.lr) and self.lr >= 0, "a finite number >= 0")
        pair = isinstance(self.betas, (tuple, list)) and len(self.betas) == 2
        ok = pair and all(_is_finite(b) and 0 <= b < 1 for b in self.betas)
        _check("betas", self.betas, ok, "two numbers in [0, 1)")
        _check("eps", self.eps, _is_finite(self.eps) and self.eps > 0, "a finite number > 0")
        decay = self.weight_decay
        _check("weight_decay", decay, _is_finite(decay) and decay >= 0, "a finite number >= 0")
        groups = self.param_groups
        right = "a list of mappings with 'params'"
        _check("param_groups", groups, isinstance(groups, Sequence) and not isinstance(groups, str), right)
        allowed = {"params", "lr", "betas", "eps", "weight_decay"}
        for number, group in enumerate(self.param_groups):
            name = f"param_groups[{number}]"
            _check(name, group, isinstance(group, Mapping), "a mapping with 'params'")
            unknown = set(group) - allowed
            _check(
                name,
                dict(group),
                not unknown and "params" in group,
                f"'params' and any of {sorted(allowed)[:-1]}",
            )
            if not isinstance(group["params"], str) and not _are_strings(group["params"]):
                raise ConfigError(
                    f"optimizer.{name}.params must be a pattern of names such as '*.bias', or a list of such"
                )
            self._with(group)  # checks the values

    def _with(self, group: Mapping[str, Any]) -> "AdamW":
        values: dict[str, Any] = {
            k: tuple(v) if k == "betas" and isinstance(v, list) else v for k, v in group.items() if k != "params"
        }
        return replace(self, param_groups=(), **values)

    def group_slots(self, slots: Iterable[ParameterSlot]) -> tuple[list[dict[str, Any]], dict[int, int]]:
        """(torch param groups over the host parameters, group index by slot index), for the trainable
        `slots`.

        Raises ConfigError for a pattern that matches nothing: a typo would silently train with other
        settings.
        """
        # of every group two: parameters with two or more dimensions, and the others
        pairs = [(self._with(g), "weight_decay" in g) for g in self.param_groups] + [(self, False)]
        settings = [s for g, decays in pairs for s in (g, g if decays else replace(g, weight_decay=0.0))]
        patterns = [_patterns(g["params"]) for g in self.param_groups]
        members: list[list[ParameterSlot]] = [[] for _ in settings]
        for slot in slots:
            if not slot.parameter.requires_grad:
                continue
            named = (n for n, p in enumerate(patterns) if any(fnmatch.fnmatchcase(slot.name, one) for one in p))
            members[2 * next(named, len(patterns)) + (slot.parameter.ndim < 2)].append(slot)
        for number, pattern in enumerate(patterns):
            _check(
                f"param_groups[{number}].params",
                pattern,
                bool(members[2 * number] or members[2 * number + 1]),
                "patterns that match a parameter",
            )
        groups: list[dict[str, Any]] = []
        group_of: dict[int, int] = {}
        for setting, chosen in zip(settings, members, strict=True):
            if chosen:
                group_of |= {slot.index: len(groups) for slot in chosen}
                groups.append(self._torch_group(setting, chosen))
        return groups, group_of

    def _torch_group(self, setting: "AdamW", slots: list[ParameterSlot]) -> dict[str, Any]:
        return {
            "params": [slot.parameter for slot in slots],
            "lr": setting.lr,
            "betas": setting.betas,
            "eps": setting.eps,
            "weight_decay": setting.weight_decay,
            # one learning rate given for a step keeps the groups' proportions
            "lr_scale": setting.lr / self.lr if self.lr else 1.0,
        }


def _patterns(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _are_strings(value: Any) -> bool:
    return isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(one, str) for one in value)


def _is_finite(value: Any) -> bool:
    """Whether it is a number, and neither inf nor nan."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_learning_rate(lr: float | Tensor) -> None:
    """Raise ConfigError unless `lr`, the learning rate of a step, is a finite number >= 0."""
    value = lr.item() if isinstance(lr, Tensor) and lr.numel() == 1 else lr
    if not (_is_finite(value) and value >= 0):
        raise ConfigError(f"lr is {lr!r}; it must be a finite number >= 0")


def _check(name: str, value: Any, ok: bool, right: str) -> None:
    if not ok:
        raise ConfigError(f"optimizer.{name} is {value!r}; it must be {right}")


class OptimizerHost(Protocol):
    """What the optimizer's face asks of the engine behind it."""

    def step(self, lr: float | None = None) -> Any: ...
    def discard_gradients(self) -> None: ...
    def optimizer_state(self) -> dict[int, dict[str, Any]]: ...
    def load_optimizer_state(self, state: Mapping[int, Mapping[str, Any]]) -> None: ...


class EngineOptimizer(torch.optim.Optimizer):
    """`engine.optimizer`: param groups over the host parameters, so that learning-rate schedulers and
    trainers work.

    `step()` applies the gradients that the engine has gathered, which `.grad` of the parameters shows
    between `backward()` and `step()`, and drops them, so `zero_grad()` after it changes nothing. Unlike torch's
    it does so also where `zero_grad()` is left out: gradients never add up over steps. The
    state of `state_dict()` are views of the host's memory, not copies, and torch's own casting of loaded
    state is bypassed.
    """

    _is_accelerate_prepared = True  # accelerate would otherwise move the state to its device
    step_was_skipped = False  # the last one, for a norm that is not finite: accelerate holds the learning rate then

    def __init__(self, groups: list[dict[str, Any]], setting: AdamW, host: OptimizerHost) -> None:
        self._host = host
        defaults = {"lr": setting.lr, "betas": setting.betas, "eps": setting.eps, "weight_decay": setting.weight_decay}
        self._complete = False
        super().__init__(groups, defaults)
        self._complete = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises ConfigError: groups are stated when the Engine is made."""
        if self._complete:
            raise ConfigError(
                "optimizer: add_param_group was called, but the engine trains the parameters that its model had when it"
                " was made; put them into the model, and groups into mt.AdamW(param_groups=...), and make a new Engine"
            )
        super().add_param_group(param_group)

    def replace_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """From here on `groups` are the param groups: `params`, lr, betas, eps, weight_decay."""
        self.param_groups.clear()
        for group in groups:
            super().add_param_group({**group, "lr_scale": group["lr"] / groups[0]["lr"] if groups[0]["lr"] else 1.0})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.step_was_skipped = self._host.step().skipped
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._host.discard_gradients()

    def state_dict(self) -> dict[str, Any]:
        packed = super().state_dict()
        packed["state"] = self._host.optimizer_state()
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups = state_dict["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self.param_groups]:
            raise ConfigError("optimizer state is of another model or other param_groups")
        for mine, loaded in zip(self.param_groups, groups, strict=True):
            mine.update({k: v for k, v in loaded.items() if k != "params"})
        self._host.load_optimizer_state(state_dict["state"])

    def set_lr(self, lr: float) -> None:
        """Learning rate of this step for every group, in the proportions the groups were given. Raises ConfigError."""
        check_learning_rate(lr)
        for group in self.param_groups:
            group["lr"] = lr * group["lr_scale"]


def group_hyper_parameters(group: Mapping[str, Any]) -> dict[str, float]:
    """The values of one param group that an update needs; a learning rate may be a tensor (torch schedulers)."""
    lr = group["lr"]
    beta1, beta2 = group["betas"]
    return {
        "lr": float(lr.item() if isinstance(lr, Tensor) else lr),
        "beta1": float(beta1),
        "beta2": float(beta2),
        "eps": float(group["eps"]),
        "weight_decay": float(group["weight_decay"]),
    }
