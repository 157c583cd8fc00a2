"""Lines that docs/troubleshooting.md explains are lines that the package can say."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
LINES = re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)


def texts_of(source: str) -> Iterator[str]:
    """Texts of a module that are no docstrings, with `…` in place of what is filled in."""
    tree = ast.parse(source)
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in statements:
            yield re.sub("%[sdr]", "…", node.value)


@pytest.fixture(scope="module")
def said() -> str:
    """All texts of the package, one to a line."""
    sources = sorted((ROOT / "src" / "megatrain").rglob("*.py"))
    texts = (text for path in sources for text in texts_of(path.read_text(encoding="utf-8")))
    return "\n".join(text.replace("\n", " ") for text in texts)


def test_texts_are_found_as_they_are_said() -> None:
    module = '"""said nowhere"""\nraise E(f"{a} is wrong;"\n f" expected {b}")\nlog.warning("%s of %d", a, b)\n'
    assert "said nowhere" not in list(texts_of(module))
    assert {"… is wrong; expected …", "… of …"} <= set(texts_of(module))


def test_the_page_has_lines() -> None:
    assert len(LINES) > 60 and len(set(LINES)) == len(LINES)


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_the_page_is_in_the_sources(line: str, said: str) -> None:
    assert re.search(".*".join(re.escape(part) for part in line.split("…")), said), line
