"""`megatrain init`: a commented config for a model and data, with what the plan of a machine says of them.

What the plan decides (tokens per step, micro-batch, what gives way where memory is short) stands in the file with its
reason; what it does not has its default.
"""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatrain.config import override, parse_config
from megatrain.errors import CapacityError, ConfigError
from megatrain.planner.plan import Plan
from megatrain.report.numbers import count
from megatrain.sizes import format_bytes, format_seconds
from megatrain.train.build import find_corpora
from megatrain.train.data_amount import tokens_per_epoch
from megatrain.train.method import with_method
from megatrain.train.model_settings import ModelSettings, read_model_settings
from megatrain.train.plan_command import plan_here_or_there
from megatrain.trust.durable import write_durably

_SEQ_LEN = 2048
_LEAST_TOKENS_PER_STEP = 16 * 1024
_MOST_TOKENS_PER_STEP = 512 * 1024
_FEWEST_STEPS = 50  # of which a model learns something, if there are enough data
_FAST_TOKENS = 8 * 1024  # of a micro-batch: with fewer a GPU's products are slower
_EXPOSED_SHARE = 0.1  # of a step, that more tokens per step would hide
_SHORTER = re.compile(r"sequences of ([\d,]+) tokens")


@dataclass(frozen=True)
class Wish:
    """What the user says. `data` and `evaluation`: as `data.train` and `data.eval` take them. None: as planned."""

    model: str
    data: tuple[str, ...]
    evaluation: tuple[str, ...]
    epochs: float
    seq_len: int | None
    nvme: str | None
    hardware: str | None


@dataclass(frozen=True)
class _Found:
    """Settings that fit, their plan, and what gave way for it, each a setting and its reason."""

    settings: dict[str, Any]
    plan: Plan
    gave_way: dict[str, str]
    data: "_Data"

    @property
    def steps(self) -> int | None:
        """That the run will have; None where the data have not been looked at."""
        tokens_per_step = self.settings["train"]["tokens_per_step"]
        return None if self.data.tokens is None else max(1, self.data.tokens // tokens_per_step)


@dataclass(frozen=True)
class _Data:
    """How the model learns from them, and tokens of all passes (None: they have not been looked at)."""

    method: str
    tokens: int | None

    @property
    def most_tokens_per_step(self) -> int:
        if self.tokens is None:
            return _MOST_TOKENS_PER_STEP
        return min(_MOST_TOKENS_PER_STEP, self.tokens // _FEWEST_STEPS)


def init(wish: Wish, target: Path, *, replace: bool = False) -> Plan:
    """Write the config to `target`; returns the plan that it is made of. Raises ConfigError, and CapacityError where
    the model has no room on the machine, whatever gives way: then nothing is written."""
    if os.path.lexists(target) and not replace:
        raise ConfigError(f"{str(target)!r} is there already; give another name or --replace")
    found = _settle(wish)
    text = _text(wish, found)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_durably(target, text.encode())
    except OSError as error:
        raise ConfigError(f"cannot write {str(target)!r}: {error.strerror}") from None
    return found.plan


# -- what to say ----------------------------------------------------------------------------------------------


def _settle(wish: Wish) -> _Found:
    model = read_model_settings(parse_config({"model": {"path": wish.model}}, for_training=False))
    seq_len = _seq_len(wish, model)
    data = _look_at_data(wish, seq_len, model)
    together = _together(data.method, seq_len)
    tokens = max(1, min(_LEAST_TOKENS_PER_STEP, data.most_tokens_per_step) // together) * together
    settings: dict[str, Any] = {
        "model": {"path": wish.model},
        "data": {"seq_len": seq_len},
        "train": {"method": data.method, "tokens_per_step": tokens},
        "engine": {"nvme": wish.nvme} if wish.nvme else {},
    }
    if data.method == "dpo":
        settings["engine"]["micro_batch"] = 1  # a pair, which the planner cannot divide
    found = _with_larger_micro_batch(wish, _that_fits(wish, settings, model, data), model)
    while _exposed_share(found.plan) > _EXPOSED_SHARE:
        more = {**found.settings, "train": {**found.settings["train"]}}
        more["train"]["tokens_per_step"] *= 2
        if more["train"]["tokens_per_step"] > data.most_tokens_per_step:
            break
        plan = _plan(wish, more, model)
        if not plan.fits:
            break
        found = dataclasses.replace(found, settings=more, plan=plan)
    return found


def _seq_len(wish: Wish, model: ModelSettings) -> int:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 2:
        return wish.seq_len or _SEQ_LEN
    if wish.seq_len is not None and wish.seq_len > longest:
        raise ConfigError(f"--seq-len: {wish.seq_len} is more than the model's max_position_embeddings, {longest}")
    return wish.seq_len or min(longest, _SEQ_LEN)


def _look_at_data(wish: Wish, seq_len: int, model: ModelSettings) -> _Data:
    data = {"train": list(wish.data), "eval": list(wish.evaluation) or None, "seq_len": seq_len}
    config = parse_config({"model": {"path": wish.model}, "data": data}, for_training=False)
    corpora = find_corpora(config)
    config = with_method(config, corpora.train.kind)
    tokens = tokens_per_epoch(config, corpora, model)
    return _Data(config.train.method, None if tokens is None else int(tokens * wish.epochs))


def _together(method: str, seq_len: int) -> int:
    """Tokens of the fewest sequences that a step can have."""
    return 2 * seq_len if method == "dpo" else seq_len


def _plan(wish: Wish, settings: dict[str, Any], model: ModelSettings) -> Plan:
    config = parse_config(settings, for_training=False)
    chooses = "micro_batch" not in settings["engine"]
    name = Path(wish.model).name or wish.model
    return plan_here_or_there(
        config, model, name=name, hardware_name=wish.hardware, options={}, chooses_micro_batch=chooses
    )


def _that_fits(wish: Wish, settings: dict[str, Any], model: ModelSettings, data: _Data) -> _Found:
    """As wished, or with the first change that makes it fit and needs nothing that is not there."""
    plan = _plan(wish, settings, model)
    if plan.fits:
        return _Found(settings, plan, {}, data)
    missing = "; ".join(f"{format_bytes(n)} of {tier} memory" for tier, n in plan.candidate.missing.items())
    for remedy in plan.remedies:
        changes = _changes(remedy.change, settings["data"]["seq_len"]) if remedy.fits else None
        if changes is None:
            continue
        tried: dict[str, Any] = {name: dict(section) for name, section in settings.items()}
        override(tried, list(changes.items()))
        other = _plan(wish, tried, model)
        if other.fits:
            return _Found(tried, other, dict.fromkeys(changes, f"without it, {missing} would be missing"), data)
    raise CapacityError(plan.refusal())


def _with_larger_micro_batch(wish: Wish, found: _Found, model: ModelSettings) -> _Found:
    """On this machine's GPU: as many sequences together as it computes fast, if they fit. On other hardware the planner
    chooses; on the host it makes no difference."""
    if wish.hardware is not None or found.plan.hardware.computes_in_host_memory:
        return found
    size = _FAST_TOKENS // found.settings["data"]["seq_len"]
    while size > 1 and "engine.micro_batch" not in found.gave_way:
        together: dict[str, Any] = {name: dict(section) for name, section in found.settings.items()}
        together["engine"]["micro_batch"] = size
        least = size * _together(found.data.method, together["data"]["seq_len"])
        if together["train"]["tokens_per_step"] % least == 0:
            plan = _plan(wish, together, model)
            if plan.fits:
                return dataclasses.replace(found, settings=together, plan=plan)
        size //= 2
    return found


def _changes(words: str, seq_len: int) -> dict[str, str] | None:
    """Settings by key, of a remedy as the plan words it; None where it asks for what only the user can give."""
    found: dict[str, str] = {}
    for part in words.split(" and "):
        shorter = _SHORTER.fullmatch(part)
        key, _, value = ("data.seq_len", "", shorter[1].replace(",", "")) if shorter else part.partition(" ")
        if key == "engine.nvme" or " " in value:
            return None
        found[key] = value
    return found


def _exposed_share(plan: Plan) -> float:
    seconds = plan.simulation.step_seconds
    return sum(plan.simulation.exposed.values()) / seconds if seconds else 0.0


# -- the file -------------------------------------------------------------------------------------------------


def _text(wish: Wish, found: _Found) -> str:
    lines = [*_heading(found.plan), ""]
    for section, entries in _sections(wish, found).items():
        lines.append(f"{section}:")
        for name, (value, why) in entries.items():
            why = found.gave_way.get(f"{section}.{name}", why)
            lines.append(f"  {name}: {_scalar(value)}" + (f"  # {why}" if why else ""))
    return "\n".join(lines) + "\n"


def _heading(plan: Plan) -> Iterator[str]:
    """The plan in a few lines."""
    workload, hardware = plan.workload, plan.hardware
    parameters = count(workload.parameters)
    yield f"# {workload.name}: {parameters} parameters, {workload.precision}, on {hardware.name}."
    for tier, held in plan.ledger.items():
        shown = ", ".join(
            f"{name} {format_bytes(n)}" for name, n in sorted(held.items(), key=lambda item: -item[1])[:4]
        )
        available = plan.available.get(tier, 0)
        room = f" of {format_bytes(available)}" if available < 1 << 60 else ""
        yield f"#   {tier} memory: {format_bytes(plan.peak_bytes(tier))}{room} ({shown}, ...)"
    seconds = format_seconds(plan.simulation.step_seconds)
    yield f"#   a step of {plan.tokens:,} tokens: {seconds} predicted, {plan.tokens_per_second:,.0f} tokens/s;"
    yield f"#   bound by {plan.simulation.bound_by}"
    yield "# `megatrain plan` with this file says more, `megatrain config` what every key means,"
    yield "# `megatrain data` with this file what the model will see."


def _sections(wish: Wish, found: _Found) -> Mapping[str, Mapping[str, tuple[Any, str]]]:
    """Section -> key -> (value, why)."""
    settings, plan, steps = found.settings, found.plan, found.steps
    train: dict[str, tuple[Any, str]] = {
        "method": (found.data.method, _METHODS[found.data.method]),
        "epochs": (wish.epochs, "passes over data.train; or steps, or tokens"),
        "tokens_per_step": (settings["train"]["tokens_per_step"], _why_so_many(found)),
    }
    lr, why_lr = 1e-5, "usual for going on from a pretrained model"
    if found.data.method == "dpo":
        lr, why_lr = 5e-7, "far lower than for fine-tuning: with 1e-5 answers soon fall apart"
        train["dpo_beta"] = (0.1, "how strongly the weights that training begins with hold")
    warmup, every = (0, "raise it to a few percent of the steps"), 500
    if steps is not None:
        warmup, every = (round(0.03 * steps), "3% of the steps"), min(500, -(-steps // 4))
    data: dict[str, tuple[Any, str]] = {"train": (_one_or_list(wish.data), "")}
    if wish.evaluation:
        data["eval"] = (_one_or_list(wish.evaluation), "held out")
    data["seq_len"] = (settings["data"]["seq_len"], "tokens per sequence")
    together = settings["engine"].get("micro_batch", plan.placement.micro_batch)
    what = "pairs" if found.data.method == "dpo" else "sequences"
    engine: dict[str, tuple[Any, str]] = {"micro_batch": (together, f"{what} that pass together")}
    sections: dict[str, dict[str, tuple[Any, str]]] = {
        "model": {"path": (wish.model, "")},
        "data": data,
        "optimizer": {"lr": (lr, why_lr)},
        "schedule": {"name": ("cosine", ""), "warmup_steps": warmup},
        "train": train,
        "engine": engine,
        "checkpoint": {
            "every": (every, f"steps between checkpoints of {format_bytes(_checkpoint_bytes(plan))} each"),
            "keep": (2, ""),
        },
    }
    if wish.evaluation:
        often = 500 if steps is None else -(-steps // 10)
        sections["eval"] = {"every": (often, "steps between measurements of data.eval; the best checkpoint stays")}
    for section in settings:
        for name, value in settings[section].items():
            sections[section].setdefault(name, (value, ""))
    return sections


_METHODS = {
    "pretrain": "every token of a text",
    "sft": "the answers of conversations",
    "dpo": "pairs of a chosen and a rejected answer",
}


def _why_so_many(found: _Found) -> str:
    share, steps = _exposed_share(found.plan), found.steps
    hidden = f"copies and updates hide behind compute, but for {share:.0%} of a step"
    if share > _EXPOSED_SHARE:
        hidden = f"{share:.0%} of a step is waiting for copies and updates; more tokens per step would hide more"
    if steps is None:
        return hidden
    few = ", as the data are few" if found.settings["train"]["tokens_per_step"] < _LEAST_TOKENS_PER_STEP else ""
    return f"{steps:,} step{'' if steps == 1 else 's'}{few}; {hidden}"


def _checkpoint_bytes(plan: Plan) -> int:
    state = ("weights", "remainders", "moments")
    return sum(n for held in plan.ledger.values() for name, n in held.items() if name in state)


def _one_or_list(values: tuple[str, ...]) -> Any:
    return values[0] if len(values) == 1 else list(values)


def _scalar(value: Any) -> str:
    """As YAML writes it in one line."""
    return (
        yaml.safe_dump(value, default_flow_style=True, width=1 << 20, allow_unicode=True).removesuffix("...\n").strip()
    )
