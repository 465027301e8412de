"""Series of measurements: each is summed up as its median, its least and its largest value."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

DIGITS = 5
"""Significant digits that are kept: more than any of these measurements has."""


def summary(values: Iterable[float]) -> dict[str, Any]:
    """Sum up the values of one figure, in the order in which they were measured."""
    kept = [float(f"{value:.{DIGITS}g}") for value in values]
    return {"median": _rounded(statistics.median(kept)), "min": min(kept), "max": max(kept), "values": kept}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Sum up ours/theirs, pair by pair: the machine's speed changes with time, and both of a pair had the same."""
    return summary(a / b for a, b in zip(ours, theirs, strict=True))


def columns(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Sum up each figure that all of `rows` have."""
    return {name: summary(row[name] for row in rows) for name in rows[0]}


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
