"""A guest's RAM as records of a stream, and back.

Both directions run in a thread of their own; what they report is read on the loop.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, final

from vmm.errors import MigrationRefused, StreamCorrupt
from vmm.kvm.page_map import PageMap
from vmm.migration.page_chunks import PageIntake
from vmm.migration.record_fields import PAGE_SIZE
from vmm.migration.status import MigrationRamStats

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.capabilities import MayWriteGuestMemory
    from vmm.facets import DirtyPages
    from vmm.kvm.memory import GuestMemory
    from vmm.migration.page_chunks import PageSink
    from vmm.migration.pump import Bulk
    from vmm.migration.ram_file_records import RamInPlace, RamMapped
    from vmm.migration.ram_records import RamAbsent, RamContent, RamExtents, RamPages
    from vmm.migration.stream import StreamReader

_PROTECT: Final = 1 << 14
"""Pages that are protected at once before they are read, and that one piece lies within: 64 MiB."""


@final
class RamSender:
    """A guest's RAM on its way out, in passes: the first over all of it, each further one over what was written since.

    Made on the loop, used by one thread at a time; `statistics` may be called from any.

    Args:
        log: what the guest writes meanwhile; None where it stands until all has gone.
    """

    def __init__(self, memory: GuestMemory, log: DirtyPages | None) -> None:
        self.memory: Final = memory
        self._log: Final = log
        self._begun = time.monotonic()
        self.extents: Final = tuple((region.address, region.size) for region in memory.regions)
        self.todo: Final = PageMap(memory.size // PAGE_SIZE)
        """Pages that have to go, for the first time or again."""
        self._untouched = 0
        self.passes = 0
        self.dirty_rate = 0
        """Pages a second that were written during the last pass."""
        self._data_pages = self._zero_pages = self._bytes = 0
        self._live_bytes: int | None = None
        self._left = self.todo.pages

    @property
    def is_live(self) -> bool:
        """Whether the guest may run meanwhile."""
        return self._log is not None

    def begin(self) -> None:
        """Begin the first pass. Raises `KvmCallFailed`."""
        self._begun = time.monotonic()
        if self._log is not None:
            self._log.start()
        self.todo.merge(self.memory.touched())
        self._left = len(self.todo)
        self._untouched = self.todo.pages - self._left

    def stop(self) -> None:
        """Collect no more what is written. Idempotent."""
        if self._log is not None:
            self._log.stop()

    def collect(self) -> int:
        """Add what was written since the last pass began to what has to go; return how many pages that are now."""
        if self._log is not None:
            self._log.collect(self.todo)
        self._left = len(self.todo)
        return self._left

    def pages(self, sink: PageSink) -> Iterator[None]:
        """Send all that has to go, in pieces; pause after each. Raises as `PageSink.send`."""
        self.passes += 1
        for region in self.memory.regions:
            first = region.offset // PAGE_SIZE
            end = first + region.size // PAGE_SIZE
            window = first
            while (first := self.todo.first(first, end)) < end:
                if first >= window:
                    window = min(end, first + _PROTECT)
                    if self._log is not None and self._live_bytes is None:  # else nobody writes to them
                        self._log.protect(first, window - first)
                first = sink.send(self.todo, region, first, window)
                self.note(sink)
                yield

    def stands(self) -> None:
        """Note that the guest stands from here on."""
        if self._live_bytes is None:
            self._live_bytes = self._bytes

    def note(self, sink: PageSink) -> None:
        """Note how much has gone."""
        sent = sink.data_pages + sink.zero_pages - self._data_pages - self._zero_pages
        self._left = max(0, self._left - sent)
        self._data_pages, self._zero_pages, self._bytes = sink.data_pages, sink.zero_pages, sink.bytes

    def statistics(self) -> MigrationRamStats:
        """Return what `query-migrate` shows. Transferred are the bytes on the channels, not those of RAM alone."""
        seconds = max(time.monotonic() - self._begun, 1e-6)
        live = self._bytes if self._live_bytes is None else self._live_bytes
        return MigrationRamStats(
            transferred=self._bytes,
            precopy_bytes=live if self.is_live else 0,
            downtime_bytes=self._bytes - (live if self.is_live else 0),
            remaining=self._left * PAGE_SIZE,
            total=self.memory.size,
            duplicate=self._zero_pages + self._untouched,
            normal=self._data_pages,
            normal_bytes=self._data_pages * PAGE_SIZE,
            mbps=round(self._bytes * 8 / 1e6 / seconds, 3),
            pages_per_second=round(self._data_pages / seconds),
            dirty_pages_rate=self.dirty_rate,
            dirty_sync_count=self.passes,
            page_size=PAGE_SIZE,
        )


@final
class RamWriter:
    """A guest's RAM on its way in: made zero, and then written as it comes; or found where it was left."""

    def __init__(self, may: MayWriteGuestMemory | None, memory: GuestMemory) -> None:
        """With None, content is only looked at."""
        self._may = may
        self._memory = memory
        self._expected: Final = tuple((region.address, region.size) for region in memory.regions)
        self._listed: list[tuple[int, int]] = []
        self._in_place = False
        self.intake: Final = PageIntake(memory, store=may is not None)
        """Who takes pages out of the stream."""

    def list_extents(self, record: RamExtents) -> None:
        """Check extents before any content comes. Raises `StreamCorrupt` unless they are this machine's RAM."""
        if self._in_place:
            raise _both()
        if not record.in_stream:
            raise StreamCorrupt(reason="the content of the guest's RAM is not in it; only a live update comes so")
        for extent in record.extents:
            if extent not in self._expected:
                raise StreamCorrupt(
                    reason=f"its RAM is {_describe(record.extents)}, this machine has {_describe(self._expected)}"
                )
        if self._may is not None and not self._listed:
            # The stream has nothing of what is zero there. Here a client of qtest, or one before, may have written.
            self._may.clear()
        self._listed += record.extents

    def find_in_place(self, record: RamInPlace) -> None:
        """Check that RAM is where it was left, and as it was.

        Raises:
            MigrationRefused: the RAM here is not that of the state, or no longer.
            StreamCorrupt: it was said to be somewhere else, too.
        """
        if self._listed or self._in_place:
            raise _both()
        memory, found = self._memory, self._memory.stays_for()
        if (record.size, record.identity) != (memory.size, found):
            why = "was left for another state" if found else "is in use, was used since, or is not the file"
            raise MigrationRefused(
                reason=f"The guest's RAM was left in the file of back end {record.name!r}, {record.size} bytes. What "
                f"this machine has for RAM, {memory.path}, {memory.size} bytes, {why}; a state can go on only once, "
                "with the file as the save left it"
            )
        self._in_place = True

    def note_map(self, record: RamMapped) -> None:
        """Note that all of RAM is at its places in the file. Raises `StreamCorrupt` if it is somewhere else, too."""
        if self._listed or self._in_place:
            raise _both()
        self._listed += record.extents

    def note_absent(self, record: RamAbsent) -> PageMap:
        """Return the pages that come later; how they came before does not count. Raises `StreamCorrupt`."""
        absent = PageMap(self._memory.size // PAGE_SIZE)
        try:
            absent.load(record.words)
        except ValueError as error:
            raise StreamCorrupt(reason=f"a list of absent pages that is none of this machine's: {error}") from error
        for first, pages in absent.runs():
            self.intake.suspects.discard(first, pages)
        return absent

    def store(self, record: RamContent) -> None:
        """Put content in place. Its reader has checked that it lies in the extents. Raises `HostFileRefused`."""
        if self._may is None:
            return
        for (address, _), data in zip(record.runs, record.data, strict=True):
            self._may.place(address, data)

    def take_pages(self, record: RamPages, reader: StreamReader, bulk: Bulk, *, wait: bool = True) -> bool:
        """Take in pages that follow their record; see `PageIntake.take`."""
        return self.intake.take(record, reader, bulk, wait=wait)

    def require_complete(self) -> None:
        """Raise `StreamCorrupt` unless all of RAM was among the extents, and is undamaged."""
        if tuple(self._listed) != (() if self._in_place else self._expected):
            raise StreamCorrupt(
                reason=f"its RAM is {_describe(self._listed)}, this machine has {_describe(self._expected)}"
            )
        self.intake.require_whole()


def _both() -> StreamCorrupt:
    return StreamCorrupt(reason="it says twice where the guest's RAM is: once in it, once in a file, or in two files")


def _describe(extents: tuple[tuple[int, int], ...] | list[tuple[int, int]]) -> str:
    return " and ".join(f"{size} bytes at {address:#x}" for address, size in extents) or "nowhere"
