"""What comes in of a guest that is copied: read, and taken apart."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import trio

from vmm.errors import PageFaultsUnavailable, StateRejected, StreamCorrupt
from vmm.migration.incoming_ram import IncomingRam
from vmm.migration.ram import RamWriter
from vmm.migration.ram_file_records import RamInPlace, RamMapped, RamMappedSums
from vmm.migration.ram_records import RamAbsent, RamContent, RamExtents, RamPass, Switchover
from vmm.migration.stream_records import Section
from vmm.phases.quiesced import Pause

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection

    from vmm.capabilities import MayWriteGuestMemory
    from vmm.migration.inflow import Inflow
    from vmm.migration.multifd_intake import MultifdIntake
    from vmm.migration.stream_records import Record
    from vmm.phases.machine import Machine


async def read_state(
    flow: Inflow,
    machine: Machine,
    may_write: MayWriteGuestMemory | None,
    multifd: MultifdIntake | None = None,
    make_ready: Callable[[Collection[Section]], Awaitable[None]] | None = None,
    soon: Callable[[Section], None] = lambda _section: None,
    late: Callable[[], None] = lambda: None,
) -> tuple[Pause, list[Section]]:
    """Read what follows the head of a stream, to its end; return how the guest was, and its devices' sections.

    Args:
        multifd: the further channels that its terms promise.
        may_write: to put RAM in place as it comes. With None it is only looked at. RAM at fixed places of a file is put
            in place last, or with x-restore-on-demand comes when it is used.
        make_ready: awaited, where the source gives notice, when the guest is about to stand and little is left of it.
            That is read on the loop. With None it is read as all before. It is given the sections that have come.
        soon: called with each section that comes after that, as it comes; in a thread after `late`.
        late: called if that takes more than a moment.

    Raises:
        VmmError: it is damaged, cut off, or of no such machine.
    """
    if flow.terms.multifd and multifd is None:
        raise StreamCorrupt(reason="the guest's RAM is on further channels, which this stream has not")
    ram = RamWriter(may_write, machine.memory)
    progress = machine.made.migration.progress
    intakes = [ram.intake, *(multifd.intakes if multifd is not None else ())]
    coming = IncomingRam(machine.memory.size, flow, multifd, intakes)
    if may_write is not None and progress is not None:
        # It keeps the buffers, too, which would else be given back while the guest stands.
        progress.follow_ram(coming.statistics)
    sections: dict[str, Section] = {}
    maps: list[RamMapped] = []
    sums: list[RamMappedSums] = []
    stands: list[bool] = []  # of each notice whether it is heeded

    def take(record: Record) -> bool:
        match record:
            case Section():
                sections[record.name] = record
                if stands and stands[0]:
                    soon(record)
            case RamExtents():
                ram.list_extents(record)
            case RamContent():
                ram.store(record)
            case RamInPlace():
                ram.find_in_place(record)
            case RamMapped():
                ram.note_map(record)
                maps.append(record)
            case RamMappedSums():
                sums.append(record)
            case RamPass() if multifd is not None:
                multifd.begins(record.number)
            case Switchover():
                stands.append(make_ready is not None and multifd is None)
                return stands[0]
            case RamAbsent():
                if flow.absent is not None or not flow.terms.postcopy:
                    raise StreamCorrupt(reason="it lists absent pages twice, or its source has not said that it may")
                flow.absent = ram.note_absent(record)
        return False

    if multifd is None:
        await flow.read(take, ram)
        if make_ready is not None and stands:
            await make_ready(sections.values())
            await flow.read_rest(take, ram, late)
    else:
        await multifd.beside(lambda: flow.read(take, ram))
        multifd.require_whole()
    ram.require_complete()
    coming.complete = True
    if len(maps) != len(sums):
        raise StreamCorrupt(reason=f"it has {len(maps)} maps of RAM and {len(sums)} records of their checksums")
    if maps:
        await _read_mapped(flow, machine, may_write, maps[0], sums[0])
    pause = _pause_of(sections.pop(Pause.KIND, None))
    return pause, list(sections.values())


async def _read_mapped(
    flow: Inflow, machine: Machine, may_write: MayWriteGuestMemory | None, record: RamMapped, sums: RamMappedSums
) -> None:
    from vmm.migration.mapped_ram import MappedReader  # Few machines come so.

    on_demand = bool(machine.made.migration.parameters["x-restore-on-demand"])
    with closing(MappedReader(record, machine.memory, *flow.file)) as ram:
        await trio.to_thread.run_sync(ram.check, sums)
        progress = machine.made.migration.progress
        if may_write is None:
            # However it comes then: once the present guest is given up it is too late.
            await ram.look()
            return
        if progress is not None:
            progress.follow_ram(ram.statistics, beyond=on_demand)
        if on_demand:
            try:
                await ram.come(may_write)
            except PageFaultsUnavailable as error:
                machine.made.host.complain(f"{error}; all of it is loaded before the guest runs")
            else:
                return
        await ram.load(may_write)


def _pause_of(found: Section | None) -> Pause:
    if found is None:
        raise StateRejected(section=Pause.KIND, faults=(f"{Pause.KIND!r} is missing from the stream",))
    if found.version != Pause.VERSION:
        fault = f"it has version {found.version}, read here: {Pause.VERSION}"
        raise StateRejected(section=Pause.KIND, faults=(fault,))
    try:
        return Pause.from_json(found.state)
    except StreamCorrupt as error:
        raise StateRejected(section=Pause.KIND, faults=(error.reason,)) from error
