"""Chunks of pages, as one channel sends and receives them: the records `RamPages` with what follows them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, Protocol, final

from vmm.errors import HostFileRefused, StreamCorrupt
from vmm.kvm._pages import ffi, lib
from vmm.kvm.memory import PAGE_SIZE
from vmm.kvm.page_map import PageMap
from vmm.migration.pump import ENDED
from vmm.migration.ram_records import RAW, TABLE

if TYPE_CHECKING:
    from vmm.kvm._pages import CData
    from vmm.kvm.memory import GuestMemory, Region
    from vmm.migration.multifd import ChannelWriter
    from vmm.migration.multifd_intake import ChannelReader
    from vmm.migration.packing import Packing
    from vmm.migration.pump import Bulk
    from vmm.migration.ram_records import RamPages
    from vmm.migration.stream import StreamReader, StreamWriter
    from vmm.migration.zero_copy import ZeroCopy


class PageSink(Protocol):
    """Where pages go: one channel, or several, or a file."""

    @property
    def data_pages(self) -> int:
        """Pages that were sent so far, their content with them."""

    @property
    def zero_pages(self) -> int:
        """Pages that were sent as zeros."""

    @property
    def bytes(self) -> int:
        """What was written so far, all of it."""

    @property
    def under_way(self) -> int:
        """About how many bytes more that will be, once all has gone that `send` was given."""

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

    def __init__(
        self,
        memory: GuestMemory,
        writer: StreamWriter | ChannelWriter,
        bulk: Bulk,
        *,
        find_zeros: bool = True,
        packing: Packing | None = None,
        zero_copy: ZeroCopy | None = None,
    ) -> None:
        """Send chunks as they are, or packed, or from where they lie; without `find_zeros` pages of zeros as any."""
        self._memory: Final = memory
        self._packing: Final = packing
        self._zero_copy: Final = zero_copy
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

    @property
    def under_way(self) -> int:
        """Nothing: `send` returns when it has gone."""
        return 0

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
        packed = self._packed() if self._packing is not None else None
        front[:head] = self._writer.ram_pages(front[head : head + size])
        if packed is not None:
            self._bulk.write([front[: head + size], packed])
        elif self._bulk.holds:
            self._bulk.write([front[: head + size], *self._content()])
        elif self._zero_copy is not None:
            self._bulk.write([front[: head + size]])
            self._zero_copy.send(self._content())
        else:
            self._bulk.write_by(lambda: int(lib.tv_chunk_write(chunk, self._bulk.fd, self._base)))
            self._bulk.bytes += head + size + chunk.content
        self.data_pages += chunk.data_pages
        self.zero_pages += chunk.zero_pages
        return after

    def _content(self) -> list[memoryview]:
        """Return the pages of the chunk as they lie there."""
        runs = self._chunk.run[0 : self._chunk.runs]
        return [self._memory.view(run.address, run.pages * PAGE_SIZE) for run in runs if run.kind == lib.TV_DATA]

    def _packed(self) -> memoryview | None:
        """Return them packed, and say so in the table; None if that is no gain."""
        chunk, packing = self._chunk, self._packing
        assert packing is not None
        if not chunk.data_pages:
            return None
        packed = packing.pack(b"".join(self._content()))
        if len(packed) >= chunk.content:
            return None
        TABLE.pack_into(self._front, lib.TV_HEAD_ROOM, chunk.runs, packing.method, len(packed))
        return memoryview(packed)

    def flush(self) -> None:
        """Do nothing: what was sent has gone."""


@final
class PageIntake:
    """Takes chunks in, checks them, and puts their pages into the guest's RAM.

    A page whose checksum is wrong was written by the guest while it was sent, and comes again; or it is damaged, and
    does not.
    """

    def __init__(self, memory: GuestMemory, *, store: bool, packing: Packing | None = None) -> None:
        """With `store` off, what comes is only checked. `packing` is how it may be packed."""
        pages = memory.size // PAGE_SIZE
        regions = [(region.address, region.offset // PAGE_SIZE, region.size // PAGE_SIZE) for region in memory.regions]
        self._memory: Final = memory
        self._store: Final = store
        self._regions: Final = ffi.new("struct tv_region[]", regions)
        self._count: Final = len(regions)
        self._chunk: Final = ffi.new("struct tv_chunk *")
        self._buffer: Final = ffi.new("uint8_t[]", lib.TV_CHUNK_PAGES * PAGE_SIZE)
        self._packing: Final = packing
        self._under_way: RamPages | None = None
        # What is packed may be a page larger, by the rules of the record.
        self._packed: Final = ffi.new("uint8_t[]", (lib.TV_CHUNK_PAGES + 1) * PAGE_SIZE if packing is not None else 1)
        self.received: Final = PageMap(pages)
        """Pages that came, and are not zero."""
        self.suspects: Final = PageMap(pages)
        """Pages that came with a wrong checksum, and not again since."""
        self.data_pages = 0
        """Pages that came with their content, as often as they came."""
        self.zero_pages = 0
        """Pages that came as zeros, likewise."""

    def take(self, record: RamPages, reader: StreamReader | ChannelReader, bulk: Bulk, *, wait: bool = True) -> bool:
        """Take in a record's pages, which follow it on `bulk`, but for what `reader` has got of them.

        Args:
            wait: in a thread that may be stopped, until all have come.

        Returns:
            Whether all have come. If not, this is to be called with `record` again, and nothing else read until then.

        Raises:
            StreamCorrupt: they are none of this RAM's, or end early.
            HostFileRefused: they cannot be read, or stored.
        """
        chunk = self._chunk
        if self._under_way is not record:
            self._begin(record, reader)
            self._under_way = record
        if chunk.done < chunk.content and not self._read(reader, bulk, wait=wait):
            return False
        self._under_way = None
        self._keep()
        return True

    def _begin(self, record: RamPages, reader: StreamReader | ChannelReader) -> None:
        chunk = self._chunk
        where = f"its RAM pages before offset {reader.offset}"
        wrong = lib.tv_chunk_parse(chunk, record.table, len(record.table), self._regions, self._count)
        if wrong != ffi.NULL:
            raise StreamCorrupt(reason=f"{where}: {ffi.string(wrong).decode()}")
        is_packed = chunk.method != RAW
        if is_packed and (self._packing is None or self._packing.method != chunk.method):
            raise StreamCorrupt(reason=f"{where} are packed in a way that its terms do not say")
        # Without content, what comes next may be that of a later record.
        if ahead := reader.take_content() if chunk.content else b"":
            ffi.memmove(self._target, ahead, len(ahead))
            chunk.done = len(ahead)

    @property
    def _target(self) -> CData:
        """Where the content is read to."""
        return self._buffer if self._chunk.method == RAW else self._packed

    def _read(self, reader: StreamReader | ChannelReader, bulk: Bulk, *, wait: bool) -> bool:
        """Read more of it; return whether that is all."""
        chunk, target, before = self._chunk, self._target, self._chunk.done

        def step() -> int:
            return int(lib.tv_chunk_read(chunk, bulk.fd, target))

        result = bulk.read_by(step) if wait else bulk.read_here_by(step)
        bulk.bytes += chunk.done - before
        reader.pass_content(chunk.done - before)
        if result == ENDED:
            reader.close()  # which raises
        return result != 0

    def _keep(self) -> None:
        """Check the pages, and put them into RAM."""
        chunk, buffer = self._chunk, self._buffer
        if chunk.method != RAW:
            assert self._packing is not None
            size = chunk.data_pages * PAGE_SIZE
            content = memoryview(ffi.buffer(self._packed, chunk.content))  # type: ignore[arg-type]
            ffi.memmove(buffer, self._packing.unpack(content, size), size)
        lib.tv_chunk_verify(chunk, buffer, self.suspects.words)
        self.data_pages += chunk.data_pages
        self.zero_pages += chunk.zero_pages
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
