"""A guest as a state stream on its way out, over a socket or into a file."""

from __future__ import annotations

import os
from itertools import islice
from typing import TYPE_CHECKING, Final, final

import attrs
import trio

from vmm.errors import HostFileRefused, MigrationPeerGone, MigrationRefused, StreamCorrupt
from vmm.migration.multifd import MultifdSink
from vmm.migration.page_chunks import ChannelSink
from vmm.migration.page_server import LinkBroken
from vmm.migration.pump import Bulk, ChannelBroken, in_thread
from vmm.migration.ram_records import RamAbsent
from vmm.migration.silence import silence
from vmm.migration.stream import StreamWriter
from vmm.migration.stream_records import PAGES_VERSION, PROCESSOR, PROCESSOR_VERSION, recipe_digest
from vmm.migration.terms import Terms
from vmm.migration.words import Ear, Word, hear_soon, say

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any

    from vmm.hw.doorbell import Doorbell
    from vmm.kvm.memory import GuestMemory
    from vmm.migration.connection import Connection
    from vmm.migration.packing import Packing
    from vmm.migration.page_chunks import PageSink
    from vmm.migration.page_server import PageServer
    from vmm.migration.precopy import Precopy
    from vmm.migration.ram import RamSender
    from vmm.migration.section_payload import StateValue
    from vmm.migration.stream_records import Section

_OUTCOME: Final = "the guest goes on in the source"
_PIECE: Final = 1 << 13
"""Bytes of sections that are worth to be sent before there are more."""
_LAST_WORDS: Final = 2.0
"""Seconds for a destination that has closed a channel to say why."""


@final
class Outflow:
    """One stream, and the connection that it goes over. Owns that."""

    def __init__(self, connection: Connection, *, find_zeros: bool = True) -> None:
        """Write to a connection; to a file from its present position on. `find_zeros`: see `ChannelSink`."""
        self._connection = connection
        self._find_zeros = find_zeros
        self._channel = connection.stream
        self._fd = connection.fd
        self._ear = Ear(self._channel, "destination", _OUTCOME) if self._channel is not None else None
        self._bulk = Bulk(self._fd, peer=self._channel is not None)
        self._writer: StreamWriter | None = None
        self._sink: PageSink | None = None
        self._multifd: MultifdSink | None = None
        self._ahead: dict[str, Section] = {}
        self._descriptor: int | None = None
        self.noticed = False
        """Whether the destination was told that the guest is about to stand, and has made ready."""

    async def announce(
        self,
        name: str,
        recipe: Sequence[Mapping[str, Any]],
        processor: Mapping[str, StateValue],
        terms: Terms,
        home: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Send what machine it is, and wait until the destination has made it, unless it cannot say so.

        The guest may still run. There is no limit to the wait but a cancellation.

        Args:
            terms: on which it goes; whether the destination is heard is the connection's to say.
            home: what of the machine is not the guest's. It goes into a file, to be had again from there, and nowhere
                else.

        Raises:
            VmmError: the destination cannot have it, or is gone.
            MigrationRefused: its word is wanted, and nobody hears it.
        """
        answers = self._channel is not None
        if terms.acknowledge and not answers:
            raise MigrationRefused(
                reason="migrate: with switchover-ack the destination says when the guest may be stopped, which cannot "
                "be heard on this channel; use a socket, or turn switchover-ack off"
            )
        self._writer = StreamWriter(name, recipe_digest(recipe), version=PAGES_VERSION)
        self._writer.recipe(recipe)
        self._writer.section(PROCESSOR, PROCESSOR_VERSION, processor)
        self._writer.terms(attrs.evolve(terms, answers=answers))
        if self._connection.is_file:
            self._writer.home(home)
            return
        head = self._writer.take()
        await self._in_thread(lambda bulk: bulk.write(head))
        if answers:
            await self._hear("ready")
        if terms.acknowledge:
            await self._hear("acknowledged")

    def send_pages_over(
        self,
        connections: Sequence[Connection],
        memory: GuestMemory,
        packings: Sequence[Packing | None],
        *,
        zero_copy: bool,
    ) -> MultifdSink:
        """Send all pages over further channels, which are this one's from now on; see `MultifdSink`."""
        sink = MultifdSink(
            memory, connections, self._bulk, find_zeros=self._find_zeros, packings=packings, zero_copy=zero_copy
        )
        self._sink = self._multifd = sink
        return sink

    async def precopy(self, precopy: Precopy, ahead: Callable[[], Iterable[Section]] | None) -> None:
        """Send RAM, in a thread, while the guest runs; return when it may be stopped. Raises `VmmError`.

        Where little is left, the destination has made ready for it then.

        Args:
            ahead: returns sections as they are while the guest runs; called on the loop. They go before it stands, and
                again only where they have changed. None for a guest that will stand for longer, of which there is no
                notice.
        """
        writer = self._announced()
        await self._in_thread(lambda bulk: precopy.run(writer, bulk, self._pages(precopy.ram.memory)))
        self.noticed = ahead is not None and self._goes_alone and self._ear is not None and precopy.leaves_little
        if self.noticed:
            assert ahead is not None
            for section in ahead():
                self._ahead[section.name] = section
                writer.section(section.name, section.version, section.state)
            writer.switchover()
            notice = writer.take()
            await self._in_thread(lambda bulk: bulk.write(notice))
            await self._hear_prepared()
            if precopy.is_worth_a_pass():  # for the wait has no limit
                await self._in_thread(lambda bulk: precopy.go_on(writer, bulk, self._pages(precopy.ram.memory)))

    async def send(self, state: Iterable[Section], precopy: Precopy, late: Callable[[], None]) -> None:
        """Send all the rest. The guest stands. A file is on its disk when this returns.

        Args:
            state: the sections, that of the processors first; iterated over on the loop.
            late: called where that cannot be done in a moment.

        Raises:
            VmmError: it did not get there.
        """
        writer, sections, bulk = self._announced(), self._changed(state), self._bulk
        if self._goes_alone:
            bulk.hold()
        if self.noticed:
            # That of the processors, which the other side loads while this one goes on.
            for section in islice(sections, 1):
                self._add(section)
                bulk.push()
        if precopy.stand() and self._goes_alone:
            # The way to a thread and back is longer than what little is left takes.
            precopy.finish(writer, bulk, self._pages(precopy.ram.memory))
            bulk.push()
            for section in sections:
                self._add(section)
                if bulk.held >= _PIECE:
                    bulk.push()
            bulk.write(writer.finish())
            rest = bulk.release()
            if rest:
                late()
                await self._in_thread(lambda bulk: bulk.write([memoryview(rest)]))
            return
        late()
        saved = list(sections)
        kept = memoryview(bulk.release() if bulk.holds else b"")

        def work(bulk: Bulk) -> None:
            bulk.write([kept])
            precopy.finish(writer, bulk, self._pages(precopy.ram.memory))
            if self._multifd is not None:
                self._multifd.finish()
            for section in saved:
                writer.section(section.name, section.version, section.state)
            bulk.write(writer.finish())
            if self._connection.is_file:
                _sync(self._fd)

        await self._in_thread(work)

    def _changed(self, sections: Iterable[Section]) -> Iterator[Section]:
        """Yield what the destination does not have as it is."""
        return (section for section in sections if self._ahead.get(section.name) != section)

    def _add(self, section: Section) -> None:
        """Write a section."""
        writer = self._announced()
        writer.section(section.name, section.version, section.state)
        self._bulk.write(writer.take())

    async def while_there(self, wait: Callable[[], Awaitable[None]]) -> None:
        """Await `wait()`, in which nothing is sent. Raises a group of `VmmError` if the destination goes meanwhile."""

        async def watch() -> None:
            await self._connection.hung_up()
            with trio.move_on_after(_LAST_WORDS):
                await self._hear("refused")  # which says why

        async with trio.open_nursery() as nursery:
            if self._ear is not None:
                nursery.start_soon(watch)
            await wait()
            nursery.cancel_scope.cancel()

    async def hand_on(self, sections: Iterable[Section], ram: RamSender) -> None:
        """Send all the rest but the pages that `ram` has left, which come afterwards, in frames. The guest stands.

        Raises:
            VmmError: it did not get there.
        """
        writer = self._announced()

        def work(bulk: Bulk) -> None:
            ram.stands()
            if ram.passes:
                ram.collect()
            else:
                ram.begin()
                writer.ram_extents(ram.extents, in_stream=True)
            writer.ram_absent(RamAbsent(ram.todo.dump()))
            for section in sections:
                writer.section(section.name, section.version, section.state)
            bulk.write(writer.finish())

        await self._in_thread(work)

    async def serve_until_loaded(
        self, server: PageServer, urgent: Connection | None, let_go: Callable[[], object]
    ) -> None:
        """Send pages, in a thread, until the guest's state is in force at the destination, and the guest let go.

        Args:
            urgent: over which goes what is asked for; None for the stream's own.
            let_go: called, on the loop, just before the destination is told that the guest is its own.

        Raises:
            VmmError: the destination has not got it; or it has broken off after `let_go`.
        """

        def work(bell: Doorbell) -> None:
            try:
                rush = None if urgent is None else urgent.fd
                server.run(self._fd, rush, bell.fd, lambda: trio.from_thread.run_sync(let_go))
            except LinkBroken as error:
                raise MigrationPeerGone(peer="destination", what=f"is gone ({error})", outcome=_OUTCOME) from error

        async with self._connection.explained():
            await in_thread(work)

    @property
    def connection(self) -> Connection:
        """What it goes over; it stays this one's."""
        return self._connection

    async def leave(self, sections: Iterable[Section], memory: GuestMemory, name: str, identity: bytes) -> int:
        """Do as `send`, and leave RAM in the file of back end `name`, marked with `identity`.

        Return the bytes that were written here.
        """
        writer = self._announced()

        def work(bulk: Bulk) -> None:
            for section in sections:
                writer.section(section.name, section.version, section.state)
            memory.stay(identity)
            writer.ram_in_place(name, memory.size, identity)
            bulk.write(writer.finish())
            _sync(self._fd)

        await self._in_thread(work)
        return self._bulk.bytes

    @property
    def _goes_alone(self) -> bool:
        """Whether all goes over this one channel, which is no file."""
        return self._multifd is None and not self._connection.is_file

    def _announced(self) -> StreamWriter:
        assert self._writer is not None, "the state follows the recipe"
        return self._writer

    def _pages(self, memory: GuestMemory) -> PageSink:
        if self._sink is None:
            self._sink = ChannelSink(memory, self._announced(), self._bulk, find_zeros=self._find_zeros)
        return self._sink

    async def _in_thread(self, work: Callable[[Bulk], None]) -> None:
        async def run() -> None:
            await in_thread(lambda bell: work(self._bulk.heed(bell)))

        try:
            async with self._connection.explained():
                await (run() if self._multifd is None else self._multifd.beside(run))
        except ChannelBroken as error:
            if what := silence(error.__cause__):
                raise MigrationPeerGone(peer="destination", what=what, outcome=_OUTCOME) from error
            # Whoever refuses says why before it closes; but a further channel may have broken alone.
            with trio.move_on_after(_LAST_WORDS):
                await self._hear("refused")
            raise MigrationPeerGone(peer="destination", what="closed a channel", outcome=_OUTCOME) from error

    async def wait_loaded(self, late: Callable[[], None]) -> int | None:
        """Wait until the destination has all of it in force; one that cannot say so, until it has taken all of it.

        Return when the guest ran there, if it does already, as `Word.at` has it.

        Args:
            late: called if that takes more than a moment.

        Raises:
            VmmError: it has not.
        """
        if self._channel is not None:
            return (await self._hear("loaded", late)).at
        late()
        await self._connection.finish(sent=True)
        return None

    async def let_go(self) -> None:
        """Tell the destination that the guest is its own. It may be gone by now, and the guest with it."""
        if self._channel is not None:
            try:
                await say(self._channel, Word("yours"))
                self._connection.part()
            except trio.BrokenResourceError as error:
                raise MigrationPeerGone(peer="destination", what="closed the connection", outcome=_OUTCOME) from error

    async def _hear_prepared(self) -> None:
        assert self._ear is not None, "it gets notice only where it is heard"
        async with self._connection.explained():
            if self._connection.passes_descriptors:
                word, self._descriptor = await self._ear.hear_with_descriptor()
            else:
                word = await self._ear.hear()
        _require(word, "prepared")

    async def _hear(self, expected: str, late: Callable[[], None] = lambda: None) -> Word:
        assert self._ear is not None, "nobody is heard on a channel of one direction"
        async with self._connection.explained():
            word = await hear_soon(self._ear, late)
        _require(word, expected)
        return word

    def take_descriptor(self) -> int | None:
        """Return what the destination sent along as it had made ready, which is the caller's then."""
        fd, self._descriptor = self._descriptor, None
        return fd

    def close(self) -> None:
        """Close the connection. Idempotent."""
        if (fd := self.take_descriptor()) is not None:
            os.close(fd)
        if self._multifd is not None:
            self._multifd.close()
        self._connection.close()


def _require(word: Word, expected: str) -> None:
    if word.name == "refused":
        raise MigrationRefused(reason=f"Refused by the destination: {word.reason}")
    if word.name != expected:
        raise StreamCorrupt(reason=f"the destination says {word.name!r}, expected {expected!r}")


def _sync(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        path = os.readlink(f"/proc/self/fd/{fd}")
        raise HostFileRefused(action="write", path=path, reason=os.strerror(error.errno or 0)) from error
