"""Pages that go out over several channels at a time, each sent by a thread of its own.

A stripe of RAM has one channel for all of the migration, so what comes of a page later follows what came earlier. A
channel is a row of records: of pages, of the end of each pass, and an end. docs/migration.md has the bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias, final
from zlib import crc32

import attrs
import trio

from vmm.errors import VmmError
from vmm.migration.crew import Aborted, JobQueues
from vmm.migration.page_chunks import ChannelSink
from vmm.migration.pump import Bulk, ChannelBroken, in_thread
from vmm.migration.ram_records import RamPages, RamPass
from vmm.migration.record_fields import PAGE_SIZE
from vmm.migration.stream import encode_record
from vmm.migration.stream_records import End
from vmm.migration.zero_copy import ZeroCopy

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from vmm.hw.doorbell import Doorbell
    from vmm.kvm.memory import GuestMemory, Region
    from vmm.kvm.page_map import PageMap
    from vmm.migration.connection import Connection
    from vmm.migration.packing import Packing

STRIPE: Final = 2048
"""Pages that one channel has in a row: 8 MiB. A multiple of 64, so that no word of a set has pages of two channels."""

_END: Final = 0
"""The job that ends a channel."""


@final
@attrs.frozen(eq=False)
class _Stripe:
    """The pages in `todo` from `first` to before `end`, to be sent, and taken out of it."""

    todo: PageMap
    region: Region
    first: int
    end: int


_Job: TypeAlias = _Stripe | int
"""Pages to send; or the number of the pass that has ended; or `_END`."""


@final
class ChannelWriter:
    """The records of one further channel."""

    def __init__(self) -> None:
        self._number = 0
        self._checksum = 0

    def ram_pages(self, table: bytes | memoryview) -> bytes:
        """Return the head of a record RamPages whose table this is."""
        head, _ = encode_record(RamPages.TYPE, self._number, bytes(table))
        self._count(head)
        return head

    def ram_pass(self, number: int) -> list[bytes]:
        """Return the record that says that pass `number` has ended."""
        record = RamPass(number)
        return self._record(record.TYPE, record.payload())

    def end(self) -> list[bytes]:
        """Return the last record."""
        return self._record(End.TYPE, End(self._number, self._checksum).payload())

    def _record(self, kind: int, payload: bytes) -> list[bytes]:
        head, payload = encode_record(kind, self._number, payload)
        self._count(head)
        return [head, payload]

    def _count(self, head: bytes) -> None:
        self._checksum = crc32(head, self._checksum)
        self._number += 1


@final
class _Sender:
    """One channel, and the thread that has it."""

    def __init__(
        self,
        index: int,
        memory: GuestMemory,
        connection: Connection,
        *,
        find_zeros: bool,
        packing: Packing | None,
        zero_copy: bool,
    ) -> None:
        self.index = index
        self.bulk = Bulk(connection.fd, peer=True)
        self.zero_copy = ZeroCopy(self.bulk) if zero_copy else None
        self._writer = ChannelWriter()
        self.sink = ChannelSink(
            memory, self._writer, self.bulk, find_zeros=find_zeros, packing=packing, zero_copy=self.zero_copy
        )

    def run(self, bell: Doorbell, queues: JobQueues[_Job]) -> None:
        """Do what there is to do until no more will come. Raises `ChannelBroken`, `HostFileRefused`."""
        self.bulk.heed(bell)
        while (job := queues.take(self.index)) is not None:
            self._do(job)
            queues.done(self.index)

    def _do(self, job: _Job) -> None:
        if isinstance(job, _Stripe):
            first = job.first
            while first < job.end:
                first = job.todo.first(first, job.end)
                if first < job.end:
                    first = self.sink.send(job.todo, job.region, first, job.end)
            return
        if self.zero_copy is not None:
            self.zero_copy.settle()
        self.bulk.write(self._writer.end() if job == _END else self._writer.ram_pass(job))


@final
class MultifdSink:
    """The channels of a source, as its passes see them: a `PageSink`. Owns the connections.

    Args:
        main: of the stream, which goes on beside them.
        packings: how each channel packs its pages, or None.
        zero_copy: whether the network gets pages from where they lie; sockets of TCP alone can.
    """

    def __init__(
        self,
        memory: GuestMemory,
        connections: Sequence[Connection],
        main: Bulk,
        *,
        find_zeros: bool,
        packings: Sequence[Packing | None],
        zero_copy: bool,
    ) -> None:
        self._connections: Final = connections
        self._main: Final = main
        self._senders: Final = [
            _Sender(index, memory, connection, find_zeros=find_zeros, packing=packing, zero_copy=zero_copy)
            for index, (connection, packing) in enumerate(zip(connections, packings, strict=True))
        ]
        self._queues: Final[JobQueues[_Job]] = JobQueues(len(connections))
        self._pass = 0
        self._handed_over = 0  # pages, in stripes
        self._failure: VmmError | ChannelBroken | None = None

    @property
    def data_pages(self) -> int:
        """Pages that were sent so far, their content with them."""
        return sum(sender.sink.data_pages for sender in self._senders)

    @property
    def zero_pages(self) -> int:
        """Pages that were sent as zeros."""
        return sum(sender.sink.zero_pages for sender in self._senders)

    @property
    def further_bytes(self) -> int:
        """What was written on the further channels."""
        return sum(sender.bulk.bytes for sender in self._senders)

    @property
    def bytes(self) -> int:
        """What was written so far, on all channels."""
        return self._main.bytes + self.further_bytes

    @property
    def under_way(self) -> int:
        """About how many bytes more that will be: the pages that wait, by what those before them have taken."""
        gone = self.data_pages + self.zero_pages
        each = self.further_bytes / gone if gone else PAGE_SIZE
        return round((self._handed_over - gone) * each)

    @property
    def copied_all_the_same(self) -> int:
        """How often a pass's pages were copied though they need not have been."""
        return sum(sender.zero_copy.missed for sender in self._senders if sender.zero_copy is not None)

    def send(self, todo: PageMap, region: Region, first: int, end: int) -> int:
        """Leave one stripe to its channel's thread; see `PageSink`."""
        end = min(end, (first // STRIPE + 1) * STRIPE)
        self._handed_over += todo.count(first, end)
        self._queues.put(first // STRIPE % len(self._senders), _Stripe(todo, region, first, end))
        return end

    def flush(self) -> None:
        """End the pass, and return when all of it has gone. Raises `ChannelBroken`."""
        self._pass += 1
        self._to_all(self._pass)

    def finish(self) -> None:
        """End the channels. Raises `ChannelBroken`."""
        self._to_all(_END)

    def _to_all(self, job: int) -> None:
        for sender in self._senders:
            self._queues.put(sender.index, job)
        self._queues.drain()

    async def beside(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do `work`, which sends pages here from a thread, with the threads of the channels beside it.

        Raises:
            VmmError, ChannelBroken: what one of them raises.
        """
        self._queues.begin()
        going = len(self._senders)

        async with trio.open_nursery() as nursery:

            async def serve(sender: _Sender) -> None:
                nonlocal going
                try:
                    await in_thread(lambda bell: sender.run(bell, self._queues), trio.CapacityLimiter(1))
                except (VmmError, ChannelBroken) as error:
                    self._fail(error)
                    nursery.cancel_scope.cancel()
                going -= 1
                if not going:
                    nursery.cancel_scope.cancel()

            nursery.start_soon(self._wake_at_cancel)
            for sender in self._senders:
                nursery.start_soon(serve, sender)
            try:
                await work()
            except (VmmError, ChannelBroken) as error:
                self._fail(error)
                nursery.cancel_scope.cancel()
            self._queues.end()
        if self._failure is not None:
            raise self._failure

    def _fail(self, error: VmmError | ChannelBroken) -> None:
        if self._failure is None and not isinstance(error, Aborted):
            self._failure = error
        self._queues.abort()

    async def _wake_at_cancel(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            if not self._queues.over:
                self._queues.abort()

    def close(self) -> None:
        """Close the channels. Idempotent."""
        for sender in self._senders:
            if sender.zero_copy is not None:
                sender.zero_copy.close()
        for connection in self._connections:
            connection.close()
