"""Measure what this machine can, and write docs/results.md.

    python benchmarks/reproduce.py                 all parts; each comparison of one takes at most --budget seconds
                                                   (default 240), in all 30 min at most, some 15 on two idle cores
    python benchmarks/reproduce.py --only depth    one part, such as for a machine that is lent for ten minutes
    python benchmarks/reproduce.py --page          nothing is measured, the page is written from the results there are
    python benchmarks/reproduce.py --quick         tiny sizes, one round: whether everything runs; pass --results and
                                                   --write for files of its own, or nothing is kept

Parts: rivals, depth, width, ablations, and gpu (benchmarks/gpu.py) where there is one.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import ablations
import compare
import harness  # noqa: F401 (first: it prepares the environment)
import sweeps
import torch
from harness import BENCHMARKS
from harness.results import RESULTS, read_results
from page.write import write_page

PARTS = ("rivals", "depth", "width", "ablations", "gpu")
PAGE = BENCHMARKS.parent / "docs" / "results.md"


def run_part(part: str, options: argparse.Namespace, results: Path) -> int:
    """Sweeps and ablations on the GPU, or on both devices that a host can play."""
    shared = ["--results", str(results), "--budget", str(options.budget), "--rounds", str(1 if options.quick else 3)]
    shared += ["--tiny", "--steps", "1"] if options.quick else []
    if part == "gpu":  # apart: it holds the device's memory
        command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--budget", str(options.budget)]
        return subprocess.run([*command, "--results", str(results)], check=False).returncode
    if part == "rivals":
        return compare.main([*shared, *(["--systems", options.systems] if options.systems else [])])
    devices = ["cuda"] if torch.cuda.is_available() else ["lagged", "cpu"]
    if part == "ablations":
        return max(ablations.main([*shared, "--device", device]) for device in devices)
    return max(sweeps.main([*shared, "--device", device, "--only", part]) for device in devices)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", default="", help=f"of {', '.join(PARTS)} (default: what this machine can)")
    parser.add_argument("--systems", default="", help="of the part rivals (default: all)")
    parser.add_argument(
        "--budget", type=float, default=240.0, metavar="SECONDS", help="of each comparison (default: 240)"
    )
    parser.add_argument("--page", action="store_true", help="write the page, measure nothing")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results.csv; with --quick none that stays")
    parser.add_argument("--write", type=Path, help="default: docs/results.md; with --quick none that stays")
    options = parser.parse_args(argv)
    possible = PARTS if torch.cuda.is_available() and not options.quick else PARTS[:-1]
    options.parts = [part for part in options.only.split(",") if part] or list(possible)
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"--only: there is no {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    started, code = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) if options.quick else None
        results = options.results or (home / "results.csv" if home is not None else RESULTS)
        page = options.write or (home / "results.md" if home is not None else PAGE)
        for part in [] if options.page else options.parts:
            print(f"== {part}", flush=True)
            code = max(code, run_part(part, options, results))
        no_plots = write_page(page, read_results(results))
    if no_plots is not None:
        print(f"no plots: {no_plots}")
    print(f"\n{page} is written; {(time.perf_counter() - started) / 60:.1f} min")
    return code


if __name__ == "__main__":
    sys.exit(main())
