"""Phase ``postcopy`` at the destination: the guest runs, and waits for pages that are not there."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Final, final

import attrs
import trio

from vmm.capabilities import MaySteerPostcopy
from vmm.decisions import Inbox
from vmm.errors import HostFileRefused, MigrationRefused, StreamCorrupt, VmmError
from vmm.kvm.page_file import checksum
from vmm.migration.connect import listen
from vmm.migration.connection import Connection
from vmm.migration.incoming_ram import with_postcopy
from vmm.migration.page_frames import FRAME_SIZE, Frame, FrameKind
from vmm.migration.status import MigrationStatus
from vmm.phases.postcopy import GREETING, PAUSED, WITHHELD, PostcopyGrants, exactly, hang_up

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.capabilities import Mint
    from vmm.kvm.faults import PagesFromLink
    from vmm.migration.address import SocketAddress
    from vmm.migration.connect import Listener
    from vmm.migration.status import MigrationProgress
    from vmm.nursery_tree import Phase
    from vmm.phases.running import Run
    from vmm.phases.tls_objects import Tls
    from vmm.residents import Residents


@final
@attrs.define(eq=False)
class IncomingPostcopy:
    """A guest that has come, with the pages of it that have not."""

    pages: PagesFromLink
    identity: bytes
    ours: bool
    """Whether the source is known to have let go of it; else nobody knows before there is another connection."""
    fd: int
    """Of the connection, which is somebody else's."""
    over: Callable[[], object] = lambda: None
    """Called once nothing comes any more."""


@final
class _Target:
    """What the commands do at the destination: the facet of its token."""

    def __init__(self, progress: MigrationProgress) -> None:
        self._progress: Final = progress
        self.listeners: Final[Inbox[Listener]] = Inbox("postcopy")
        self.link: int | None = None
        self.waits: trio.CancelScope | None = None
        """Of the wait for a source, where it is listened for."""

    def start(self) -> None:
        """Refuse: it has been done, and not here."""
        raise MigrationRefused(reason="migrate-start-postcopy: the guest runs here already; it is for the source")

    def pause(self) -> None:
        """Break the connection, or listen no more for one. Raises `MigrationRefused` where there is none."""
        if self.waits is not None:
            self.waits.cancel()
            return
        if self.link is None:
            raise MigrationRefused(reason=f"migrate-pause: the postcopy is {self._progress.status.value}, not active")
        hang_up(self.link)

    async def recover(self, address: SocketAddress) -> None:
        """Listen for the source. Raises `MigrationRefused` where it is not waited for."""
        if self._progress.status is not PAUSED:
            status = self._progress.status.value
            raise MigrationRefused(
                reason=f"migrate-recover: the postcopy is {status}, not paused; it needs no recovery"
            )
        self._progress.advance(MigrationStatus.POSTCOPY_RECOVER_SETUP)
        try:
            listener = await listen(address)
        except VmmError:
            self._progress.advance(PAUSED)
            raise
        self._progress.addresses = (listener.address,)
        self.listeners.post(listener)


async def see_postcopy_through(running: Phase, run: Run, incoming: IncomingPostcopy, *, runs: bool) -> None:
    """Have the rest of the guest come, however often the connection breaks. Returns once all of it is here.

    Args:
        runs: whether the guest is to run, where it was not known to be this process's.
    """
    machine = run.machine
    progress = machine.made.incoming.progress
    assert progress is not None
    target, pages = _Target(progress), incoming.pages
    if machine.made.migration.capabilities["postcopy-blocktime"]:
        progress.follow_blocktime(lambda: blocktime(run, pages))
    before = progress.ram
    progress.follow_ram(lambda: with_postcopy(before, pages))
    complete = False
    connection: Connection | None = None
    try:
        async with running.child("postcopy") as phase:
            door = _Door(machine.made.incoming.streams.tls, running.residents)

            def grants(mint: Mint) -> PostcopyGrants:
                return PostcopyGrants(steer_postcopy=mint(MaySteerPostcopy, target))

            async with phase.window(grants, withholds=WITHHELD):
                target.link = incoming.fd
                while (broken := await pages.wait_changed()) is not None:
                    target.link = None
                    machine.made.host.complain(str(broken))
                    progress.note_break(str(broken))
                    progress.advance(PAUSED)
                    fresh = await _recovered(target, incoming, progress, door)
                    if connection is not None:
                        connection.close()
                    connection = fresh
                    target.link = connection.fd
                    try:
                        await trio.to_thread.run_sync(pages.relink, target.link, None)
                    except VmmError as error:
                        machine.made.host.complain(str(error))
                        hang_up(connection.fd)
                        continue
                    progress.advance(MigrationStatus.POSTCOPY_ACTIVE)
                    if not incoming.ours:
                        incoming.ours = run.here = True
                        run.doubt = ""
                        if runs:
                            await run.cont()
                        machine.bells.bell.ring()  # for what was asked for before it was known
                complete = True
    finally:
        if not complete:
            # In this order: a page that does not come is zero from then on, and no guest may see that.
            for vcpu in run.gang.vcpus:
                vcpu.kick()
        progress.keep_blocktime()
        pages.close()
        if connection is not None:
            if complete:
                connection.part()  # whoever serves it has the last frame to pass on
            connection.close()
        incoming.over()
    target.listeners.close()
    progress.advance(MigrationStatus.COMPLETED)


@final
@attrs.frozen
class _Door:
    """Lets a source in that connects anew, as the first time: with TLS, if that is set."""

    tls: Callable[[], Tls | None]
    residents: Residents

    async def admit(self, sock: trio.socket.SocketType) -> Connection | None:
        """Return the connection; None where there is no TLS with who has connected."""
        connection = Connection(sock)
        try:
            tls = self.tls()
            secured = connection if tls is None else await tls.secure(connection, "source", within=GREETING)
        except VmmError:
            connection.close()
            return None
        except BaseException:
            connection.close()
            raise
        return secured.serve(self.residents)


async def _recovered(
    target: _Target, incoming: IncomingPostcopy, progress: MigrationProgress, door: _Door
) -> Connection:
    """Wait for a connection of the source's, and tell it what is here."""
    while True:
        turn = await target.listeners.take()
        found: Connection | None = None
        with closing(turn.value) as listener, trio.CancelScope() as target.waits:
            turn.succeed()
            while found is None:
                found = await _met(listener, incoming, door)
        target.waits = None
        if found is not None:
            progress.advance(MigrationStatus.POSTCOPY_RECOVER)
            return found
        progress.advance(PAUSED)


async def _met(listener: Listener, incoming: IncomingPostcopy, door: _Door) -> Connection | None:
    """Wait for whoever connects; return the connection if it is the source's."""
    connection = await door.admit(await listener.accept())
    if connection is None:
        return None
    known = False
    try:
        assert connection.stream is not None, "a socket"
        known = await greet(connection.stream, incoming)
    finally:
        if not known:
            connection.close()
    return connection if known else None


async def greet(stream: trio.SocketStream, incoming: IncomingPostcopy) -> bool:
    """Hear who has connected, and tell the source what is here; return whether it was that."""
    here = await trio.to_thread.run_sync(incoming.pages.here)
    words = here.dump()
    try:
        with trio.move_on_after(GREETING):
            frame = Frame.decode(await exactly(stream, FRAME_SIZE), FrameKind.RESUME)
            identity = await exactly(stream, len(incoming.identity))
            if identity != incoming.identity or frame.pages != here.pages:
                text = b"it awaits the source of another migration"
                await stream.send_all(Frame(FrameKind.REFUSED, 0, len(text)).encode() + text)
                return False
            await stream.send_all(Frame(FrameKind.HAVE, 0, here.pages, checksum(words)).encode() + words)
            return True
    except (trio.BrokenResourceError, StreamCorrupt, HostFileRefused):
        return False
    return False


def blocktime(run: Run, pages: PagesFromLink) -> tuple[int, list[int]]:
    """Return how long all vCPUs have waited for pages at the same time, and how long each of them, in ms."""
    each = [pages.waited(vcpu.thread_id) if vcpu.thread_id else 0 for vcpu in run.gang.vcpus]
    return pages.waited(), each
