"""Chunks of pages, as one channel sends and receives them: the records `RamPages` with what follows them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, Protocol, final

from vmm.errors import HostFileRefused, StreamCorrupt
from vmm.kvm._pages import ffi, lib
from vmm.kvm.memory import PAGE_SIZE
from vmm.kvm.page_map import PageMap
from vmm.migration.ram_records import RAW

if TYPE_CHECKING:
    from vmm.kvm.memory import GuestMemory, Region
    from vmm.migration.pump import Bulk
    from vmm.migration.ram_records import RamPages
    from vmm.migration.stream import StreamReader, StreamWriter


class PageSink(Protocol):
    """Where pages go: one channel, or several, or a file."""

    data_pages: int
    """Pages that were sent so far, their content with them."""
    zero_pages: int
    """Pages that were sent as zeros."""

    @property
    def bytes(self) -> int:
        """What was written so far, all of it."""

    def send(self, todo: PageMap, region: Region, first: int, end: int) -> int:
        """Send some of the pages in `todo` from `first` to before `end`, all of `region`, and take them out of it.

        Returns the page to go on with; `end` if none is left. In a thread that may be stopped.

        Raises:
            ChannelBroken, HostFileRefused: they cannot go there.
        """

    def flush(self) -> None:
        """Return when all of this has gone. Raises as `send`."""


@final
class ChannelSink:
    """The stream's own channel."""

    def __init__(self, memory: GuestMemory, writer: StreamWriter, bulk: Bulk, *, find_zeros: bool = True) -> None:
        self._base: Final = memory.hva(0)
        self._writer: Final = writer
        self._bulk: Final = bulk
        self._find_zeros: Final = find_zeros
        self._chunk: Final = ffi.new("struct tv_chunk *")
        self._front: Final = memoryview(ffi.buffer(self._chunk.head)).cast("B")  # type: ignore[arg-type]
        self.data_pages = 0
        self.zero_pages = 0

    @property
    def bytes(self) -> int:
        """What was written so far, all of it."""
        return self._bulk.bytes

    def send(self, todo: PageMap, region: Region, first: int, end: int) -> int:
        """Send one chunk; see `PageSink`."""
        chunk = self._chunk
        after = int(
            lib.tv_chunk_gather(
                chunk, self._base, todo.words, first, end, region.address - region.offset, self._find_zeros
            )
        )
        if not chunk.runs:
            return after
        size = chunk.table_size
        front = self._front
        head = lib.TV_HEAD_ROOM
        front[:head] = self._writer.ram_pages(front[head : head + size])
        self._bulk.write_by(lambda: int(lib.tv_chunk_write(chunk, self._bulk.fd, self._base)))
        self._bulk.bytes += head + size + chunk.content
        self.data_pages += chunk.data_pages
        self.zero_pages += chunk.zero_pages
        return after

    def flush(self) -> None:
        """Do nothing: what was sent has gone."""


@final
class PageIntake:
    """Takes chunks in, checks them, and puts their pages into the guest's RAM.

    A page whose checksum is wrong was written by the guest while it was sent, and comes again; or it is damaged, and
    does not.
    """

    def __init__(self, memory: GuestMemory, *, store: bool) -> None:
        """With `store` off, what comes is only checked."""
        pages = memory.size // PAGE_SIZE
        regions = [(region.address, region.offset // PAGE_SIZE, region.size // PAGE_SIZE) for region in memory.regions]
        self._memory: Final = memory
        self._store: Final = store
        self._regions: Final = ffi.new("struct tv_region[]", regions)
        self._count: Final = len(regions)
        self._chunk: Final = ffi.new("struct tv_chunk *")
        self._buffer: Final = ffi.new("uint8_t[]", lib.TV_CHUNK_PAGES * PAGE_SIZE)
        self.received: Final = PageMap(pages)
        """Pages that came, and are not zero."""
        self.suspects: Final = PageMap(pages)
        """Pages that came with a wrong checksum, and not again since."""

    def take(self, record: RamPages, reader: StreamReader, bulk: Bulk) -> None:
        """Take in a record's pages, which follow it on `bulk`, but for what `reader` has got of them.

        Raises:
            StreamCorrupt: they are none of this RAM's, or end early.
            HostFileRefused: they cannot be read, or stored.
        """
        chunk, buffer = self._chunk, self._buffer
        where = f"its RAM pages before offset {reader.offset}"
        wrong = lib.tv_chunk_parse(chunk, record.table, len(record.table), self._regions, self._count)
        if wrong != ffi.NULL:
            raise StreamCorrupt(reason=f"{where}: {ffi.string(wrong).decode()}")
        if chunk.method != RAW:
            raise StreamCorrupt(reason=f"{where} are packed, which those on this channel are not")
        if ahead := reader.take_content():
            ffi.memmove(buffer, ahead, len(ahead))
            chunk.done = len(ahead)
        if reader.content:
            complete = bulk.read_by(lambda: int(lib.tv_chunk_read(chunk, bulk.fd, buffer)))
            bulk.bytes += chunk.done - len(ahead)
            reader.pass_content(chunk.done - len(ahead))
            if not complete:
                reader.close()  # which raises
        lib.tv_chunk_verify(chunk, buffer, self.suspects.words)
        if not self._store:
            return
        base = 0 if self._memory.page_size == PAGE_SIZE else self._memory.hva(0)
        error = lib.tv_chunk_store(chunk, buffer, self._memory.fd, base, self.received.words)
        if error:
            raise HostFileRefused(action="fill", path="the guest's RAM", reason=os.strerror(-error))

    def require_whole(self) -> None:
        """Raise `StreamCorrupt` if a page that came damaged has not come again."""
        for first, _ in self.suspects.runs():
            address = next(
                region.address + first * PAGE_SIZE - region.offset
                for region in self._memory.regions
                if region.offset <= first * PAGE_SIZE < region.offset + region.size
            )
            raise StreamCorrupt(
                reason=f"{len(self.suspects)} pages of RAM came with a wrong checksum and did not come again, the "
                f"first at guest-physical address {address:#x}"
            )
