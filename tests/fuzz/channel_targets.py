"""What takes hostile input beside a migration's stream: further channels, and the frames of a postcopy, both ways."""

from __future__ import annotations

import os
import select
import socket
import struct
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, Final
from zlib import crc32

import trio

from tests.fuzz.mutation import repaired
from tests.fuzz.targets import Target
from vmm.errors import HostFileRefused, MigrationPeerGone, MigrationRefused, StreamCorrupt
from vmm.hostio import create_ram
from vmm.hw.doorbell import Doorbell
from vmm.kvm._faults import lib as pages_lib
from vmm.kvm.faults import PagesFromLink
from vmm.kvm.memory import PAGE_SIZE, GuestMemory
from vmm.kvm.page_file import checksum
from vmm.kvm.page_map import PageMap
from vmm.migration.connection import Connection
from vmm.migration.further import SIZE, Gathering
from vmm.migration.multifd_intake import ChannelReader
from vmm.migration.packing import packing
from vmm.migration.page_chunks import PageIntake
from vmm.migration.page_frames import FRAME_SIZE
from vmm.migration.page_server import LinkBroken, PageServer
from vmm.migration.pump import Bulk
from vmm.migration.ram_records import RamPages
from vmm.migration.stream_records import End
from vmm.phases.postcopy_source import OutgoingPostcopy, lacking
from vmm.phases.postcopy_target import IncomingPostcopy, greet

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import ExitStack

PAGES: Final = 16
"""Of the guest's RAM: as much as goes into a socket that nobody reads."""
IDENTITY: Final = bytes(range(16))
"""Of the migration that is under way."""


def guest_memory() -> GuestMemory:
    """Make a guest's RAM, whose every other page is zero."""
    memory = GuestMemory.from_memfd(create_ram(PAGES * PAGE_SIZE, "fuzz"), PAGES * PAGE_SIZE)
    for page in range(0, PAGES, 2):
        memory.write(page * PAGE_SIZE, bytes([page + 1]) * PAGE_SIZE)
    return memory


def connected(pieces: Sequence[bytes]) -> tuple[socket.socket, socket.socket]:
    """Return a socket from which `pieces` and no more can be read, and its other end."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with suppress(BlockingIOError, BrokenPipeError):  # the rest of what is too much is not sent
        for piece in pieces:
            theirs.sendall(piece)
    theirs.shutdown(socket.SHUT_WR)
    return ours, theirs


def quiet_bell(stack: ExitStack) -> Doorbell:
    """Return a bell that nobody rings."""
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    stack.callback(os.close, fd)
    return Doorbell(fd)


class ChannelPreamble(Target):
    """How a further channel begins, by which a destination knows it."""

    refusals = (MigrationPeerGone,)

    def repair(self, data: bytes) -> bytes:
        """Make its checksum right."""
        body = data[: SIZE - 4]
        return body + struct.pack("<I", crc32(body)) + data[SIZE:] if len(data) >= SIZE else data

    def deal_with(self, data: bytes, pieces: Sequence[bytes]) -> None:
        """Have whoever says it connect, and nobody else."""
        trio.run(self._gather, pieces)

    async def _gather(self, pieces: Sequence[bytes]) -> None:
        ours, theirs = connected(pieces)
        coming = [Connection(trio.socket.from_stdlib_socket(ours))]
        complaints: list[str] = []
        over = trio.Event()

        async def accept() -> Connection:
            if not coming:
                await trio.sleep_forever()
            return coming.pop()

        async def secure(connection: Connection) -> Connection:
            await trio.lowlevel.checkpoint()
            return connection

        def complain(text: str) -> None:
            complaints.append(text)
            over.set()

        gathering = Gathering(accept, secure, complain, identity=IDENTITY.hex(), each=60, gone=over.wait)
        with closing(theirs):
            for connection in await gathering.gather("multifd", 1, within=60):
                connection.close()
        assert not complaints


class MultifdChannel(Target):
    """The records of a further channel, and the pages in them."""

    refusals = (StreamCorrupt, HostFileRefused)

    def __init__(self) -> None:
        super().__init__()
        self._memory = self.stack.enter_context(closing(guest_memory()))
        self._fd = os.memfd_create("channel", os.MFD_CLOEXEC)
        self.stack.callback(os.close, self._fd)
        self._quiet = quiet_bell(self.stack)

    def repair(self, data: bytes) -> bytes:
        """Make checksums right; no preamble comes before the records."""
        return repaired(data, 0)

    def deal_with(self, data: bytes, pieces: Sequence[bytes]) -> None:
        """Take it in."""
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, data, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        bulk = Bulk(self._fd, peer=False).heed(self._quiet)
        reader = ChannelReader(0)
        intake = PageIntake(self._memory, store=True, packing=packing("zlib"))
        while not isinstance(record := reader.next(bulk), End):
            if isinstance(record, RamPages):
                intake.take(record, reader, bulk)
        intake.require_whole()


def sealed(data: bytes) -> bytes:
    """Make the checksums of the frames in `data` right, as far as it consists of frames."""
    out = bytearray(data)
    for at in range(0, len(data) - FRAME_SIZE + 1, FRAME_SIZE):
        if data[at : at + 4] == b"TVPC":
            struct.pack_into("<I", out, at + FRAME_SIZE - 4, checksum(data[at : at + FRAME_SIZE - 4]))
    return bytes(out)


class PostcopySource(Target):
    """What a source hears of the destination while it sends what is left."""

    refusals = (LinkBroken, MigrationRefused)

    def __init__(self) -> None:
        super().__init__()
        self._memory = self.stack.enter_context(closing(guest_memory()))
        self._quiet = quiet_bell(self.stack)

    def repair(self, data: bytes) -> bytes:
        """Seal the frames."""
        return sealed(data)

    def deal_with(self, data: bytes, pieces: Sequence[bytes]) -> None:
        """Hear it, before the guest is the destination's and afterwards."""
        told: list[None] = []
        with suppress(*self.refusals):
            self._serve(pieces, lambda: told.append(None))
        assert len(told) <= 1, "the guest was let go twice"
        self._serve(pieces, None)

    def _serve(self, pieces: Sequence[bytes], loaded: Callable[[], object] | None) -> None:
        todo = PageMap(PAGES)
        todo.set_all()
        server = PageServer(self._memory, todo, lambda: 0)
        ours, theirs = connected(pieces)
        with ours, theirs:
            server.run(ours.fileno(), None, self._quiet.fd, loaded)
        assert server.data_pages + server.zero_pages + len(todo) == PAGES, "a page was sent twice, or not at all"


class PostcopyDestination(Target):
    """The pages of a guest that runs already, as they come."""

    refusals = (MigrationPeerGone,)

    def repair(self, data: bytes) -> bytes:
        """Seal the frames."""
        return sealed(data)

    def deal_with(self, data: bytes, pieces: Sequence[bytes]) -> None:
        """Take them in."""
        here = PageMap(PAGES)
        here.add(0)
        ours, theirs = connected(pieces)
        ram = GuestMemory.from_memfd(create_ram(PAGES * PAGE_SIZE, "fuzz"), PAGES * PAGE_SIZE)
        with ours, theirs, closing(ram) as memory, closing(PagesFromLink(memory, here, ours.fileno(), None, 1)) as link:
            with suppress(MigrationPeerGone):
                link.say_loaded()
            while link._state().state == pages_lib.TF_RUNS:
                select.select([link._bell], [], [])
                with suppress(BlockingIOError):
                    os.eventfd_read(link._bell)
            assert link.here().count() == link.report().passed <= PAGES
            if link.report().passed < PAGES:
                raise link._failure(link._state())


class PostcopyGreeting(Target):
    """What either side says first on a connection that replaces another one."""

    refusals = (StreamCorrupt, MigrationRefused, MigrationPeerGone)

    def __init__(self) -> None:
        super().__init__()
        self._memory = self.stack.enter_context(closing(guest_memory()))
        ours, theirs = socket.socketpair()
        self.stack.enter_context(ours)
        self.stack.enter_context(theirs)
        here = PageMap(PAGES)
        here.add(3, 4)
        link = PagesFromLink(self._memory, here, ours.fileno(), None, 1)
        self.stack.enter_context(closing(link))
        self._incoming = IncomingPostcopy(link, IDENTITY, True, -1)
        self._server = PageServer(self._memory, PageMap(PAGES), lambda: 0)

    def repair(self, data: bytes) -> bytes:
        """Seal the frames."""
        return sealed(data)

    def deal_with(self, data: bytes, pieces: Sequence[bytes]) -> None:
        """Hear it as the destination, and if it is no source's as the source."""
        trio.run(self._hear, pieces)

    async def _hear(self, pieces: Sequence[bytes]) -> None:
        ours, theirs = connected(pieces)
        with closing(theirs), closing(Connection(trio.socket.from_stdlib_socket(ours))) as connection:
            assert connection.stream is not None
            if await greet(connection.stream, self._incoming):
                return
        ours, theirs = connected(pieces)
        with closing(theirs), closing(Connection(trio.socket.from_stdlib_socket(ours))) as connection:
            no: Any = None  # what is not used here
            found = await lacking(connection, OutgoingPostcopy(self._server, connection, None, IDENTITY, no, no))
            assert found.pages == PAGES


CHANNEL_TARGETS: Final[dict[str, Callable[[], Target]]] = {
    "channel-preamble": ChannelPreamble,
    "multifd-channel": MultifdChannel,
    "postcopy-source": PostcopySource,
    "postcopy-destination": PostcopyDestination,
    "postcopy-greeting": PostcopyGreeting,
}
