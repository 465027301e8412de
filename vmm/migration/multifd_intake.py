"""Pages that come in over several channels at a time, each taken in by a thread of its own.

`vmm.migration.multifd` is the other side.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, TypeAlias, final
from zlib import crc32

import trio

from vmm.errors import StreamCorrupt, VmmError
from vmm.migration.crew import Aborted, PassGate
from vmm.migration.page_chunks import PageIntake
from vmm.migration.pump import Bulk, ChannelBroken, in_thread
from vmm.migration.ram_records import RamPages, RamPass
from vmm.migration.section_payload import Misshapen
from vmm.migration.stream import HEAD_SIZE
from vmm.migration.stream_records import End

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from vmm.hw.doorbell import Doorbell
    from vmm.kvm.memory import GuestMemory
    from vmm.migration.connection import Connection
    from vmm.migration.packing import Packing

_HEAD: Final = struct.Struct("<HHIIII")  # type, flags, number, bytes, CRC of the payload, CRC of all that
_CHECKED: Final = HEAD_SIZE - 4
_Record: TypeAlias = RamPages | RamPass | End


@final
class ChannelReader:
    """The records of one further channel, hostile."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._number = 0
        self._checksum = 0
        self.offset = 0
        """Bytes that were read."""
        self.content = 0
        """Bytes of pages that come next."""

    def next(self, bulk: Bulk) -> _Record:
        """Return the next record, waiting for it. Raises `StreamCorrupt`, `ChannelBroken`."""
        head = self._read(bulk, HEAD_SIZE)
        kind, flags, number, size, checksum, own = _HEAD.unpack(head)
        if crc32(head[:_CHECKED]) != own:
            raise self._corrupt("a damaged record header")
        if number != self._number:
            raise self._corrupt(f"its number is {number}; a record is missing, repeated or out of order")
        record_type = next((it for it in (RamPages, RamPass, End) if kind == it.TYPE), None)
        if record_type is None or flags:
            raise self._corrupt(f"a record of type {kind} and flags {flags:#06x} has no place on it")
        if size > record_type.LIMIT:
            raise self._corrupt(f"{record_type.NOUN} of {size} bytes, at most {record_type.LIMIT} are read")
        payload = self._read(bulk, size)
        if crc32(payload) != checksum:
            raise self._corrupt(f"a damaged {record_type.NOUN}")
        try:
            record = record_type.decode(payload)
        except Misshapen as error:
            raise self._corrupt(f"a malformed {record_type.NOUN}: {error}") from error
        if isinstance(record, End) and record != End(self._number, self._checksum):
            raise self._corrupt("its end is not that of what came before")
        self._checksum = crc32(head, self._checksum)
        self._number += 1
        self.content = record.content if isinstance(record, RamPages) else 0
        return record

    def take_content(self) -> bytes:
        """Return nothing: no more is read than asked for."""
        return b""

    def pass_content(self, size: int) -> None:
        """Note that so much of the pages has come."""
        self.content -= size
        self.offset += size

    def close(self) -> None:
        """Raise `StreamCorrupt`: it ended too early."""
        raise self._corrupt("it ends there, before its end record")

    def _read(self, bulk: Bulk, size: int) -> bytes:
        data = bytearray(size)
        at = 0
        while at < size:
            count = bulk.read_into(memoryview(data)[at:])
            if not count:
                self.close()
            at += count
        self.offset += size
        return bytes(data)

    def _corrupt(self, what: str) -> StreamCorrupt:
        return StreamCorrupt(
            reason=f"multifd channel {self._index}, record {self._number}, before offset {self.offset}: {what}"
        )


@final
class MultifdIntake:
    """The further channels of a destination. Owns the connections.

    Args:
        store: whether pages are put into the guest's RAM; else they are only checked.
        packings: how each channel's pages may be packed, or None.
    """

    def __init__(
        self,
        memory: GuestMemory,
        connections: Sequence[Connection],
        *,
        store: bool,
        packings: Sequence[Packing | None],
    ) -> None:
        self._connections: Final = connections
        self.intakes: Final = [PageIntake(memory, store=store, packing=packing) for packing in packings]
        """Who takes pages out of each channel."""
        self._readers: Final = [ChannelReader(index) for index in range(len(connections))]
        self._gate: Final = PassGate(len(connections))
        self._passes = 0  # that have begun
        self._failure: VmmError | None = None

    @property
    def bytes(self) -> int:
        """What was read so far."""
        return sum(reader.offset for reader in self._readers)

    def begins(self, number: int) -> None:
        """Wait until all of the pass before `number` is there; then let that begin. In the stream's own thread.

        Raises:
            StreamCorrupt: another one comes next. Nobody would be listening while that was waited for.
        """
        self._passes += 1
        if number != self._passes:
            raise StreamCorrupt(reason=f"it begins pass {number} over RAM, expected pass {self._passes}")
        self._gate.begins(number)

    async def beside(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do `work`, which reads the stream, with the threads of the channels beside it; return when all have ended.

        Raises:
            VmmError: what one of them raises.
        """
        async with trio.open_nursery() as nursery:
            going = len(self._connections)
            over = trio.Event()

            async def serve(index: int) -> None:
                nonlocal going
                try:
                    await self._receive(index)
                except VmmError as error:
                    self._fail(error)
                    nursery.cancel_scope.cancel()
                going -= 1
                if not going:
                    over.set()

            nursery.start_soon(self._wake_at_cancel)
            for index in range(len(self._connections)):
                nursery.start_soon(serve, index)
            try:
                await work()
            except VmmError as error:
                self._fail(error)
            else:
                self._gate.release()
                await over.wait()
            nursery.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure

    async def _receive(self, index: int) -> None:
        connection, intake, reader = self._connections[index], self.intakes[index], self._readers[index]

        def run(bell: Doorbell) -> None:
            bulk = Bulk(connection.fd, peer=True).heed(bell)
            passes = 0
            self._gate.ended(index, passes)
            while not isinstance(record := reader.next(bulk), End):
                if isinstance(record, RamPages):
                    intake.take(record, reader, bulk)
                    continue
                passes += 1
                if record.number != passes:
                    raise StreamCorrupt(
                        reason=f"multifd channel {index} ends pass {record.number}, expected pass {passes}"
                    )
                self._gate.ended(index, passes)
            self._gate.left(index)

        async with connection.explained():
            try:
                await in_thread(run, trio.CapacityLimiter(1))
            except Aborted:
                return
            except ChannelBroken as error:
                raise StreamCorrupt(reason=f"multifd channel {index} broke before its end record") from error

    def _fail(self, error: VmmError) -> None:
        self._failure = self._failure or error
        self._gate.abort()

    async def _wake_at_cancel(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self._gate.abort()

    def require_whole(self) -> None:
        """Raise `StreamCorrupt` if a page that came damaged has not come again."""
        for intake in self.intakes:
            intake.require_whole()

    def close(self) -> None:
        """Close the channels. Idempotent."""
        for connection in self._connections:
            connection.close()
