"""`report.html`: one page that loads nothing and runs nothing but its own script, whatever is in the run."""

import base64
import hashlib
import os
from pathlib import Path

from megatrain.errors import ConfigError
from megatrain.private_files import private
from megatrain.report.folder import Run, read_run
from megatrain.report.markup import Html, join, tag
from megatrain.report.script import SCRIPT
from megatrain.report.sections import ALL
from megatrain.report.style import STYLE
from megatrain.version import __version__

REPORT_NAME = "report.html"


def write_report(
    run: str | os.PathLike[str], output: str | os.PathLike[str] | None = None, *, name: str | None = None
) -> Path:
    """Write the page of the run in folder `run`, into that folder or to `output`; returns where it is. `name`: what the
    run is called, where that is not its folder.

    It is open to its owner alone, as what it shows is. Raises ConfigError where there is no run, or the page cannot be
    written.
    """
    root = Path(os.path.expanduser(run))
    found = read_run(root)
    found.name = name or found.name
    page = render(found)
    path = root / REPORT_NAME if output is None else Path(os.path.expanduser(output))
    try:
        with open(path, "w", encoding="utf-8", opener=private) as stream:
            stream.write(page)
    except OSError as error:
        raise ConfigError(f"--output: cannot write {str(path)!r}: {error.strerror}; give another file") from None
    return path


def render(run: Run) -> str:
    """The whole page."""
    head = join(
        Html('<meta charset="utf-8">'),
        Html('<meta name="viewport" content="width=device-width,initial-scale=1">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{_policy()}">'),
        Html('<meta name="referrer" content="no-referrer">'),
        tag("title", f"{run.name}: a MegaTrain run"),
        Html(f"<style>{STYLE}</style>"),
    )
    footer = tag("footer", f"Made by megatrain report, version {__version__}, from the run's own files.")
    main = tag("main", *(part(run) for part in ALL), footer)
    body = tag("body", _hatching(), main, Html(f"<script>{SCRIPT}</script>"))
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>{body}</html>\n'


def _policy() -> str:
    """Nothing is fetched, nothing is sent, and of styles and scripts only those whose hash is here are used."""
    return (
        f"default-src 'none'; style-src '{_source_hash(STYLE)}'; script-src '{_source_hash(SCRIPT)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _source_hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _hatching() -> Html:
    """The pattern of waiting."""
    line = tag("path", d="M0 6L6 0", class_="hatch")
    pattern = tag("pattern", line, id="hatch", width=6, height=6, patternUnits="userSpaceOnUse")
    return tag("svg", tag("defs", pattern), class_="defs", aria_hidden="true")
