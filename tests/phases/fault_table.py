"""docs/live-update-faults.md: what was observed, as tables that a run of the tests writes and the next one checks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.phases.fault_matrix import Seen

PAGE: Final = Path(__file__).resolve().parent.parent.parent / "docs" / "live-update-faults.md"
HEAD: Final = "| step | who has the guest | the source's step | what is told |\n| --- | --- | --- | --- |\n"


def observed(fault: str, seen: Mapping[str, Seen]) -> str:
    """Return the table of one fault: step -> what was seen there."""
    rows = (f"| `{step}` | {it.owner} | {it.step} | {it.told} |\n" for step, it in seen.items())
    return HEAD + "".join(rows)


def written(fault: str) -> str:
    """Return the table of `fault` that the page has."""
    found = _section(fault).search(PAGE.read_text())
    assert found is not None, f"{PAGE.name} has no table of {fault!r}"
    return found["body"]


def comparable(table: str) -> str:
    """Return `table` without names of steps in what was told: a side may come one step further meanwhile, or not."""
    rows = [row.split(" | ") for row in table.splitlines()]
    return "\n".join(" | ".join((*row[:2], re.sub(r" at step '[^']*'", "", row[-1]))) for row in rows)


def write(fault: str, table: str) -> None:
    """Put `table` into the page."""
    PAGE.write_text(_section(fault).sub(lambda found: found["head"] + table + found["end"], PAGE.read_text()))


def _section(fault: str) -> re.Pattern[str]:
    name = re.escape(fault)
    head, end = f"<!-- observed: {name} -->\n\n", f"\n<!-- end of {name} -->"
    return re.compile(f"(?P<head>{head})(?P<body>.*?)(?P<end>{end})", re.DOTALL)
