"""The content of a guest's RAM as records of a stream, and back. The guest stands still.

Both directions run in a thread of their own; what they report is read on the loop.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, final

import attrs

from vmm.errors import MigrationRefused, StreamCorrupt
from vmm.migration.status import MigrationRamStats
from vmm.migration.stream_records import CONTENT_SIZE, PAGE_SIZE, RamContent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.capabilities import MayWriteGuestMemory
    from vmm.kvm.memory import GuestMemory
    from vmm.migration.stream_records import RamExtents, RamInPlace, RamMapped


@final
class RamReader:
    """A guest's RAM on its way out."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._begun: Final = time.monotonic()
        self.extents: Final = tuple((region.address, region.size) for region in memory.regions)
        self._sent = 0  # bytes of content
        self._passed = 0  # bytes of RAM that are behind, whether they were sent or are zero

    def records(self) -> Iterator[RamContent]:
        """Yield all that is not zero, in ascending order. The data are views of the guest's RAM."""
        runs: list[tuple[int, int]] = []
        size = 0
        for address, length in self._memory.data_runs():
            if size + length > CONTENT_SIZE:
                yield self._record(runs)
                runs, size = [], 0
            runs.append((address, length))
            size += length
        if runs:
            yield self._record(runs)
        self._passed = self._memory.size

    def _record(self, runs: list[tuple[int, int]]) -> RamContent:
        self._sent += sum(size for _, size in runs)
        address, size = runs[-1]
        self._passed = self._size_below(address + size)
        return RamContent(tuple(runs), tuple(self._memory.view(*run) for run in runs))

    def _size_below(self, address: int) -> int:
        return sum(min(size, max(0, address - start)) for start, size in self.extents)

    def statistics_in_place(self, transferred: int) -> MigrationRamStats:
        """Return the same for RAM that stays where it is, now that all else is written."""
        self._passed = self._memory.size
        return attrs.evolve(self.statistics(transferred), duplicate=0)

    def statistics(self, transferred: int) -> MigrationRamStats:
        """Return what `query-migrate` shows. `transferred`: bytes on the channel so far, not those of RAM alone."""
        seconds = max(time.monotonic() - self._begun, 1e-6)
        pages = self._sent // PAGE_SIZE
        return MigrationRamStats(
            transferred=transferred,
            precopy_bytes=0,
            downtime_bytes=transferred,
            remaining=self._memory.size - self._passed,
            total=self._memory.size,
            duplicate=(self._passed - self._sent) // PAGE_SIZE,
            normal=pages,
            normal_bytes=self._sent,
            mbps=round(transferred * 8 / 1e6 / seconds, 3),
            pages_per_second=round(pages / seconds),
            dirty_sync_count=1,
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

    def store(self, record: RamContent) -> None:
        """Put content in place. Its reader has checked that it lies in the extents. Raises `HostFileRefused`."""
        if self._may is None:
            return
        for (address, _), data in zip(record.runs, record.data, strict=True):
            self._may.place(address, data)

    def require_complete(self) -> None:
        """Raise `StreamCorrupt` unless all of RAM was among the extents."""
        if tuple(self._listed) != (() if self._in_place else self._expected):
            raise StreamCorrupt(
                reason=f"its RAM is {_describe(self._listed)}, this machine has {_describe(self._expected)}"
            )


def _both() -> StreamCorrupt:
    return StreamCorrupt(reason="it says twice where the guest's RAM is: once in it, once in a file, or in two files")


def _describe(extents: tuple[tuple[int, int], ...] | list[tuple[int, int]]) -> str:
    return " and ".join(f"{size} bytes at {address:#x}" for address, size in extents) or "nowhere"
