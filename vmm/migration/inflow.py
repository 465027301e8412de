"""A state stream that comes in, record by record, over a socket or from a file."""

from __future__ import annotations

import os
from collections import deque
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final, final

import trio

from vmm.errors import MigrationRefused, StreamCorrupt, VmmError
from vmm.migration.page_frames import Frame, FrameKind
from vmm.migration.pump import Bulk, ChannelBroken, in_thread
from vmm.migration.ram_records import RamPages, RamPass
from vmm.migration.silence import silence
from vmm.migration.stream import StreamReader
from vmm.migration.stream_records import (
    PAGES_VERSION,
    PROCESSOR,
    PROCESSOR_VERSION,
    Header,
    Recipe,
    Section,
    recipe_digest,
)
from vmm.migration.terms import Terms
from vmm.migration.words import Ear, Word, hear_soon, say, say_with_descriptor

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from vmm.hw.doorbell import Doorbell
    from vmm.kvm.page_map import PageMap
    from vmm.migration.connection import Connection
    from vmm.migration.ram import RamWriter
    from vmm.migration.stream_records import Record

_PIECE: Final = 1 << 16
"""Bytes read at once. Of pages, most are read to where they belong, and this much is copied once more."""

_REST_BYTES: Final = 4 << 20
"""Bytes of a pass, or of the last with all that follows, that are read in turns of the loop."""
_REST_TURNS: Final = 256
"""In so many turns, most of which wait for a piece that has not come."""
_REST_PASSES: Final = 256
"""Passes that are read so. A source that has more is in no hurry, and others have to be served."""
_MOMENT: Final = 1.0
"""Seconds. What has not come by then does not come in a moment."""

_LAST_WORDS: Final = 1.0
"""Seconds for a source to hear that it was refused, while it still sends."""


@final
class Inflow:
    """One stream, and the connection that it comes over. Owns that."""

    def __init__(self, connection: Connection) -> None:
        """Read from a connection; from a file at its present position."""
        self._connection = connection
        self._channel = connection.stream
        self._fd = connection.fd
        self._start = os.lseek(self._fd, 0, os.SEEK_CUR) if connection.is_file else 0
        self._size = os.fstat(self._fd).st_size - self._start if connection.is_file else None
        self._reader = self._fresh()
        self._records: deque[Record] = deque()
        self._piece = memoryview(bytearray(_PIECE))
        self._turns = 0  # of the loop, in which the present pass was read
        self._most = 0  # bytes that may have been read by the end of it
        self._passes = 0  # that were read on the loop
        self.absent: PageMap | None = None
        """Pages that come in frames, once the stream has ended; None where all have come in it."""
        self.terms = Terms()
        """On what terms the guest comes, once the head was read."""

    @property
    def from_file(self) -> bool:
        """Whether nobody is at the other end, as far as this end can know: it may have been written long ago."""
        return self._channel is None

    @property
    def offset(self) -> int:
        """How far it has been read, in bytes from its beginning."""
        return self._reader.offset

    @property
    def left(self) -> int | None:
        """Bytes of a file that were not read yet; None where nobody knows how many come."""
        return None if self._size is None else max(self._size - self._reader.offset, 0)

    def rewind(self) -> None:
        """Begin again, with a file."""
        os.lseek(self._fd, self._start, os.SEEK_SET)
        self._reader = self._fresh()
        self._records.clear()

    def _fresh(self) -> StreamReader:
        return StreamReader(seekable=self._connection.is_file)

    @property
    def file(self) -> tuple[int, int]:
        """The descriptor of the file that it is read from, which stays this one's, and where the stream begins."""
        assert self._connection.is_file, "what comes over a socket has no places"
        return self._fd, self._start

    async def read_head(self) -> tuple[Recipe, Section]:
        """Read what a stream begins with: the recipe, which must be that of its header, the section PROCESSOR, terms.

        Raises:
            StreamCorrupt: it begins with something else.
        """
        head: list[Record] = []

        def take(record: Record) -> bool:
            head.append(record)
            return len(head) == (_HEAD if self._reader.version >= PAGES_VERSION else _HEAD - 1)

        await self.read(take)
        header, recipe, processor, terms = (*head, *[None] * _HEAD)[:_HEAD]
        assert isinstance(header, Header), "the reader lets no stream begin otherwise"
        if not isinstance(recipe, Recipe):
            raise StreamCorrupt(reason="it has no recipe: it does not say what machine it is of")
        if header.recipe_digest != recipe_digest(recipe.commands):
            raise StreamCorrupt(reason="its recipe is not the one whose digest is in its header")
        if not isinstance(processor, Section) or (processor.name, processor.version) != (PROCESSOR, PROCESSOR_VERSION):
            raise StreamCorrupt(reason=f"its first section is not {PROCESSOR!r} of version {PROCESSOR_VERSION}")
        if self._reader.version < PAGES_VERSION:
            terms = Terms(answers=self._channel is not None)
        if not isinstance(terms, Terms):
            raise StreamCorrupt(reason="it does not say on what terms the guest comes")
        self.terms = terms
        if terms.answers and self._channel is None:
            raise MigrationRefused(
                reason="The source waits for answers, and nothing that is said here gets there: turn migration "
                "capability return-path on at both sides, or at none"
            )
        if not terms.answers:
            self._channel = None
        return recipe, processor

    async def hung_up(self) -> None:
        """Return when the source has gone, or says no more, whatever of it is still unread."""
        await self._connection.hung_up()

    async def read(self, take: Callable[[Record], bool], ram: RamWriter | None = None) -> None:
        """Call `take`, in a thread, for each record that comes, until it returns true or the stream has ended.

        A cancellation stops between two pieces; what was read and not taken is kept.

        Args:
            ram: takes the pages in that follow their record, which `take` does not see then.

        Raises:
            VmmError: what `take` raises; `StreamCorrupt` for what is no stream, or ends early.
        """

        def work(bell: Doorbell) -> None:
            reader = self._reader
            bulk, buffer = self._bulk().heed(bell), self._piece
            while not self._take_records(take, ram, bulk):
                if reader.jump is not None:
                    os.lseek(self._fd, self._start + reader.jump, os.SEEK_SET)
                    reader.jumped()
                count = bulk.read_into(buffer)
                if not count:
                    reader.close()
                self._records.extend(reader.feed(buffer[:count]))

        async with self._explained():
            await in_thread(work)

    async def wait_more(self) -> None:
        """Wait until there is more to take, or it has come to its end."""
        if self._records or self._reader.ended:
            await trio.lowlevel.checkpoint()
        else:
            await trio.lowlevel.wait_readable(self._fd)

    async def read_rest(self, take: Callable[[Record], bool], ram: RamWriter, late: Callable[[], None]) -> None:
        """Do as `read`, on the loop while it is little: the way to a thread and back is longer than what that takes.

        Not for a file. There may be further passes before the guest stands. Where one of them is more than a little, or
        takes more than a moment to come, all from there on is read in a thread; `late` is called before.
        """
        bulk, buffer = self._bulk(), self._piece
        async with self._explained():
            self._begin_pass(bulk)
            self._passes = 0
            while self._turns < _REST_TURNS and bulk.bytes < self._most and self._passes < _REST_PASSES:
                self._turns += 1
                if self._take_records(take, ram, bulk, here=True):
                    return
                # What is left to be taken then is pages that have not all come.
                if (count := None if self._records else bulk.read_here(buffer)) is None:
                    with trio.move_on_after(_MOMENT) as moment:
                        await trio.lowlevel.wait_readable(self._fd)
                    if moment.cancelled_caught:
                        break
                elif not count:
                    self._reader.close()
                else:
                    self._records.extend(self._reader.feed(buffer[:count]))
        late()
        await self.read(take, ram)

    def _take_records(
        self, take: Callable[[Record], bool], ram: RamWriter | None, bulk: Bulk, *, here: bool = False
    ) -> bool:
        """Take what was read; return whether that is all. With `here`, on the loop: pages are not waited for."""
        reader = self._reader
        while self._records:
            record = self._records[0]
            if isinstance(record, RamPages):
                if ram is None:
                    raise StreamCorrupt(reason="pages of RAM, where its head was expected")
                if not ram.take_pages(record, reader, bulk, wait=not here):
                    return False
                self._records.popleft()
                self._records.extend(reader.feed(b""))
            else:
                self._records.popleft()
                if isinstance(record, RamPass):
                    self._begin_pass(bulk)
                    self._passes += 1
                if take(record):
                    return True
        return reader.ended

    def _begin_pass(self, bulk: Bulk) -> None:
        self._turns, self._most = 0, bulk.bytes + _REST_BYTES

    def _bulk(self) -> Bulk:
        return Bulk(self._fd, peer=self._channel is not None)

    @asynccontextmanager
    async def _explained(self) -> AsyncGenerator[None, None]:
        async with self._connection.explained():
            try:
                yield
            except ChannelBroken as error:
                what = silence(error.__cause__)
                reason = f"the source {what}" if what else "the connection broke before its end record"
                raise StreamCorrupt(reason=reason) from error

    @property
    def fd(self) -> int:
        """The descriptor, which stays this one's."""
        return self._fd

    async def invite(self) -> None:
        """Say that the machine is here, and that its state may come, to whoever can hear it."""
        if self._channel is not None:
            with suppress(trio.BrokenResourceError):  # what it has sent before it left is told by `read`
                await say(self._channel, Word("ready"))
                if self.terms.acknowledge:
                    await say(self._channel, Word("acknowledged"))

    @property
    def passes_descriptors(self) -> bool:
        """Whether a descriptor can be sent to the source, as far as this end knows."""
        return self._connection.passes_descriptors and self._channel is not None

    async def say_prepared(self, fd: int | None = None) -> None:
        """Say that the guest may be stopped now, and send descriptor `fd` along."""
        assert self._channel is not None, "a source that nobody answers does not ask"
        with suppress(trio.BrokenResourceError):  # as above
            if fd is None:
                await say(self._channel, Word("prepared"))
            else:
                await say_with_descriptor(self._channel, Word("prepared"), fd)

    async def say_loaded(self, at: int | None) -> None:
        """Say that the guest is here, and since when it runs, to a source that has let it go, and may be gone."""
        assert self._channel is not None, "there is a cell, which was sent to it"
        with suppress(trio.BrokenResourceError):
            await say(self._channel, Word("loaded", at=at))

    async def confirm(self, late: Callable[[], None]) -> None:
        """Say that all is in force here, and wait until the source lets go of the guest; or until it can say no more.

        Args:
            late: called if that takes more than a moment.

        Raises:
            VmmError: it did not, and the guest is the source's.
        """
        if self._channel is None:
            await self._connection.finish(sent=False)
            return
        with suppress(trio.BrokenResourceError):  # what it has said before it left is told next
            await say(self._channel, Word("loaded"))
        async with self._connection.explained():
            word = await hear_soon(Ear(self._channel, "source", "the guest stays there"), late)
        if word.name != "yours":
            raise StreamCorrupt(reason=f"the source says {word.name!r}, expected 'yours'")

    async def refuse(self, error: VmmError) -> None:
        """Tell the source, if there is one, why it keeps its guest. Waits, at most a second, until it has heard it."""
        if self._channel is None:
            return
        # Shielded: the reason may be that this process is being ended. Bounded by the time.
        with trio.move_on_after(_LAST_WORDS, shield=True), suppress(trio.BrokenResourceError):
            if self.absent is None:
                await say(self._channel, Word("refused", str(error)))
            else:
                reason = str(error).encode()
                await self._channel.send_all(Frame(FrameKind.REFUSED, pages=len(reason)).encode() + reason)
            await self._channel.send_eof()
            # To close with something unread would be a reset, which may overtake what was said.
            while await self._channel.receive_some(_PIECE):
                pass

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._connection.close()


_HEAD: Final = 4
"""Records that a stream begins with: header, recipe, the processor, and from format version 2 on terms."""
