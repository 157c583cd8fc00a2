"""Draws docs/step.svg: one training step as data flows. Run it again after changing it: `python docs/step.py`."""

from pathlib import Path

INK, SOFT, FORWARD, BACKWARD, HOST = "#1f2430", "#5b6474", "#cfe3ff", "#ffd9c7", "#d9f0d3"
UNITS = ["embed", "block 0", "block 1", "…", "block N", "head"]
X0, STEP, WIDE, HIGH = 150, 108, 92, 30


def box(x: float, y: float, text: str, fill: str) -> str:
    return (
        f'<rect x="{x}" y="{y}" width="{WIDE}" height="{HIGH}" rx="5" fill="{fill}" stroke="{INK}" stroke-width="1"/>'
        f'<text x="{x + WIDE / 2}" y="{y + 20}" text-anchor="middle">{text}</text>'
    )


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{SOFT}" stroke-width="1.4" marker-end="url(#a)"/>'


def label(x: float, y: float, text: str, anchor: str = "start", size: int = 13) -> str:
    style = 'paint-order="stroke" stroke="#ffffff" stroke-width="5"'
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{SOFT}" font-size="{size}" {style}>{text}</text>'


def draw() -> str:
    parts = []
    forward_y, backward_y, host_y = 92, 172, 284
    for i, name in enumerate(UNITS):
        x = X0 + i * STEP
        parts.append(box(x, forward_y, name, FORWARD))
        parts.append(box(x, backward_y, name, BACKWARD))
        parts.append(box(x, host_y, name if name == "…" else "2+2+4+4 B", HOST))
        if i + 1 < len(UNITS):
            parts.append(arrow(x + WIDE, forward_y + 15, x + STEP - 2, forward_y + 15))
            parts.append(arrow(x + STEP, backward_y + 15, x + WIDE + 2, backward_y + 15))
        parts.append(arrow(x + WIDE / 2, backward_y + HIGH, x + WIDE / 2, host_y - 2))
    last = X0 + (len(UNITS) - 1) * STEP + WIDE
    parts.append(
        f'<path d="M {last} {forward_y + 15} C {last + 38} {forward_y + 15} {last + 38} {backward_y + 15} '
        f'{last + 4} {backward_y + 15}" fill="none" stroke="{SOFT}" stroke-width="1.4" marker-end="url(#a)"/>'
    )
    parts.append(label(16, forward_y + 20, "forward"))
    parts.append(label(16, backward_y + 20, "backward"))
    parts.append(label(16, host_y + 20, "host memory"))
    parts.append(
        label(
            X0,
            forward_y - 36,
            "Micro-batches of any shape pass a unit together, while its weights are bound.",
        )
    )
    parts.append(label(X0, forward_y - 16, "Only each unit's inputs are kept; head and loss run in chunks of tokens."))
    parts.append(
        label(
            X0,
            backward_y + 56,
            "Each unit is recomputed and differentiated by itself. Its gradient is summed in",
        )
    )
    parts.append(
        label(
            X0,
            backward_y + 74,
            "fp32, rounded once and written to the host, where its squares join the norm.",
        )
    )
    parts.append(
        label(
            X0,
            host_y + 56,
            "bf16 weight + 16-bit remainder = the exact fp32 master; fp32 moments. The norm is known",
        )
    )
    parts.append(
        label(
            X0,
            host_y + 74,
            "when backward ends; AdamW then updates unit by unit, in forward order, before each is next used.",
        )
    )
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 850 385" font-family="Helvetica, Arial, sans-serif" '
        f'font-size="14" fill="{INK}"><defs><marker id="a" markerWidth="9" markerHeight="9" refX="7" refY="3.5" '
        f'orient="auto"><path d="M0,0 L7,3.5 L0,7 z" fill="{SOFT}"/></marker></defs>'
        '<rect width="850" height="385" fill="#ffffff"/>'
        '<text x="16" y="28" font-size="17" font-weight="bold">One training step</text>'
    )
    return head + "\n".join(parts) + "</svg>\n"


if __name__ == "__main__":
    Path(__file__).with_name("step.svg").write_text(draw(), encoding="utf-8")
