"""A guest that stands still, as a state stream on its way out, over a socket or into a file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, final

import trio

from vmm.errors import HostFileRefused, MigrationPeerGone, MigrationRefused, StreamCorrupt
from vmm.migration.pump import Bulk, ChannelBroken, in_thread
from vmm.migration.ram import RamReader
from vmm.migration.stream import StreamWriter
from vmm.migration.stream_records import PROCESSOR, PROCESSOR_VERSION, recipe_digest
from vmm.migration.words import Word, hear, say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any

    from vmm.kvm.memory import GuestMemory
    from vmm.migration.connection import Connection
    from vmm.migration.section_payload import StateValue
    from vmm.migration.status import MigrationRamStats
    from vmm.migration.stream_records import Section

_OUTCOME = "the guest goes on in the source"


@final
class Outflow:
    """One stream, and the connection that it goes over. Owns that."""

    def __init__(self, connection: Connection) -> None:
        """Write to a connection; to a file from its present position on."""
        self._connection = connection
        self._channel = connection.stream
        self._fd = connection.fd
        self._writer: StreamWriter | None = None

    async def announce(
        self,
        name: str,
        recipe: Sequence[Mapping[str, Any]],
        processor: Mapping[str, StateValue],
        home: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Send what machine it is, and wait until the destination has made it, unless it cannot say so.

        The guest may still run. There is no limit to the wait but a cancellation.

        Args:
            home: what of the machine is not the guest's. It goes into a file, to be had again from there, and nowhere
                else.

        Raises:
            VmmError: the destination cannot have it, or is gone.
        """
        self._writer = StreamWriter(name, recipe_digest(recipe))
        self._writer.recipe(recipe)
        self._writer.section(PROCESSOR, PROCESSOR_VERSION, processor)
        if self._connection.is_file:
            self._writer.home(home)
            return
        head = self._writer.take()
        await self._in_thread(lambda bulk: bulk.write(head))
        if self._channel is not None:
            await self._hear("ready")

    async def send(
        self,
        sections: Iterable[Section],
        memory: GuestMemory,
        report: Callable[[MigrationRamStats], None],
        left: tuple[str, bytes] | None = None,
    ) -> None:
        """Send all the rest, in a thread. The guest stands. A file is on its disk when this returns.

        Args:
            report: called from the thread with how far it is.
            left: name of the back end in whose file RAM is left, and the identity that it is marked with.

        Raises:
            VmmError: it did not get there.
        """
        writer = self._writer
        assert writer is not None, "the state follows the recipe"
        for section in sections:
            writer.section(section.name, section.version, section.state)

        def work(bulk: Bulk) -> None:
            ram = RamReader(memory)
            if left is not None:
                name, identity = left
                memory.stay(identity)
                writer.ram_in_place(name, memory.size, identity)
                bulk.write(writer.finish())
                report(ram.statistics_in_place(bulk.bytes))
                _sync(self._fd)
                return
            writer.ram_extents(ram.extents, in_stream=True)
            report(ram.statistics(0))
            bulk.write(writer.take())
            for record in ram.records():
                writer.ram_content(record)
                bulk.write(writer.take())
                report(ram.statistics(bulk.bytes))
            bulk.write(writer.finish())
            report(ram.statistics(bulk.bytes))
            if self._connection.is_file:
                _sync(self._fd)

        await self._in_thread(work)

    async def _in_thread(self, work: Callable[[Bulk], None]) -> None:
        try:
            async with self._connection.explained():
                await in_thread(lambda bell: work(Bulk(self._fd, bell, peer=self._channel is not None)))
        except ChannelBroken:
            # Whoever refuses says why before it closes.
            await self._hear("refused")

    async def wait_loaded(self) -> None:
        """Wait until the destination has all of it in force; one that cannot say so, until it has taken all of it.

        Raises:
            VmmError: it has not.
        """
        if self._channel is not None:
            await self._hear("loaded")
        else:
            await self._connection.finish(sent=True)

    async def let_go(self) -> None:
        """Tell the destination that the guest is its own. It may be gone by now, and the guest with it."""
        if self._channel is not None:
            try:
                await say(self._channel, Word("yours"))
                self._connection.part()
            except trio.BrokenResourceError as error:
                raise MigrationPeerGone(peer="destination", what="closed the connection", outcome=_OUTCOME) from error

    async def _hear(self, expected: str) -> None:
        assert self._channel is not None
        async with self._connection.explained():
            word = await hear(self._channel, "destination", _OUTCOME)
        if word.name == "refused":
            raise MigrationRefused(reason=f"Refused by the destination: {word.reason}")
        if word.name != expected:
            raise StreamCorrupt(reason=f"the destination says {word.name!r}, expected {expected!r}")

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._connection.close()


def _sync(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        path = os.readlink(f"/proc/self/fd/{fd}")
        raise HostFileRefused(action="write", path=path, reason=os.strerror(error.errno or 0)) from error
