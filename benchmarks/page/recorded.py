"""Rows of results as the page needs them: of each comparison the last run, whole."""

from collections.abc import Iterable
from dataclasses import dataclass, field

Row = dict[str, str]
HOST_DEVICES = ("cpu", "lagged")


@dataclass(slots=True)
class Case:
    """One line of a table: metrics and notes by their name."""

    name: str
    rows: dict[str, Row] = field(default_factory=dict)

    @property
    def not_measured(self) -> str | None:
        row = self.rows.get("not_measured")
        return None if row is None else row["note"]

    def median(self, metric: str) -> float | None:
        row = self.rows.get(metric)
        return float(row["value"]) if row is not None else None

    def text(self, metric: str, digits: str = ".3g", scale: float = 1.0, unit: str = "") -> str:
        """The median, and p20 to p80 where there are several; '–' where it was not recorded."""
        row = self.rows.get(metric)
        if row is None:
            return "–"
        shown = [format(float(row[name]) * scale, digits) for name in ("value", "p20", "p80") if row[name]]
        return shown[0] + unit + (f" ({shown[1]}–{shown[2]})" if len(shown) == 3 and len({*shown}) > 1 else "")

    def note(self, metric: str) -> str:
        return self.rows[metric]["note"] if metric in self.rows else ""


@dataclass(slots=True)
class Comparison:
    """One run of a part in one setting on one device."""

    part: str
    setting: str
    machine: Row
    cases: dict[str, Case] = field(default_factory=dict)

    @property
    def device(self) -> str:
        return self.machine["device"]

    @property
    def measured(self) -> list[Case]:
        return [case for case in self.cases.values() if case.not_measured is None]


def comparisons(rows: Iterable[Row], part: str) -> list[Comparison]:
    """Of each setting and device the last run. Cases without a setting are compared with nothing: of each the last."""
    found: dict[tuple[str, str], Comparison] = {}
    for row in rows:
        if row["part"] != part:
            continue
        setting, _, name = row["case"].rpartition(": ")
        key = (setting, row["device"])
        if key not in found or (setting and not _same_run(row, found[key].machine)):
            found[key] = Comparison(part, setting, row)
        cases = found[key].cases
        if name not in cases or not _same_run(row, next(iter(cases[name].rows.values()))):
            cases[name] = Case(name)
        cases[name].rows[row["metric"]] = row
    return list(found.values())


def _same_run(one: Row, other: Row) -> bool:
    return (one["date"], one["commit"]) == (other["date"], other["commit"])


def on_gpus(found: Iterable[Comparison]) -> list[Comparison]:
    return [one for one in found if one.device not in HOST_DEVICES]
