"""Numbers as a person reads them."""

from __future__ import annotations

__all__ = ["cost_label", "cost_text", "duration", "number"]

LABELS = {"macs": "MACs"}
UNITS = {"latency": "s", "memory": "B"}
"""Unit of a cost, by a word of its name; without one it is a count."""
PREFIXES = {"G": 1e9, "M": 1e6, "k": 1e3, "": 1.0, "m": 1e-3, "µ": 1e-6}


def number(value: float | None) -> str:
    """A reward or a metric."""
    return "-" if value is None else f"{value:.4f}"


def cost_label(name: str) -> str:
    """Heading of a cost of the records."""
    return LABELS.get(name, name.replace("_", " "))


def cost_text(name: str, value: float | None) -> str:
    """Value of a cost of the records, in its unit: "2.63 M", "12.30 ms", "512"."""
    if value is None:
        return "-"
    unit = next((UNITS[word] for word in name.split("_") if word in UNITS), "")
    if value == 0 or (not unit and value < 1000):
        return f"{value:g} {unit}".rstrip()
    prefix = next((sign for sign, size in PREFIXES.items() if abs(value) >= size), "µ")
    return f"{value / PREFIXES[prefix]:.2f} {prefix}{unit}"


def duration(seconds: float) -> str:
    """A time of work."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
