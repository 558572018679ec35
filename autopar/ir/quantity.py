"""Quantity: a number that says its unit, how it is known, and how sure it is."""

from __future__ import annotations

from dataclasses import dataclass

LABELS = ("measured", "modelled", "assumed")


@dataclass(frozen=True, slots=True)
class Quantity:
    """`low <= value <= high`, all in `unit`.

    Attributes:
        label: `measured` on a device, `modelled` from a formula, or `assumed` (data sheet, estimate).
    """

    value: float
    unit: str
    label: str
    low: float
    high: float

    def __post_init__(self) -> None:
        if self.label not in LABELS:
            raise ValueError(f"unknown label {self.label!r}")
        if not self.low <= self.value <= self.high:
            raise ValueError(f"not low <= value <= high: {self.low}, {self.value}, {self.high}")


def modelled(value: float, unit: str, half_width: float) -> Quantity:
    """A modelled figure, uncertain by this share of it to either side."""
    return Quantity(value, unit, "modelled", value * (1 - half_width), value * (1 + half_width))


def weaker_label(first: str, second: str) -> str:
    """Label of a figure computed from two others: the less certain of both."""
    return max(first, second, key=LABELS.index)
