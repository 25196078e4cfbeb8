"""Numbers as people read them: few digits, intervals, p-values, sizes."""

from __future__ import annotations

from typing import Any


def figure(value: Any, sign: str = "") -> str:
    """A number in at most seven characters, three decimals below 10; `sign` is "+" for differences."""
    if value is None:
        return "unknown"  # one row tells nothing of a loss's spread
    size = abs(value)
    if size >= 10**5:
        return f"{value:{sign}.1e}".replace("e+0", "e").replace("e+", "e")
    decimals = next((n for n, limit in ((3, 10), (2, 100), (1, 1000)) if size < limit), 0)
    return f"{value:{sign}.{decimals}f}"


def in_rows(count: int, kind: str = "") -> str:
    """How many rows of a kind: 1 row, 1,200 test rows."""
    return f"{count:,} {kind}row{'s' * (count != 1)}"


def percent(share: Any, sign: str = "") -> str:
    """A share as percent with one decimal; only what is all or nothing is called 100% or 0%."""
    if share is None:
        return "unknown"
    text = f"{100 * share:{sign}.1f}"
    if text.lstrip("+-") in ("0.0", "100.0"):
        text = text[:-2] if share in (0, 1, -1) else f"{100 * share:{sign}.2f}"
    return f"{text}%"


def p_value(p: float | None) -> str:
    if p is None:
        return "unknown"
    return "<0.001" if p < 0.001 else f"{p:.2g}"


def p_told(p: float | None) -> str:
    """A p-value within a sentence: p = 0.04, p < 0.001."""
    text = p_value(p)
    return f"p {text.replace('<', '< ')}" if text.startswith("<") else f"p = {text}"


def large(number: int) -> str:
    """A number in at most seven columns."""
    if number < 10**6:
        return f"{number:,}"
    return f"{number / 1e6:,.1f} M" if number < 10**9 else f"{number / 1e9:,.1f} G"


def plain(value: Any) -> str:
    """A value as a recipe would have it."""
    if isinstance(value, list):
        return ", ".join(map(plain, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """1:02:03, or 2:03."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def gibibytes(count: float) -> str:
    """Bytes as people compare them: GiB, or MiB where that would be 0.0."""
    return f"{count / 2**30:.1f} GiB" if count >= 0.05 * 2**30 else f"{count / 2**20:.1f} MiB"
