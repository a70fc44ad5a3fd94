"""Formats numbers, names and settings for the page."""

import json
import math
from collections.abc import Iterable
from typing import Any

ACRONYMS = {"psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS"}


def words(name: str) -> str:
    """`val_psnr` as `val PSNR`."""
    return " ".join(ACRONYMS.get(word, word) for word in name.split("_"))


def title(name: str) -> str:
    """`learning_rate` as `Learning rate`."""
    return words(name)[:1].upper() + words(name)[1:]


def number(value: float) -> str:
    """Four digits, or all digits of a whole number."""
    if not math.isfinite(value):
        return {"nan": "NaN", "inf": "∞", "-inf": "−∞"}[str(float(value))]
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def is_share(metric: str, values: Iterable[float]) -> bool:
    """Whether a metric is shown in percent."""
    return "accuracy" in metric and all(0 <= value <= 1 for value in values)


def score(metric: str, value: float) -> str:
    """A metric's value, in percent if `is_share`."""
    return f"{value:.2%}" if is_share(metric, [value]) else number(value)


def duration(seconds: float) -> str:
    """`4.23 s`, `1 min 05 s` or `2 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def setting(value: object) -> str:
    """A value as in its JSON file, but strings without quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat
