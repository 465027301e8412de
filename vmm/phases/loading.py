"""What comes in of a guest that is copied: read, and taken apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.errors import StateRejected, StreamCorrupt
from vmm.migration.ram import RamWriter
from vmm.migration.stream_records import RamContent, RamExtents, RamInPlace, Section
from vmm.phases.quiesced import Pause

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.capabilities import MayWriteGuestMemory
    from vmm.migration.inflow import Inflow
    from vmm.migration.stream_records import Record
    from vmm.phases.machine import Machine


async def read_state(
    flow: Inflow, machine: Machine, may_write: MayWriteGuestMemory | None
) -> tuple[Pause, list[Section]]:
    """Read what follows the head of a stream, to its end; return how the guest was, and its devices' sections.

    Args:
        may_write: to put RAM in place as it comes. With None it is only looked at.

    Raises:
        VmmError: it is damaged, cut off, or of no such machine.
    """
    ram = RamWriter(may_write, machine.memory)
    sections: list[Section] = []

    def take(record: Record) -> bool:
        match record:
            case Section():
                sections.append(record)
            case RamExtents():
                ram.list_extents(record)
            case RamContent():
                ram.store(record)
            case RamInPlace():
                ram.find_in_place(record)
        return False

    await flow.read(take)
    ram.require_complete()
    return _pause_of(sections), [section for section in sections if section.name != Pause.KIND]


def _pause_of(sections: Sequence[Section]) -> Pause:
    found = next((section for section in sections if section.name == Pause.KIND), None)
    if found is None:
        raise StateRejected(section=Pause.KIND, faults=(f"{Pause.KIND!r} is missing from the stream",))
    if found.version != Pause.VERSION:
        fault = f"it has version {found.version}, read here: {Pause.VERSION}"
        raise StateRejected(section=Pause.KIND, faults=(fault,))
    try:
        return Pause.from_json(found.state)
    except StreamCorrupt as error:
        raise StateRejected(section=Pause.KIND, faults=(error.reason,)) from error
