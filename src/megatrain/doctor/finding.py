"""What a check says."""

from dataclasses import dataclass
from typing import Literal, get_args

Level = Literal["problem", "warning", "note"]
LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True, slots=True)
class Finding:
    """`problem`: training fails, or leaves out a GPU that is there. `warning`: slow, or a limit that a larger model
    meets. `note`: good to know."""

    level: Level
    what: str
    remedy: str
