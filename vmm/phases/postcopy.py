"""Phase ``postcopy``: the guest runs at the destination, and some of its RAM is still at the source. On both sides.

From the moment that the source lets go of the guest it cannot run there again. If the connection breaks both sides wait
for another one: `migrate-recover` at the destination, then `migrate` with `resume` at the source.
"""

from __future__ import annotations

import os
import socket
from contextlib import closing
from typing import TYPE_CHECKING, Any, Final, final

import attrs
import trio

from vmm.capabilities import (
    MayCancelMigration,
    MayCreateBackend,
    MayInject,
    MayOpenHostFile,
    MayPlugDevice,
    MayRestoreGuest,
    MayRunVcpus,
    MaySetMigrationCap,
    MayStartMigration,
    MaySteerPostcopy,
)
from vmm.errors import HostFileRefused, MigrationPeerGone, MigrationRefused, StreamCorrupt, VmmError
from vmm.kvm.page_file import checksum
from vmm.kvm.page_map import PageMap
from vmm.migration.address import ExecAddress, FileAddress
from vmm.migration.connect import listen
from vmm.migration.connection import Connection
from vmm.migration.page_frames import FRAME_SIZE, Frame, FrameKind
from vmm.migration.page_server import LinkBroken
from vmm.migration.pump import in_thread
from vmm.migration.status import MigrationStatus
from vmm.nursery_tree import Inbox
from vmm.phases.copying import CopyPlan

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vmm.capabilities import Mint
    from vmm.hw.doorbell import Doorbell
    from vmm.kvm.faults import PagesFromLink
    from vmm.migration.address import SocketAddress
    from vmm.migration.connect import Listener
    from vmm.migration.page_server import PageServer
    from vmm.migration.status import MigrationProgress
    from vmm.nursery_tree import Phase, Residents, Turn
    from vmm.phases.running import Run
    from vmm.phases.tls_objects import Tls

WITHHELD: Final = (
    MayPlugDevice, MayCreateBackend, MayOpenHostFile, MaySetMigrationCap, MayStartMigration, MayRestoreGuest,
)  # fmt: skip
"""At the destination. At the source the guest is run no more, and the rest is withheld by phase migrating."""

_GREETING: Final = 10.0
"""Seconds for the other side to say what it has, on a new connection."""

_PAUSED: Final = MigrationStatus.POSTCOPY_PAUSED


@final
@attrs.frozen
class PostcopyGrants:
    """Tokens of this phase at the destination."""

    steer_postcopy: MaySteerPostcopy


@final
@attrs.frozen
class PostcopySourceGrants:
    """Tokens of this phase at the source."""

    steer_postcopy: MaySteerPostcopy
    start_migration: MayStartMigration
    """To resume, and for nothing else."""
    cancel_migration: MayCancelMigration
    """To say that it is too late."""


def hang_up(fd: int) -> None:
    """End a connection for both sides; the descriptor stays the caller's."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it is over already


# --- the source ----------------------------------------------------------------------------------------------


@final
class _Source:
    """What the commands do at the source: the facet of `may-steer-postcopy`."""

    def __init__(self, progress: MigrationProgress) -> None:
        self._progress: Final = progress
        self.link: Connection | None = None

    def start(self) -> None:
        """Refuse: it has been done."""
        raise MigrationRefused(reason="migrate-start-postcopy: the guest runs at the destination already")

    def pause(self) -> None:
        """Break the connection. Raises `MigrationRefused` where there is none."""
        if self.link is None:
            raise MigrationRefused(reason=f"migrate-pause: the postcopy is {self._progress.status.value}, not active")
        hang_up(self.link.fd)

    async def recover(self, address: SocketAddress) -> None:
        """Refuse: it is the destination that is connected to."""
        await trio.lowlevel.checkpoint()
        raise MigrationRefused(
            reason="migrate-recover is for the destination of a postcopy; here migrate with resume true goes on with it"
        )


@final
class _Resumption:
    """The facets of `may-start-migration` and `may-cancel-migration` at the source."""

    def __init__(self, progress: MigrationProgress) -> None:
        self._progress: Final = progress
        self.inbox: Final[Inbox[CopyPlan]] = Inbox("postcopy")

    def start(self, plan: Any) -> Awaitable[None]:
        """Post the address of the destination, where it waits."""
        status = self._progress.status
        reason = ""
        if not isinstance(plan, CopyPlan) or not plan.resume:
            reason = "migrate: the guest has gone, and its RAM is going; 'resume' goes on with that after a break"
        elif status is not _PAUSED:
            reason = f"migrate: the postcopy is {status.value}, not paused; it needs no resume"
        elif isinstance(plan.address, (ExecAddress, FileAddress)):
            reason = "migrate: a postcopy goes on over a socket, which can answer"
        if reason:
            plan.close()
            raise MigrationRefused(reason=reason)
        turn: Turn[CopyPlan] = self.inbox.post(plan)
        turn.on_settled(plan.close)
        return turn

    def undo(self) -> Awaitable[None]:
        """Refuse, as all but to resume."""
        raise MigrationRefused(reason="x-cpr-undo: the guest has gone by postcopy, and does not come back so")

    def forget(self) -> None:
        """Refuse likewise."""
        raise MigrationRefused(reason="x-cpr-forget: the guest has gone by postcopy; no process waits for it")

    def measure(self, wanted: Any) -> None:
        """Refuse likewise."""
        raise MigrationRefused(reason="calc-dirty-rate: the guest has gone by postcopy, and writes there")

    def limit(self, index: int | None, quota: int) -> None:
        """Refuse likewise."""
        raise MigrationRefused(reason="set-vcpu-dirty-limit: the guest has gone by postcopy, and writes there")

    async def check(self, plan: Any) -> Any:
        """Refuse likewise."""
        plan.close()
        await trio.lowlevel.checkpoint()
        raise MigrationRefused(reason="x-cpr-check: the guest has gone by postcopy")

    def cancel(self, by: str) -> None:
        """Refuse: half of the guest is there, and it runs."""
        raise MigrationRefused(
            reason="migrate_cancel: the guest runs at the destination already, and would be lost; migrate-pause breaks "
            "the connection, and migrate with resume true goes on"
        )


@final
@attrs.frozen(eq=False)
class OutgoingPostcopy:
    """A guest that has gone, with the pages of it that have not."""

    server: PageServer
    connection: Connection
    urgent: Connection | None
    """Over which goes what is asked for, as long as the connection does not break; it is somebody else's."""
    identity: bytes
    """Names the migration, 16 bytes."""
    progress: MigrationProgress
    dial: Callable[[CopyPlan], Awaitable[Connection]]
    """Connects anew, as the first time: with TLS, if that is set."""


async def run_postcopy_source(migrating: Phase, outgoing: OutgoingPostcopy) -> None:
    """Send what is left of the guest, however often the connection breaks. Returns once all of it is there."""
    progress = outgoing.progress
    source, resumption = _Source(progress), _Resumption(progress)
    async with migrating.child("postcopy") as phase:

        def grants(mint: Mint) -> PostcopySourceGrants:
            return PostcopySourceGrants(
                steer_postcopy=mint(MaySteerPostcopy, source),
                start_migration=mint(MayStartMigration, resumption),
                cancel_migration=mint(MayCancelMigration, resumption),
            )

        async with phase.window(grants, withholds=(MayRunVcpus, MayInject)):
            progress.advance(MigrationStatus.POSTCOPY_ACTIVE)
            connection, urgent = outgoing.connection, outgoing.urgent
            while True:
                source.link = connection
                broken = await _serve(outgoing.server, connection.fd, None if urgent is None else urgent.fd)
                source.link = None
                if broken is None:
                    break
                hang_up(connection.fd)
                if urgent is not None:
                    hang_up(urgent.fd)
                    urgent = None  # another one is not opened
                connection.close()
                progress.note_break(broken)
                progress.advance(_PAUSED)
                connection = await _resumed(resumption, outgoing)
            connection.part()
            connection.close()
    resumption.inbox.close()


async def _serve(server: PageServer, fd: int, urgent: int | None) -> str | None:
    """Send pages; return how the connection broke, or None once all are there."""
    broken: list[str] = []

    def work(bell: Doorbell) -> None:
        try:
            server.run(fd, urgent, bell.fd)
        except LinkBroken as error:
            broken.append(str(error))

    await in_thread(work)
    return broken[0] if broken else None


async def _resumed(resumption: _Resumption, outgoing: OutgoingPostcopy) -> Connection:
    """Wait for another connection, and learn what is lacking there."""
    progress = outgoing.progress
    while True:
        turn = await resumption.inbox.take()
        if turn.settled:
            continue
        progress.advance(MigrationStatus.POSTCOPY_RECOVER_SETUP)
        connection: Connection | None = None
        try:
            connection = await outgoing.dial(turn.value)
            progress.advance(MigrationStatus.POSTCOPY_RECOVER)
            with trio.move_on_after(_GREETING) as patience:
                outgoing.server.todo = await _lacking(connection, outgoing)
            if patience.cancelled_caught:
                what = f"did not say what it has within {_GREETING:g} s"
                raise MigrationPeerGone(peer="destination", what=what, outcome="the postcopy is paused")
        except VmmError as error:
            if connection is not None:
                connection.close()
            progress.advance(_PAUSED)
            turn.fail(error)
            continue
        progress.advance(MigrationStatus.POSTCOPY_ACTIVE)
        turn.succeed()
        return connection


async def _lacking(connection: Connection, outgoing: OutgoingPostcopy) -> PageMap:
    """Say who this is; return what the destination lacks. Raises `VmmError`."""
    pages = outgoing.server.todo.pages
    stream = connection.stream
    if stream is None:
        raise MigrationRefused(reason="migrate: a postcopy goes on over a socket, which can answer")
    try:
        await stream.send_all(Frame(FrameKind.RESUME, 0, pages).encode() + outgoing.identity)
        frame = Frame.decode(await _exactly(stream, FRAME_SIZE), FrameKind.HAVE, FrameKind.REFUSED)
        if frame.kind is FrameKind.REFUSED:
            text = (await _exactly(stream, min(frame.pages, 4096))).decode(errors="replace")
            raise MigrationRefused(reason=f"Refused by the destination: {text}")
        if frame.pages != pages:
            raise StreamCorrupt(reason=f"the destination has {frame.pages} pages, expected {pages}")
        lacking = PageMap(pages)
        lacking.set_all()
        words = await _exactly(stream, -(-pages // 64) * 8)
        if checksum(words) != frame.sums:
            raise StreamCorrupt(reason="the list of pages that the destination has is damaged")
    except trio.BrokenResourceError as error:
        what = "closed the connection"
        raise MigrationPeerGone(peer="destination", what=what, outcome="the postcopy is paused") from error
    here = PageMap(pages)
    try:
        here.load(words)
    except ValueError as error:
        raise StreamCorrupt(reason=f"the list of pages that the destination has is none: {error}") from error
    for first, count in here.runs():
        lacking.discard(first, count)
    return lacking


async def _exactly(stream: trio.SocketStream, size: int) -> bytes:
    found = b""
    while len(found) < size:
        data = await stream.receive_some(size - len(found))
        if not data:
            raise trio.BrokenResourceError
        found += data
    return found


# --- the destination -----------------------------------------------------------------------------------------


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
        if self._progress.status is not _PAUSED:
            status = self._progress.status.value
            raise MigrationRefused(
                reason=f"migrate-recover: the postcopy is {status}, not paused; it needs no recovery"
            )
        self._progress.advance(MigrationStatus.POSTCOPY_RECOVER_SETUP)
        try:
            listener = await listen(address)
        except VmmError:
            self._progress.advance(_PAUSED)
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
                    progress.advance(_PAUSED)
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
            secured = connection if tls is None else await tls.secure(connection, "source", within=_GREETING)
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
        progress.advance(_PAUSED)


async def _met(listener: Listener, incoming: IncomingPostcopy, door: _Door) -> Connection | None:
    """Wait for whoever connects; return the connection if it is the source's."""
    connection = await door.admit(await listener.accept())
    if connection is None:
        return None
    known = False
    try:
        assert connection.stream is not None, "a socket"
        known = await _greet(connection.stream, incoming)
    finally:
        if not known:
            connection.close()
    return connection if known else None


async def _greet(stream: trio.SocketStream, incoming: IncomingPostcopy) -> bool:
    """Hear who has connected, and tell the source what is here; return whether it was that."""
    here = await trio.to_thread.run_sync(incoming.pages.here)
    words = here.dump()
    try:
        with trio.move_on_after(_GREETING):
            frame = Frame.decode(await _exactly(stream, FRAME_SIZE), FrameKind.RESUME)
            identity = await _exactly(stream, len(incoming.identity))
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
