"""Commands, settings, links and files that the guides for users name are there."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from megatrain.cli import _parser
from megatrain.config import Config, parse_config

ROOT = Path(__file__).parents[2]
GUIDES = ("quickstart", "hardware", "coming-from", "troubleshooting", "docker")
TEXTS = {name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in GUIDES}


def sections() -> dict[str, set[str]]:
    """Section -> keys."""
    made = Config()
    named = {spec.name: getattr(made, spec.name) for spec in dataclasses.fields(Config)}
    return {
        name: {spec.name for spec in dataclasses.fields(value)}
        for name, value in named.items()
        if dataclasses.is_dataclass(value)
    }


def anchor_of(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("guide", GUIDES)
def test_settings_are_keys(guide: str) -> None:
    known = sections()
    words = re.findall(rf"\b({'|'.join(known)})\.([a-z_]+)", re.sub(r"\w+\.(md|py|yaml|html|json)\b", "", TEXTS[guide]))
    methods = {("engine", name) for name in ("train_step", "flush", "close", "optimizer")}
    wrong = {(section, key) for section, key in words if key not in known[section]} - methods
    assert not wrong


@pytest.mark.parametrize("guide", GUIDES)
def test_commands_are_commands(guide: str) -> None:
    (commands,) = [action.choices for action in _parser()._actions if action.metavar == "COMMAND"]
    assert commands is not None
    used = set(re.findall(r"(?:^|\$ |`)megatrain ([a-z]+)", TEXTS[guide], re.MULTILINE))
    assert used and used <= set(commands)


@pytest.mark.parametrize("guide", GUIDES)
def test_links_lead_somewhere(guide: str) -> None:
    for page, _, anchor in re.findall(r"\]\(([\w./-]+)(#([\w-]+))?\)", TEXTS[guide]):
        path = ROOT / "docs" / page
        assert path.exists(), page
        headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in map(anchor_of, headings), f"{page}#{anchor}"


def test_settings_of_another_program_become_ours() -> None:
    theirs, ours = (
        yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", TEXTS["coming-from"], re.S)[-2:]
    )
    config = parse_config(ours)
    assert config.model.path == theirs["model_name_or_path"] and config.data.seq_len == theirs["cutoff_len"]
    rows = theirs["per_device_train_batch_size"] * theirs["gradient_accumulation_steps"]
    assert config.train.tokens_per_step == rows * theirs["cutoff_len"]
    assert config.optimizer.lr == theirs["learning_rate"] and config.train.epochs == theirs["num_train_epochs"]
