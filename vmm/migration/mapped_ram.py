"""RAM at fixed places of a file: written there, and read from there in several threads.

The stream says where (`RamMapped`), goes on behind the pages, and says before its end what is there (`RamMappedSums`):
so a page that the guest has changed since is written again in its place, and the file does not grow. What is zero takes
no room: the file is sparse.
"""

from __future__ import annotations

import os
import time
from functools import partial
from typing import TYPE_CHECKING, Final, final

import trio

from vmm import hostio
from vmm.errors import HostFileRefused, StreamCorrupt
from vmm.kvm.page_file import PAGE_SIZE, PIECE_PAGES, PageFile, checksum, path_of
from vmm.migration.ram_file_records import RamMapped, RamMappedSums
from vmm.migration.status import MigrationRamStats

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vmm.capabilities import MayWriteGuestMemory
    from vmm.kvm.faults import PagesFromFile
    from vmm.kvm.memory import GuestMemory
    from vmm.kvm.page_map import PageMap

_THREADS: Final = 4
"""At most. Each keeps one CPU busy, with checksums and copies."""


async def in_pieces(pages: int, work: Callable[[int, int], Awaitable[object]]) -> None:
    """Call `work` with first page and number of each piece of `pages` pages, several at a time: each has a thread.

    Raises, in a group, what `work` raises.
    """
    pieces = iter(range(0, pages, PIECE_PAGES))

    async def worker() -> None:
        for first in pieces:
            await work(first, min(PIECE_PAGES, pages - first))

    async with trio.open_nursery() as nursery:
        for _ in range(min(_THREADS, os.cpu_count() or 1)):
            nursery.start_soon(worker)


def in_thread(work: Callable[[int, int], object]) -> Callable[[int, int], Awaitable[object]]:
    """Return what calls `work`, which takes long, in a thread."""
    return lambda first, count: trio.to_thread.run_sync(work, first, count)


@final
class MappedWriter:
    """A guest's RAM on its way to its places in a file. The descriptor stays the caller's."""

    def __init__(self, memory: GuestMemory, fd: int, start: int, written: int) -> None:
        """Lay it out in file `fd`, in which the stream begins at `start` and has `written` bytes so far.

        Args:
            written: with the head of the record that says where the pages are.
        """
        self._memory: Final = memory
        self._fd: Final = fd
        self._start: Final = start
        self._begun: Final = time.monotonic()
        extents = tuple((region.address, region.size) for region in memory.regions)
        self.record: Final = RamMapped.after(written, extents, start)
        self.file: Final = PageFile(fd, start + self.record.area, self.record.pages)
        self.passes = 0
        self.dirty_rate = 0
        """Pages a second that were written during the last pass."""
        self._data = self._zero = self._left = self._live = 0

    async def save(self, wanted: PageMap, report: Callable[[], object], limit: Callable[[], int] = lambda: 0) -> None:
        """Write these pages, in a thread.

        Args:
            report: called now and then, on the loop.
            limit: bytes a second, 0 for no limit; it may change.

        Raises:
            HostFileRefused: the file cannot be written.
        """
        self._left = len(wanted)
        if not self.passes:
            self._zero = self.record.pages - self._left  # nobody ever touched them
        self.passes += 1
        begun, before = trio.current_time(), self._data

        for first in range(0, self.record.pages, PIECE_PAGES):
            count = min(PIECE_PAGES, self.record.pages - first)
            if not wanted.count(first, first + count):
                continue
            tally = await trio.to_thread.run_sync(self.file.save, self._memory, wanted.words, first, count)
            self._data += tally.data
            self._zero += tally.zero
            self._left -= tally.data + tally.zero
            report()
            if rate := limit():
                ahead = (self._data - before) * PAGE_SIZE / rate - (trio.current_time() - begun)
                await trio.sleep(max(ahead, 0.0))

    def stands(self) -> None:
        """Note that the guest stands from here on."""
        self._live = self._data

    def note(self, data: int, zero: int) -> None:
        """Note how many pages somebody else has written here, and found to be zero, all in all."""
        self._data, self._zero, self._left = data, zero, self.record.pages - data - zero

    def finish(self) -> RamMappedSums:
        """Write what pages there are and their checksums, and stand where the stream goes on. For a thread.

        Raises:
            HostFileRefused: the file cannot be written.
        """
        bitmap, sums = self.file.listed_bytes(), self.file.sums_bytes()
        try:
            for data, at in ((bitmap, self.record.bitmap), (sums, self.record.sums)):
                done = 0
                while done < len(data):
                    done += os.pwrite(self._fd, data[done:], self._start + at + done)
            os.lseek(self._fd, self._start + self.record.onward, os.SEEK_SET)
        except OSError as error:
            raise hostio.refused("write", path_of(self._fd), error) from error
        present = int.from_bytes(bitmap, "little").bit_count()
        return RamMappedSums(present, checksum(bitmap), checksum(sums))

    @property
    def bytes(self) -> int:
        """What was written so far of RAM."""
        return self._data * PAGE_SIZE

    def statistics(self) -> MigrationRamStats:
        """Return what `query-migrate` shows."""
        seconds = max(time.monotonic() - self._begun, 1e-6)
        size = self._data * PAGE_SIZE
        return MigrationRamStats(
            transferred=size,
            precopy_bytes=self._live * PAGE_SIZE,
            downtime_bytes=size - self._live * PAGE_SIZE,
            remaining=self._left * PAGE_SIZE,
            total=self._memory.size,
            duplicate=self._zero,
            normal=self._data,
            normal_bytes=size,
            mbps=round(size * 8 / 1e6 / seconds, 3),
            pages_per_second=round(self._data / seconds),
            dirty_pages_rate=self.dirty_rate,
            dirty_sync_count=self.passes,
            page_size=PAGE_SIZE,
        )


@final
class MappedReader:
    """A guest's RAM at its places in a file. Has a descriptor of its own, until `close`."""

    def __init__(self, record: RamMapped, memory: GuestMemory, fd: int, start: int) -> None:
        """Take `record` of the stream that begins at `start` of `fd`.

        Raises:
            StreamCorrupt: it is of another machine's RAM.
            HostFileRefused: no descriptor is left.
        """
        expected = tuple((region.address, region.size) for region in memory.regions)
        if record.extents != expected:
            raise StreamCorrupt(
                reason=f"its RAM is {_describe(record.extents)}, this machine has {_describe(expected)}"
            )
        self._record: Final = record
        self._memory: Final = memory
        self._start: Final = start
        self._fd = hostio.dup(fd)
        self.file: Final = PageFile(self._fd, start + record.area, record.pages)
        self._begun: Final = time.monotonic()
        self._present = self._data = 0
        self._coming: PagesFromFile | None = None

    def check(self, sums: RamMappedSums) -> None:
        """Read which pages there are, and their checksums. For a thread.

        Raises:
            StreamCorrupt: they are damaged, or cut off.
        """
        record, file = self._record, self.file
        tables = (
            ("bitmap of pages", file.listed_bytes(), record.bitmap, sums.bitmap),
            ("table of checksums", file.sums_bytes(), record.sums, sums.sums),
        )
        for what, table, at, expected in tables:
            self._read(what, table, self._start + at)
            if (found := checksum(table)) != expected:
                raise StreamCorrupt(
                    reason=f"a damaged {what} at offset {at}: its checksum is {found:#010x}, expected {expected:#010x}"
                )
        present = int.from_bytes(file.listed_bytes(), "little")
        if present.bit_count() != sums.present or present.bit_length() > record.pages:
            raise StreamCorrupt(
                reason=f"its bitmap has {present.bit_count()} of {record.pages} pages and page "
                f"{present.bit_length() - 1}, its record says {sums.present}"
            )
        self._present = sums.present
        length, needed = os.fstat(self._fd).st_size, file.offset + present.bit_length() * PAGE_SIZE
        if length < needed:
            raise StreamCorrupt(reason=f"it ends after {length - self._start} bytes, before its last page of RAM")

    def _read(self, what: str, table: memoryview, at: int) -> None:
        done = 0
        while done < len(table):
            try:
                count = os.preadv(self._fd, [table[done:]], at + done)
            except OSError as error:
                raise HostFileRefused(
                    action="read", path=path_of(self._fd), reason=os.strerror(error.errno or 0)
                ) from error
            if not count:
                raise StreamCorrupt(reason=f"it ends after {at + done - self._start} bytes, in its {what}")
            done += count

    async def look(self) -> None:
        """Read every page and compare its checksum; put it nowhere. Raises `GuestPageLost`, in a group."""
        await in_pieces(self._record.pages, in_thread(partial(self.file.check, self._memory)))

    async def load(self, may: MayWriteGuestMemory) -> None:
        """Put all of it in place, into RAM that is made zero first. Raises `GuestPageLost`, in a group."""
        await trio.to_thread.run_sync(may.clear)

        async def piece(first: int, count: int) -> None:
            came = await trio.to_thread.run_sync(may.load_pages, self.file, first, count)
            self._data += came  # not before: others add meanwhile

        await in_pieces(self._record.pages, piece)

    async def come(self, may: MayWriteGuestMemory) -> None:
        """Have it come in as it is used, into RAM that is made zero first. Raises `PageFaultsUnavailable`."""
        await trio.to_thread.run_sync(may.clear)
        self._coming = may.come_from(self.file)

    def statistics(self) -> MigrationRamStats:
        """Return how much has come, as `query-migrate` shows it. After `close` too: pages may come as they are used."""
        report = self._coming.report() if self._coming is not None else None
        data = self._data if report is None else report.moved
        size, seconds = data * PAGE_SIZE, max(time.monotonic() - self._begun, 1e-6)
        return MigrationRamStats(
            transferred=size,
            remaining=(self._present - data) * PAGE_SIZE,
            total=self._memory.size,
            duplicate=self._record.pages - self._present,
            normal=data,
            normal_bytes=size,
            mbps=round(size * 8 / 1e6 / seconds, 3),
            pages_per_second=round(data / seconds),
            postcopy_requests=0 if report is None else report.faults,
            page_size=PAGE_SIZE,
        )

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _describe(extents: tuple[tuple[int, int], ...]) -> str:
    return " and ".join(f"{size} bytes at {address:#x}" for address, size in extents)
