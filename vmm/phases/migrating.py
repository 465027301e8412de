"""Phase ``migrating``: a live update is under way. An exclusive child of running.

It withholds what would change the machine; queries, run control and migration parameters stay. Everything slow comes
first: when phase quiesced opens and the guest pauses, the destination has built all there is to build.
"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Final, final

import attrs
import trio

from vmm.capabilities import (
    MayCancelMigration,
    MayCreateBackend,
    MayOpenHostFile,
    MayPlugDevice,
    MaySendDescriptors,
    MaySetMigrationCap,
    MayStartMigration,
)
from vmm.cpr.cell import Owner, OwnershipCell
from vmm.cpr.channel import CprChannel
from vmm.cpr.steps import Steps
from vmm.errors import CprPeerGone, MigrationCancelled, VmmError, leaves
from vmm.migration.connect import connect, connect_stream
from vmm.migration.status import MigrationStatus
from vmm.phases.quiesced import Transfer, run_quiesced

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from vmm.capabilities import Mint
    from vmm.migration.channel import Channels
    from vmm.nursery_tree import Phase, Turn
    from vmm.phases.running import Run

PATIENCE: Final = 30.0
"""Seconds that the destination has for each step before the pause."""

WITHHELD: Final = (
    MayPlugDevice, MayCreateBackend, MayOpenHostFile, MaySetMigrationCap, MayStartMigration,
)  # fmt: skip


@final
@attrs.frozen
class TransferPlan:
    """Where a live update goes."""

    channels: Channels
    sessions: bool = False
    """Whether monitor sessions move too (`migrate-sessions`)."""


@final
@attrs.frozen
class MigratingGrants:
    """Tokens of this phase."""

    cancel_migration: MayCancelMigration
    send_descriptors: MaySendDescriptors


@final
class _Canceller:
    """The facet of `may-cancel-migration`."""

    def __init__(self) -> None:
        self.scope: Final = trio.CancelScope()
        self.by = ""

    def cancel(self, by: str) -> None:
        """Call the migration off."""
        self.by = self.by or by
        self.scope.cancel()


async def run_migrating(running: Phase, run: Run, turn: Turn[TransferPlan]) -> bool:
    """Hand the guest over as `turn` says. Return whether it is gone; if not, it goes on here.

    Raises:
        VmmError: only before the phase's window has opened; later failures are in `query-migrate`.
    """
    machine = run.machine
    made = machine.made
    migration = made.migration
    channels = turn.value.channels
    assert channels.cpr is not None, "checked by the command"
    steps = Steps("source", made.host.start.stop_at)
    async with running.child("migrating") as phase:
        sock = await connect(channels.cpr, within=PATIENCE)
        with closing(CprChannel(sock, side="source", peer="destination")) as channel, closing(
            OwnershipCell.create()
        ) as cell:
            steps.reach("connected")
            canceller = _Canceller()

            def grants(mint: Mint) -> MigratingGrants:
                return MigratingGrants(
                    cancel_migration=mint(MayCancelMigration, canceller),
                    send_descriptors=mint(MaySendDescriptors, channel),
                )

            running.tree.move(turn)
            progress = migration.begin("source")
            async with phase.window(grants, withholds=WITHHELD) as window:
                try:
                    with canceller.scope:
                        may = window.grants.send_descriptors
                        await _describe(may, channel, steps, machine, cell)
                        main = await connect_stream(channels.main, within=PATIENCE)
                        async with main:
                            transfer = Transfer(channel, cell, main, steps, progress, may)
                            await run_quiesced(phase, run, transfer)
                except* VmmError as group:
                    failure = next(error for error in leaves(group) if isinstance(error, VmmError))
                    migration.failed(progress, str(failure))
                if canceller.scope.cancelled_caught and cell.owner is Owner.SOURCE:
                    cancelled = MigrationCancelled(by=canceller.by)
                    await channel.refuse(str(cancelled))
                    progress.advance(MigrationStatus.CANCELLING)
                    progress.advance(MigrationStatus.CANCELLED)
            return cell.owner is not Owner.SOURCE


async def _describe(
    may: MaySendDescriptors, channel: CprChannel, steps: Steps, machine: Any, cell: OwnershipCell
) -> None:
    """Tell the destination what the machine is, lend it every descriptor, and wait until it has built it all."""
    host = machine.made.host
    with trio.move_on_after(PATIENCE) as patience:
        await channel.hello(host.start.version.package)
        body: Mapping[str, Any] = {
            "recipe": host.recorder.recipe().to_json(),
            "run-state": host.status.name,
        }
        await may.send("machine", body, {**machine.descriptors(), "owner": cell.fd})
        steps.reach("described")
        channel.step = "building"
        machine.prepare_to_move()
        message = await channel.receive("ready")
        message.close()
        steps.reach("ready")
    if patience.cancelled_caught:
        what = f"did not answer within {PATIENCE:g} s"
        raise CprPeerGone(peer="destination", what=what, step=channel.step, outcome="the guest was not paused")
