"""The README.md of an exported model: what it is, what it was trained on and how, as far as the run recorded it."""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from megatrain.checkpoint.folders import step_of
from megatrain.config import to_yaml
from megatrain.errors import ConfigError
from megatrain.report.folder import Run, read_run
from megatrain.report.numbers import count, short
from megatrain.sizes import format_bytes, format_seconds
from megatrain.version import __version__

CARD_NAME = "README.md"
_CHECKPOINTS, _MODEL = "checkpoints", "model"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MOST_FILES = 20


def model_card(folder: str, config: Any, parameters: int, dtype: str) -> str:
    """For the model of `folder`, a run's or a model's own, with that transformers configuration. Of folders above a
    file or model only the last name is said: the card is there to be published."""
    path = Path(os.path.abspath(os.path.expanduser(folder)))
    run = _run(path)
    name = path.name if run is None else run.name
    base = None if run is None or run.config is None else run.config.model.path
    parts = [_front_matter(base, config), f"# {_line(name)}\n"]
    origin = "trained from random weights" if base is None else f"trained from {_code(_last(base))}"
    if run is None or run.config is None:
        origin = "written from a folder that holds no run, so what it was trained on is not known here"
    parts.append(f"A {_code(str(config.model_type))} model with {count(parameters)} parameters in {dtype}, {origin}.\n")
    if run is not None:
        parts += [_training(run), _data(run), _made_with(run), _settings(run)]
    parts.append(
        "## License and use\n\nNot filled in: name the license (in the header above, too), intended use, limits and"
        " risks before you publish this model.\n"
    )
    return "\n".join(part for part in parts if part)


def _run(folder: Path) -> Run | None:
    """The run that `folder` is or belongs to: a run's own, one of its checkpoints (then as it was at that step), or the
    model in either."""
    if folder.name == _MODEL:
        folder = folder.parent
    step = step_of(folder) if folder.parent.name == _CHECKPOINTS else None
    try:
        return read_run(folder) if step is None else read_run(folder.parent.parent).up_to(step)
    except ConfigError:
        return None


def _front_matter(base: str | None, config: Any) -> str:
    """What the hub reads. A base that is a folder here means nothing there."""
    task = "text-generation" if getattr(config, "vision_config", None) is None else "image-text-to-text"
    content: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task, "tags": ["megatrain"]}
    if base is not None and _HUB_ID.fullmatch(base) and not os.path.exists(os.path.expanduser(base)):
        content = {"base_model": base, **content}
    return f"---\n# license: to be filled in, such as apache-2.0\n{yaml.safe_dump(content, sort_keys=False)}---\n"


def _training(run: Run) -> str:
    metrics = run.metrics
    if not metrics.lines:
        return ""
    for_all = run.last_step / len(metrics.lines)
    about = "" if for_all == 1 else "about "
    rows = [
        ("optimizer steps", f"{run.last_step:,}"),
        ("target tokens", f"{about}{count(metrics.total('target_tokens') * for_all)}"),
        ("time in steps", f"{about}{format_seconds(metrics.total('seconds') * for_all)}"),
    ]
    loss = metrics.series("loss").finite
    if len(loss.steps):
        rows.append(("last training loss", f"{short(float(loss.values[-1]))} {run.loss_unit}"))
    for series in (one.finite for one in metrics.evaluated()):
        if len(series.steps):
            rows.append((f"last {series.name} loss", f"{short(float(series.values[-1]))} {run.loss_unit}"))
    total = run.total_steps
    early = f"\nThe run was meant to have {total:,} steps.\n" if total is not None and run.last_step < total else ""
    return f"## Training\n\n{_table(rows)}{early}"


def _data(run: Run) -> str:
    """The files whose hashes the run recorded, or what its settings name."""
    settings = run.settings
    files = [] if settings is None else settings["facts"]["data"]
    if files:
        sizes = [file["bytes"] for file in files if isinstance(file.get("bytes"), int)]
        listed = "".join(f"- {_code(_last(file['path']))}, sha256 `{file['sha256']}`\n" for file in files[:_MOST_FILES])
        more = f"- and {len(files) - _MOST_FILES:,} more\n" if len(files) > _MOST_FILES else ""
        return f"## Data\n\n{_count(len(files), 'file')}, {format_bytes(sum(sizes))}:\n\n{listed}{more}"
    named = [] if run.config is None else _as_list(run.config.data.train)
    return "## Data\n\n" + "".join(f"- {_code(_last(str(one)))}\n" for one in named) if named else ""


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _made_with(run: Run) -> str:
    settings = run.settings
    if settings is None:
        return f"## Made with\n\nMegaTrain {__version__} (full-precision training of all parameters).\n"
    facts, engine = settings["facts"], settings["engine"]
    hardware = facts["hardware"]
    libraries = ", ".join(f"{name} {version}" for name, version in facts["libraries"].items() if version)
    rows = [
        ("software", f"MegaTrain {facts['code'].get('version')}"),
        ("libraries", libraries),
        ("computed on", f"{hardware.get('device')}, {engine['precision']}"),
        ("host", f"{hardware.get('cpu')}, {hardware.get('cores')} cores"),
    ]
    if run.ledger is not None and run.ledger.entries:
        rows.append(("head of the run's ledger", f"sha256 {run.ledger.entries[-1].sha256}"))
    return f"## Made with\n\n{_table(rows)}"


def _settings(run: Run) -> str:
    if run.config is None:
        return ""
    content = _without_folders(yaml.safe_load(to_yaml(run.config)))
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    fence = "`" * max(3, 1 + max((len(found) for found in re.findall("`+", text)), default=0))
    return f"## Settings\n\n{fence}yaml\n{text}{fence}\n"


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_folders(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return _last(value) if isinstance(value, str) else value


def _last(path: str) -> str:
    """The last name of a path from the root, the home or a folder above; others are said as they are."""
    return Path(path).name or path if path.startswith(("/", "~", "..")) else path


def _table(rows: list[tuple[str, str]]) -> str:
    lines = "".join(f"| {_line(name)} | {_line(value)} |\n" for name, value in rows)
    return f"| | |\n|---|---|\n{lines}"


def _line(text: str) -> str:
    """Text of the run on one line of Markdown, with nothing in it that marks up."""
    shown = "".join(c if c.isprintable() else " " for c in text)
    return re.sub(r"([\\`*_\[\]<>|#~&!])", r"\\\1", shown)


def _code(text: str) -> str:
    shown = "".join(c if c.isprintable() else " " for c in text)
    return f"`{shown.replace('`', chr(39))}`"
