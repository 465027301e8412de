"""docs/live-update-faults.md and docs/migration-faults.md: what was observed, as tables that a run of the tests writes
and the next one checks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.phases.fault_matrix import Seen

_DOCS: Final = Path(__file__).resolve().parent.parent.parent / "docs"
PAGE: Final = _DOCS / "live-update-faults.md"
MIGRATION_PAGE: Final = _DOCS / "migration-faults.md"
HEAD: Final = "| step | who has the guest | the source's step | what is told |\n| --- | --- | --- | --- |\n"
_STATES: Final = "| state | who has the guest | what is told |\n| --- | --- | --- |\n"


def observed(seen: Mapping[str, Seen], of: Literal["step", "state"] = "step") -> str:
    """Return the table of one fault: step, or state, -> what was seen there."""
    if of == "state":
        return _STATES + "".join(f"| `{state}` | {it.owner} | {it.told} |\n" for state, it in seen.items())
    return HEAD + "".join(f"| `{step}` | {it.owner} | {it.step} | {it.told} |\n" for step, it in seen.items())


def written(fault: str, page: Path = PAGE) -> str:
    """Return the table of `fault` that `page` has."""
    found = _section(fault).search(page.read_text())
    assert found is not None, f"{page.name} has no table of {fault!r}"
    return found["body"]


def comparable(table: str) -> str:
    """Return `table` without names of steps in what was told: a side may come one step further meanwhile, or not."""
    rows = [row.split(" | ") for row in table.splitlines()]
    return "\n".join(" | ".join((*row[:2], re.sub(r" at step '[^']*'", "", row[-1]))) for row in rows)


def write(fault: str, table: str, page: Path = PAGE) -> None:
    """Put `table` into `page`."""
    page.write_text(_section(fault).sub(lambda found: found["head"] + table + found["end"], page.read_text()))


def _section(fault: str) -> re.Pattern[str]:
    name = re.escape(fault)
    head, end = f"<!-- observed: {name} -->\n\n", f"\n<!-- end of {name} -->"
    return re.compile(f"(?P<head>{head})(?P<body>.*?)(?P<end>{end})", re.DOTALL)
