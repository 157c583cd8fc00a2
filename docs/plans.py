"""Run the commands in planning.md again and put what they print below them.

python docs/plans.py
"""

import contextlib
import io
import re
import shlex
from pathlib import Path

from megatrain import cli

_PAGE = Path(__file__).with_name("planning.md")
_BLOCK = re.compile(r"```console\n\$ megatrain (plan [^\n]*)\n.*?```\n", re.DOTALL)


def main() -> None:
    """Commands run in the repository's root, as a reader would run them."""
    text = _PAGE.read_text(encoding="utf-8")
    with contextlib.chdir(_PAGE.parent.parent):
        _PAGE.write_text(_BLOCK.sub(_run, text), encoding="utf-8")


def _run(block: re.Match[str]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = cli.main(shlex.split(block[1]))
    lines = "\n".join(line.rstrip() for line in printed.getvalue().splitlines())
    return f"```console\n$ megatrain {block[1]}\n{lines}\n(exit code {code})\n```\n"


if __name__ == "__main__":
    main()
