"""Run the `megatrain plan` commands of pages again and put what they print below them.

python docs/plans.py [PAGE.md ...]     all pages that have such commands, if none is named
"""

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

from megatrain import cli

_PAGES = ("planning.md", "hardware.md")
_BLOCK = re.compile(r"```console\n\$ megatrain (plan [^\n]*)\n.*?```\n", re.DOTALL)


def main(names: list[str]) -> None:
    """Commands run in the repository's root, as a reader would run them."""
    folder = Path(__file__).parent.resolve()
    with contextlib.chdir(folder.parent):
        for name in names or _PAGES:
            page = folder / name
            page.write_text(_BLOCK.sub(_run, page.read_text(encoding="utf-8")), encoding="utf-8")


def _run(block: re.Match[str]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = cli.main(shlex.split(block[1]))
    lines = "\n".join(line.rstrip() for line in printed.getvalue().splitlines())
    return f"```console\n$ megatrain {block[1]}\n{lines}\n(exit code {code})\n```\n"


if __name__ == "__main__":
    main(sys.argv[1:])
