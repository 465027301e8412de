"""How figures are written in tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


def sides(both: Mapping[str, Any], column: str, form: Callable[[Mapping[str, Any]], str]) -> tuple[str, str, str]:
    """Return ours, QEMU's, and their ratio."""
    if both["qemu"] is None:
        return form(both["ours"][column]), "not there", ""
    ratio = both["ratio"]
    return form(both["ours"][column]), form(both["qemu"][column]), digits(ratio.get(column, ratio)["median"])


def ms(found: Mapping[str, Any]) -> str:
    """Milliseconds."""
    return f"{span(found)} ms"


def mib(found: Mapping[str, Any]) -> str:
    """MiB, the median alone."""
    return f"{found['median']:.1f} MiB"


def number(found: Mapping[str, Any]) -> str:
    """A whole number."""
    return f"{found['median']:,.0f} ({found['min']:,.0f} to {found['max']:,.0f})"


def span(found: Mapping[str, Any]) -> str:
    """The median, and the least and the largest."""
    return f"{digits(found['median'])} ({digits(found['min'])} to {digits(found['max'])})"


def digits(value: float) -> str:
    """Three digits, as far as they stand behind the point two at most."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def markdown(rows: Sequence[tuple[str, ...]]) -> str:
    """A table, whose head is the first of `rows`."""
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in body]
    return "\n".join(line.replace("|  |", "| |").replace("|  |", "| |") for line in lines) + "\n"
