"""Sizes in bytes and their human-readable form."""

import re

GIB = 1024**3
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{p}b": 1000 ** (i + 1) for i, p in enumerate("kmgt")}
_UNITS |= {f"{p}ib": 1024 ** (i + 1) for i, p in enumerate("kmgt")}


def format_bytes(count: int | float) -> str:
    """`count` bytes as a short decimal string: 1_500_000_000 -> '1.50 GB'."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


def parse_bytes(text: str | int | float) -> int:
    """Bytes from '1.5TB', '24 GiB', '512MB' or a plain number. Raises ValueError on anything else."""
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        return int(text)
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write for example 24GiB or 1.5TB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def parse_count(text: str | int) -> int:
    """A whole number from '10B', '1.5T', '512k' or plain digits; k, M, B and T are thousands. Raises ValueError."""
    match = re.fullmatch(r"\s*([0-9][0-9_,]*(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([kmbt]?)\s*", str(text).lower())
    number = float(match[1].replace(",", "").replace("_", "")) * _COUNTS[match[2]] if match is not None else 0.0
    if number < 1 or number != int(number) or number >= 1 << 63:
        raise ValueError(f"{text!r} is no number of tokens; write for example 10B or 512k")
    return int(number)


def format_seconds(seconds: float) -> str:
    """Seconds as '12 ms', '3.2 s', '4 min 05 s' or '2 h 10 min'."""
    if 0 < seconds < 0.9995:
        return f"{1000 * seconds:.{0 if seconds >= 0.01 else 1}f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
