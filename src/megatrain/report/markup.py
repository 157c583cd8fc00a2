"""HTML that is escaped by construction: text becomes markup through `tag` alone."""

import html

Value = str | int | float | None


class Html(str):
    """Markup. Every other string is text, and is escaped where it becomes a part of markup."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: Value) -> Html:
    """An element. Attributes that are None are left out; a trailing `_` of a name goes, other `_` become `-`."""
    parts = [name]
    for key, value in attributes.items():
        if value is not None:
            parts.append(f'{key.rstrip("_").replace("_", "-")}="{html.escape(_plain(value))}"')
    return Html(f"<{' '.join(parts)}>{join(*children)}</{name}>")


def join(*children: str) -> Html:
    return Html("".join(child if isinstance(child, Html) else html.escape(_shown(child)) for child in children))


def _plain(value: Value) -> str:
    """Coordinates need no more than a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else _shown(str(value))


def _shown(text: str) -> str:
    """What no page may hold is written out: control characters, halves of surrogates, and what turns text around."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in "\n\t" or (c.isspace() and c > "\x7f") else ascii(c)[1:-1] for c in text
    )
