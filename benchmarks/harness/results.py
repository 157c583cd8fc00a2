"""One file of results: a row for each metric, with the machine and the versions that it comes from."""

import csv
from collections.abc import Mapping
from pathlib import Path

from harness import BENCHMARKS
from harness.percentiles import Spread

RESULTS = BENCHMARKS / "results.csv"
MACHINE = ("date", "commit", "device", "driver", "cpu", "cores", "host_memory", "load", "versions")
COLUMNS = (*MACHINE, "part", "case", "metric", "value", "p20", "p80", "unit", "note")

Value = tuple[float | Spread, str]  # and its unit; of a Spread the median is the row's value


class Results:
    """Rows go to the end of the file at once, so that what is measured before something fails is kept.

    path: None writes nothing. machine: as `describe_machine` gives it.
    """

    def __init__(self, path: Path | None, machine: Mapping[str, str]) -> None:
        self._path = path
        self._machine = dict(machine)

    def record(self, part: str, case: str, **metrics: Value) -> None:
        rows = []
        for metric, (value, unit) in metrics.items():
            spread = value if isinstance(value, Spread) else None
            row = {"part": part, "case": case, "metric": metric, "unit": unit}
            row["value"] = f"{spread.p50 if spread is not None else value:.6g}"
            if spread is not None:
                row |= {"p20": f"{spread.p20:.6g}", "p80": f"{spread.p80:.6g}"}
            rows.append(row)
        self._append(rows)

    def not_measured(self, part: str, case: str, why: str) -> None:
        self._append([{"part": part, "case": case, "metric": "not_measured", "note": why}])

    def note(self, part: str, case: str, metric: str, text: str) -> None:
        """What is no number."""
        self._append([{"part": part, "case": case, "metric": metric, "note": text}])

    def _append(self, rows: list[dict[str, str]]) -> None:
        if self._path is None:
            return
        new = not self._path.exists() or not self._path.stat().st_size
        with self._path.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(self._machine | row for row in rows)


def read_results(path: Path) -> list[dict[str, str]]:
    """All rows, the oldest first; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))
