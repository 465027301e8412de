"""Phase ``postcopy`` at the source: the pages that have not gone go, however often the connection breaks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, final

import attrs
import trio

from vmm.capabilities import MayCancelMigration, MayInject, MayRunVcpus, MayStartMigration, MaySteerPostcopy
from vmm.decisions import Inbox
from vmm.errors import MigrationPeerGone, MigrationRefused, StreamCorrupt, VmmError
from vmm.kvm.page_file import checksum
from vmm.kvm.page_map import PageMap
from vmm.migration.address import ExecAddress, FileAddress
from vmm.migration.page_frames import FRAME_SIZE, Frame, FrameKind
from vmm.migration.page_server import LinkBroken
from vmm.migration.pump import in_thread
from vmm.migration.status import MigrationStatus
from vmm.phases.copy_plan import CopyPlan
from vmm.phases.postcopy import GREETING, PAUSED, PostcopySourceGrants, exactly, hang_up

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vmm.capabilities import Mint
    from vmm.decisions import Turn
    from vmm.hw.doorbell import Doorbell
    from vmm.migration.address import SocketAddress
    from vmm.migration.connection import Connection
    from vmm.migration.page_server import PageServer
    from vmm.migration.status import MigrationProgress
    from vmm.nursery_tree import Phase


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
        elif status is not PAUSED:
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
                progress.advance(PAUSED)
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
            with trio.move_on_after(GREETING) as patience:
                outgoing.server.todo = await lacking(connection, outgoing)
            if patience.cancelled_caught:
                what = f"did not say what it has within {GREETING:g} s"
                raise MigrationPeerGone(peer="destination", what=what, outcome="the postcopy is paused")
        except VmmError as error:
            if connection is not None:
                connection.close()
            progress.advance(PAUSED)
            turn.fail(error)
            continue
        progress.advance(MigrationStatus.POSTCOPY_ACTIVE)
        turn.succeed()
        return connection


async def lacking(connection: Connection, outgoing: OutgoingPostcopy) -> PageMap:
    """Say who this is; return what the destination lacks. Raises `VmmError`."""
    pages = outgoing.server.todo.pages
    stream = connection.stream
    if stream is None:
        raise MigrationRefused(reason="migrate: a postcopy goes on over a socket, which can answer")
    try:
        await stream.send_all(Frame(FrameKind.RESUME, 0, pages).encode() + outgoing.identity)
        frame = Frame.decode(await exactly(stream, FRAME_SIZE), FrameKind.HAVE, FrameKind.REFUSED)
        if frame.kind is FrameKind.REFUSED:
            text = (await exactly(stream, min(frame.pages, 4096))).decode(errors="replace")
            raise MigrationRefused(reason=f"Refused by the destination: {text}")
        if frame.pages != pages:
            raise StreamCorrupt(reason=f"the destination has {frame.pages} pages, expected {pages}")
        lacking = PageMap(pages)
        lacking.set_all()
        words = await exactly(stream, -(-pages // 64) * 8)
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
