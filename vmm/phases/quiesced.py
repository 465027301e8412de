"""Phase ``quiesced``: every vCPU is out, every queue at rest. What happens here is the guest's pause."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, final

import attrs
import trio

from vmm.capabilities import MayRunVcpus, MaySaveState
from vmm.cpr.cell import Owner
from vmm.errors import CprPeerGone
from vmm.migration.status import MigrationStatus
from vmm.migration.stream import StreamWriter
from vmm.phases.handover import run_handover

if TYPE_CHECKING:
    from vmm.capabilities import MaySendDescriptors, Mint
    from vmm.cpr.cell import OwnershipCell
    from vmm.cpr.channel import CprChannel
    from vmm.cpr.steps import Steps
    from vmm.migration.status import MigrationProgress
    from vmm.nursery_tree import Phase
    from vmm.phases.running import Run

WITHHELD: Final = (MayRunVcpus,)

LOADING: Final = 2.0
"""Seconds that a paused guest waits for a destination that loads its state."""


@final
@attrs.frozen(eq=False)
class Transfer:
    """A live update whose destination is ready."""

    channel: CprChannel
    cell: OwnershipCell
    main: trio.abc.SendStream
    steps: Steps
    progress: MigrationProgress
    send_descriptors: MaySendDescriptors


@final
@attrs.frozen
class QuiescedGrants:
    """Tokens of this phase."""

    save_state: MaySaveState


@final
class Stopwatch:
    """The stages of a pause, in milliseconds."""

    def __init__(self) -> None:
        self.began: Final = time.monotonic_ns()
        self._last = self.began
        self.stages: dict[str, float] = {}

    def lap(self, stage: str, at: object = None) -> None:
        """End `stage` now, or at the CLOCK_MONOTONIC moment `at` (ns) that the other side named."""
        now = at if isinstance(at, int) else time.monotonic_ns()
        self.stages[stage] = round((now - self._last) / 1e6, 3)
        self._last = now

    def finish(self) -> None:
        """Add the sum."""
        self.stages["total"] = round((self._last - self.began) / 1e6, 3)


async def run_quiesced(migrating: Phase, run: Run, transfer: Transfer) -> None:
    """Pause the guest, move its state, and give it away. Returns once it is the destination's.

    On every other way out the guest is as it was before: it runs again if it ran.
    """
    host = run.machine.made.host
    progress = transfer.progress
    ran = run.gang.running
    stood = run.status.name
    progress.advance(MigrationStatus.ACTIVE)
    progress.advance(MigrationStatus.DEVICE)
    # The stream's head needs no state: made outside the pause.
    writer = StreamWriter(host.start.identity.name or "trio-vmm")
    watch = Stopwatch()
    try:
        async with migrating.child("quiesced") as phase:
            watch = Stopwatch()
            progress.pause_begins()
            # Shielded: half a stop cannot be undone. Bounded by a kick's way, and by one non-blocking write.
            with trio.CancelScope(shield=True):
                await run.gang.stop()
                watch.lap("stop")
                await host.stores.quiesce()
                watch.lap("quiesce")
            if ran:
                run.status.stands("finish-migrate")

            def grants(mint: Mint) -> QuiescedGrants:
                return QuiescedGrants(save_state=mint(MaySaveState, run.machine.state))

            async with phase.window(grants, withholds=WITHHELD) as window:
                transfer.steps.reach("paused")
                sections = window.grants.save_state.save()
                for section in sections.values():
                    writer.section(section.name, section.version, section.state)
                watch.lap("save")
                await _send(transfer, writer, host.stores.changed_descriptors(), watch, ran=ran, stood=stood)
                await run_handover(phase, transfer, watch)
    finally:
        # Whichever way this is left, by a cancel too, the cell alone says whose the guest is.
        progress.pause_ends()
        if transfer.cell.owner is Owner.SOURCE:
            host.stores.resume()
            if ran:
                run.start_nowait()
        else:
            host.stores.give_up()
            run.status.stands("postmigrate")
            watch.finish()
            progress.pause_stages = watch.stages
            progress.advance(MigrationStatus.COMPLETED)


async def _send(
    transfer: Transfer,
    writer: StreamWriter,
    changed: tuple[dict[str, int], list[str]],
    watch: Stopwatch,
    *,
    ran: bool,
    stood: str,
) -> None:
    steps, channel = transfer.steps, transfer.channel
    channel.step = "loading"
    new, gone = changed
    with trio.move_on_after(LOADING) as patience:
        await transfer.send_descriptors.send("paused", {"running": ran, "run-state": stood, "gone": gone}, new)
        try:
            await transfer.main.send_all(b"".join(writer.finish()))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise _gone("closed the main channel", steps) from error
        steps.reach("state-sent")
        loaded = await channel.receive("loaded")
        watch.lap("send", loaded.body.get("received-ns"))
        watch.lap("load", loaded.body.get("loaded-ns"))
        watch.lap("answer")
        steps.reach("loaded")
    if patience.cancelled_caught:
        raise _gone(f"did not load the state within {LOADING:g} s", steps)


def _gone(what: str, steps: Steps) -> CprPeerGone:
    return CprPeerGone(peer="destination", what=what, step=steps.current, outcome="the guest goes on in the source")
