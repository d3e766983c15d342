"""How numbers are written, in tables, lines and reports alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def format_bytes(num_bytes: float) -> str:
    """Bytes in decimal units with two figures that matter: 8.3 MB, 538 MB, 1.2 GB."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        # 999.5 would round up to "1000".
        if abs(value) < 999.5:
            return f"{value:.0f} B" if unit == "B" else f"{_short(value)} {unit}"
        value /= 1000
    return f"{_short(value)} TB"


def format_count(count: float) -> str:
    """A count with separators: 1,234."""
    return f"{round(count):,}"


def format_duration(seconds: float) -> str:
    """A time with its two largest units: 0.84 s, 12.3 s, 3 min 12 s, 2 h 5 min."""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def format_share(share: float) -> str:
    """A fraction as a percentage: 83.1 %, 0.34 %."""
    percent = 100 * share
    if percent and abs(percent) < 1:
        return f"{percent:.2f} %"
    return f"{percent:.1f} %"


def format_number(value: float) -> str:
    """Any other number: integers whole, the rest with four figures that matter."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return format_count(value)
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return f"{value:.4g}"


def format_estimate(estimate: Mapping[str, Any], *, share: bool = True) -> str:
    """An estimate with its interval: 83.1 % [77.0, 88.2]; `share` reads the values as fractions."""
    scale = 100 if share else 1
    value = format_share(estimate["value"]) if share else format_number(float(estimate["value"]))
    interval = estimate.get("interval")
    if not interval:
        return value
    low, high = (scale * bound for bound in interval)
    return f"{value} [{low:.1f}, {high:.1f}]" if share else f"{value} [{low:.4g}, {high:.4g}]"


def format_system(name: str) -> str:
    """What answered, as words: base_2shot is "base, 2 examples shown"."""
    who, _, shots = name.rpartition("_")
    if who and shots.endswith("shot") and shots[:-4].isdecimal():
        return f"{who}, {shots[:-4]} examples shown"
    return name.replace("_", " ")


def _short(value: float) -> str:
    return f"{value:.1f}" if abs(value) < 99.95 else f"{value:.0f}"
