"""docs/api.md is what docs/api.py makes of the docstrings."""

import importlib.util
from pathlib import Path

import megatrain as mt

DOCS = Path(__file__).parents[2] / "docs"


def made() -> str:
    spec = importlib.util.spec_from_file_location("api", DOCS / "api.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.page())


def test_the_page_is_as_the_docstrings_are() -> None:
    assert made() == (DOCS / "api.md").read_text(encoding="utf-8"), "run `python docs/api.py`"


def test_everything_that_is_exported_is_on_the_page() -> None:
    page = made()
    assert all(name in page for name in mt.__all__ if name != "__version__")
    assert "_mapped" not in page and "\n\n\n" not in page
