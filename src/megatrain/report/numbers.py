"""Numbers as the page shows them."""

import math


def short(value: float) -> str:
    """Four significant digits: 5.971, 0.0004, 1.2e-05, 12,345."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if value == 0 or size >= 1e-3:
        return f"{value:.4g}"
    return f"{value:.3g}"


def tick(value: float) -> str:
    """As few digits as tell a round number: 0.5, 20k, 1M."""
    size = abs(value)
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if size >= factor * 0.9999 and (factor > 1e3 or size >= 1e4):
            return f"{value / factor:g}{unit}"
    return f"{value:.4g}"


def percent(share: float) -> str:
    if 0 < share < 0.0005:
        return f"{100 * share:.2g} %"
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"


def rate(flops_per_second: float) -> str:
    """As TFLOP/s, or GFLOP/s where that says more."""
    if flops_per_second >= 1e12:
        return f"{flops_per_second / 1e12:.4g} TFLOP/s"
    return f"{flops_per_second / 1e9:.3g} GFLOP/s"


def several(number: int, what: str) -> str:
    """1 step, 2 steps."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def count(number: float) -> str:
    """Of parameters or tokens."""
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return f"{number:,.0f}"
