"""Phase ``migrating``: a live update is under way. An exclusive child of running.

It withholds what would change the machine; queries, run control and migration parameters stay. Everything slow comes
first: when phase quiesced opens and the guest pauses, the destination has built all there is to build.
"""

from __future__ import annotations

import socket
from contextlib import ExitStack, closing, suppress
from typing import TYPE_CHECKING, Any, Final, final

import attrs
import trio

from vmm.capabilities import (
    MayCancelMigration,
    MayCreateBackend,
    MayOpenHostFile,
    MayPlugDevice,
    MayPreviewState,
    MayReadDirtyLog,
    MaySendDescriptors,
    MaySetMigrationCap,
    MayStartMigration,
    MaySteerPostcopy,
    MaySwitchOver,
)
from vmm.cpr.berth import Berth
from vmm.cpr.cell import OwnershipCell
from vmm.cpr.channel import CprChannel
from vmm.cpr.limits import CprLimits
from vmm.cpr.steps import Steps
from vmm.errors import CprError, CprPeerGone, HostFileRefused, MigrationCancelled, MigrationRefused, VmmError
from vmm.migration.address import ExecAddress, FileAddress
from vmm.migration.connect import close_descriptors, connect, connect_stream
from vmm.migration.status import MigrationStatus
from vmm.phases.afterwards import StandBy
from vmm.phases.cpu_differences import cpu_to_json
from vmm.phases.migration_state import NO_WISHES, Wishes
from vmm.phases.quiesced import Transfer, run_quiesced
from vmm.phases.section_kinds import OlderSections, sections_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmm.capabilities import Mint
    from vmm.decisions import Turn
    from vmm.migration.address import SocketAddress
    from vmm.migration.channel import Channels
    from vmm.migration.status import MigrationProgress
    from vmm.nursery_tree import Phase
    from vmm.phases.assembly import Precreated
    from vmm.phases.machine import Machine
    from vmm.phases.running import Run

STDERR: Final = "stderr"
"""Name of the descriptor of the source's standard error."""

_CONNECTING: Final = 10.0
"""Seconds for the CPR channel to be connected. It is a unix socket: only a full backlog makes it wait."""

_DYING: Final = 1.0
"""Seconds for a destination whose main channel is gone to be seen to go itself. The guest runs on meanwhile."""

_FAREWELL: Final = 1.0
"""Seconds for the last message: it finds room in the socket, or nobody reads it."""

WITHHELD: Final = (
    MayPlugDevice, MayCreateBackend, MayOpenHostFile, MaySetMigrationCap, MayStartMigration,
)  # fmt: skip


@final
@attrs.define(eq=False)
class TransferPlan:
    """Where a live update goes. Owns the descriptors among its channels."""

    channels: Channels
    sessions: bool = False
    """Whether monitor sessions move too (`migrate-sessions`)."""
    wishes: Wishes = NO_WISHES
    _closed: bool = False

    async def connect(self) -> trio.socket.SocketType:
        """Connect the CPR channel.

        Raises:
            HostFileRefused: nobody listens there.
            MigrationRefused: it is no unix stream socket: no other passes descriptors.
        """
        address = self.channels.cpr
        assert address is not None, "checked by the command"
        assert not isinstance(address, ExecAddress | FileAddress), "checked by the command"
        sock = await connect(address, within=_CONNECTING)
        if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            sock.close()
            raise MigrationRefused(
                reason="migrate: the channel of type 'cpr' must be a unix stream socket, to pass descriptors"
            )
        return sock

    def close(self) -> None:
        """Close the descriptors; the sockets that were connected stay. Idempotent."""
        if not self._closed:
            self._closed = True
            close_descriptors((self.channels.main, self.channels.cpr))


@final
@attrs.frozen
class MigratingGrants:
    """Tokens of this phase."""

    cancel_migration: MayCancelMigration
    send_descriptors: MaySendDescriptors | None
    """None where the guest is copied."""
    steer_postcopy: MaySteerPostcopy | None = None
    """None where no guest is copied to a destination that runs."""
    read_dirty_log: MayReadDirtyLog | None = None
    """None where its RAM is not copied while it runs."""
    preview_state: MayPreviewState | None = None
    """Likewise."""
    switch_over: MaySwitchOver | None = None
    """None where the guest is not copied."""


@final
class _Canceller:
    """The facet of `may-cancel-migration`."""

    def __init__(self, cell: OwnershipCell) -> None:
        self._cell = cell
        self.scope: Final = trio.CancelScope()
        self.by = ""

    def cancel(self, by: str) -> None:
        """Call the migration off. Without effect once the guest has been offered: the cell decides then."""
        if self._cell.ours:
            self.by = self.by or by
            self.scope.cancel()


async def run_migrating(running: Phase, run: Run, plan: TransferPlan, turn: Turn[Any]) -> bool:
    """Hand the guest over as `plan` says. Return whether it is gone; if not, it goes on here.

    Raises:
        VmmError: only before the phase has opened; later failures are in `query-migrate`.
    """
    machine = run.machine
    made = machine.made
    migration = made.migration
    steps = Steps("source", made.host.start.stop_at)
    limits = made.host.start.limits or CprLimits()
    steps.reach("begun")
    with (
        ExitStack() as stack,
        closing(
            CprChannel(await plan.connect(), side="source", peer="destination", uids=made.host.start.cpr_uids)
        ) as channel,
        closing(OwnershipCell.create()) as cell,
    ):
        # All that is needed to take the guest back is there before it goes.
        keeps = migration.parameters["x-keep-source"]
        berth = stack.enter_context(closing(Berth.bind())) if keeps else None
        kept = stack.enter_context(closing(StandBy(berth, channel.leash()))) if berth is not None else None
        async with running.child("migrating") as phase:
            steps.reach("connected")
            canceller = _Canceller(cell)

            def grants(mint: Mint) -> MigratingGrants:
                return MigratingGrants(
                    cancel_migration=mint(MayCancelMigration, canceller),
                    send_descriptors=mint(MaySendDescriptors, channel),
                )

            running.tree.move(turn)
            progress = migration.begin("source")
            steps.follow(progress.note_step)
            async with phase.window(grants, withholds=WITHHELD) as window:
                try:
                    with canceller.scope:
                        may = window.grants.send_descriptors
                        assert may is not None, "minted above"
                        older = await _describe(may, channel, steps, machine, plan, cell, limits)
                        assert not isinstance(plan.channels.main, ExecAddress | FileAddress), "checked by the command"
                        main = await _connect_main(plan.channels.main, channel, limits)
                        async with main:
                            steps.reach("main-connected")
                            transfer = Transfer(channel, cell, main, steps, limits, progress, may, older, plan.sessions)
                            await run_quiesced(phase, run, transfer)
                except* (VmmError, OSError, MemoryError) as group:
                    failure = channel.blame(group)
                    if cell.ours:
                        # So that the destination, if it lives, can say why; it may be the one that refused.
                        await channel.refuse(str(failure))
                    migration.failed(progress, str(failure))
                if canceller.scope.cancelled_caught and cell.ours and progress.under_way:
                    await channel.refuse(str(MigrationCancelled(by=canceller.by)))
                    progress.advance(MigrationStatus.CANCELLING)
                    progress.advance(MigrationStatus.CANCELLED)
            if not cell.ours:
                made.host.let_predecessor_go()
                told = await _finish(channel, progress, made, berth)
                if told and kept is not None:
                    made.host.ending.afterwards = kept
                    stack.pop_all()
        return not cell.ours


async def _connect_main(address: SocketAddress, channel: CprChannel, limits: CprLimits) -> trio.SocketStream:
    """Connect the main channel.

    Raises:
        HostFileRefused: it cannot be connected, and the destination lives.
        CprError: what the destination said, or that it has gone: the reason for the other.
    """
    try:
        return await connect_stream(address, within=limits.building)
    except HostFileRefused:
        with trio.move_on_after(_DYING):
            await channel.watch()
        raise


async def _finish(channel: CprChannel, progress: MigrationProgress, made: Precreated, berth: Berth | None) -> bool:
    """Tell the destination, if it listens, that all is over here, how long the guest stood, and where it can go back.

    Return whether it listened.
    """
    body: dict[str, Any] = {"pause": dict(progress.pause_stages or {})}
    if berth is not None:
        body["kept"] = {"channels": berth.channels.to_json(), "program": made.host.start.version.package}
    if made.host.start.is_caretaker and made.incoming.progress is not None:
        body["before"] = dict(made.incoming.progress.pause_stages or {})
    with trio.move_on_after(_FAREWELL, shield=True), suppress(CprError):
        await channel.send("finished", body)
        return True
    return False


async def ask_destination(machine: Machine, plan: TransferPlan) -> Mapping[str, Any]:
    """Describe the machine to the destination of `plan`, send no descriptor, and return what it says of it.

    Raises:
        VmmError: there is nobody, or nobody who can be asked.
    """
    host = machine.made.host
    limits = host.start.limits or CprLimits()
    sock = await plan.connect()
    with closing(CprChannel(sock, side="source", peer="destination", uids=host.start.cpr_uids)) as channel:
        with trio.move_on_after(limits.checking):
            await channel.hello(host.start.version.package)
            channel.step = "checking"
            body = {
                "recipe": _recipe(machine),
                "cpu": cpu_to_json(machine.cpu),
                "descriptors": sorted(machine.descriptors()),
                "sections": sections_of(machine, channel.peer_hello),
            }
            await channel.send("check", body)
            with closing(await channel.receive("checked")) as message:
                return message.body
        what = f"did not answer within {limits.checking:g} s"
        raise CprPeerGone(peer="destination", what=what, step=channel.step, outcome="the guest has not noticed")


def _hears(channel: CprChannel, what: str) -> bool:
    """Say whether the destination takes in `what` before the pause: one of an older program does not."""
    heard = channel.peer_hello.get("hears")
    return isinstance(heard, list) and what in heard


def _recipe(machine: Machine, *, sessions: bool = False) -> list[dict[str, Any]]:
    from vmm.phases.catalog import rank  # Which imports the commands, which import this module.

    host = machine.made.host
    besides = host.stores.single_monitors() if sessions else ()
    return host.recorder.recipe(besides=besides).ordered(rank).to_json()


async def _describe(
    may: MaySendDescriptors,
    channel: CprChannel,
    steps: Steps,
    machine: Machine,
    plan: TransferPlan,
    cell: OwnershipCell,
    limits: CprLimits,
) -> OlderSections:
    """Tell the destination what the machine is, lend it every descriptor, and wait until it has built it all.

    Returns the sections that it gets in an older version.
    """
    host = machine.made.host
    with trio.move_on_after(limits.building):
        await channel.hello(host.start.version.package)
        steps.reach("greeted")
        channel.step = "describing"
        sections = sections_of(machine, channel.peer_hello, sessions=plan.sessions)
        body: Mapping[str, Any] = {
            "recipe": _recipe(machine, sessions=plan.sessions),
            "cpu": cpu_to_json(machine.cpu),
            "run-state": host.status.name,
            "sections": sections,
            "fdsets": host.stores.tell_fdsets(heard=_hears(channel, "fdsets")),
            "service": host.service.address,
        }
        descriptors = {**machine.descriptors(sessions=plan.sessions), "owner": cell.fd}
        if host.start.stderr is not None:
            descriptors[STDERR] = host.start.stderr
        await may.send("machine", body, descriptors)
        steps.reach("described")
        channel.step = "building"
        machine.prepare_to_move()
        message = await channel.receive("ready")
        message.close()
        steps.reach("ready")
        return OlderSections(sections)
    what = f"did not answer within {limits.building:g} s"
    raise CprPeerGone(peer="destination", what=what, step=channel.step, outcome="the guest was not paused")
