"""Phase ``quiesced``: every vCPU is out, every queue at rest. What happens here is the guest's pause."""

from __future__ import annotations

import time
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, final

import attrs
import trio

from vmm.capabilities import MayInject, MayRunVcpus, MaySaveState
from vmm.cpr.urgency import Urgency
from vmm.errors import CprPeerGone, StreamCorrupt
from vmm.migration.status import MigrationStatus
from vmm.migration.stream import StreamWriter
from vmm.phases.guest_requests import GuestWishes
from vmm.phases.handover import run_handover
from vmm.phases.run_state import RunStateName, run_state_named
from vmm.phases.session_moves import come_to_rest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vmm.capabilities import MaySendDescriptors, Mint
    from vmm.cpr.cell import OwnershipCell
    from vmm.cpr.channel import CprChannel
    from vmm.cpr.limits import CprLimits
    from vmm.cpr.steps import Steps
    from vmm.kvm.memory import GuestMemory
    from vmm.migration.registry import StateRegistry
    from vmm.migration.status import MigrationProgress
    from vmm.migration.stream_records import Section
    from vmm.nursery_tree import Phase
    from vmm.phases.running import Run
    from vmm.phases.section_kinds import OlderSections

WITHHELD: Final = (MayRunVcpus, MayInject)


@final
@attrs.frozen(eq=False)
class Transfer:
    """A live update whose destination is ready."""

    channel: CprChannel
    cell: OwnershipCell
    main: trio.abc.SendStream
    steps: Steps
    limits: CprLimits
    progress: MigrationProgress
    send_descriptors: MaySendDescriptors
    older: OlderSections
    """What the destination reads in an older version alone."""
    sessions: bool
    """Whether clients of monitors go along."""


@final
@attrs.frozen
class QuiescedGrants:
    """Tokens of this phase."""

    save_state: MaySaveState


@final
@attrs.frozen
class StandingGuest:
    """The facet of `may-save-state`."""

    _state: StateRegistry
    _memory: GuestMemory

    def save(self) -> Iterator[Section]:
        """Yield every section."""
        return self._state.save()

    def ram(self) -> GuestMemory:
        """Return the RAM, to be read."""
        return self._memory


@final
@attrs.frozen
class Pause:
    """How a guest was when it was paused, beside its state.

    Where the guest is copied it is a section of its own, in a live update it is in message ``paused``.
    """

    KIND: ClassVar[str] = "pause"
    VERSION: ClassVar[int] = 1

    runs: bool
    """Whether it ran, and shall run on."""
    run_state: RunStateName
    failure: str
    """Why it can't run, in a sentence; empty where it can."""
    wishes: GuestWishes
    """What it has asked for and has not been given yet."""

    def to_json(self) -> dict[str, Any]:
        """Return it as members of the message ``paused``."""
        return {
            "running": self.runs, "run-state": self.run_state, "failure": self.failure, "wishes": self.wishes.to_json(),
        }  # fmt: skip

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Pause:
        """Check what a source sent. Raises `StreamCorrupt`."""
        runs, run_state = body.get("running"), run_state_named(body.get("run-state"))
        failure, wishes = body.get("failure"), GuestWishes.from_json(body.get("wishes"))
        if not isinstance(runs, bool):
            raise StreamCorrupt(reason="the message that the guest is paused lacks running")
        if run_state is None or runs is not (run_state == "running"):
            named = body.get("run-state")
            raise StreamCorrupt(reason=f"run state {named!r} is none of a guest that {'runs' if runs else 'stands'}")
        if not isinstance(failure, str) or len(failure) > _SENTENCE or wishes is None:
            raise StreamCorrupt(reason="the message that the guest is paused lacks failure or wishes")
        return cls(runs, run_state, failure, wishes)


_SENTENCE: Final = 4096
"""Characters."""


@final
class Stopwatch:
    """The stages of a pause, in milliseconds."""

    def __init__(self) -> None:
        self.began: Final = time.monotonic_ns()
        self._last = self.began
        self.stages: dict[str, float] = {}

    def lap(self, stage: str, at: object = None) -> None:
        """End `stage` now, or at the CLOCK_MONOTONIC moment `at` (ns) that the other side named, if it can be true."""
        now = time.monotonic_ns()
        if isinstance(at, int) and self._last <= at <= now:
            now = at
        self.stages[stage] = round((now - self._last) / 1e6, 3)
        self._last = now

    def finish(self) -> None:
        """Add the sum."""
        self.stages["total"] = round((self._last - self.began) / 1e6, 3)


async def run_quiesced(migrating: Phase, run: Run, transfer: Transfer) -> None:
    """Pause the guest, move its state, and give it away. Returns once it is the destination's.

    On every other way out the guest is as it was before: it runs again if it ran.

    Raises:
        VmmError: it stays here.
    """
    # Nobody else starts, stops or resets the guest from here on. Who was at it has finished.
    async with run.control:
        if transfer.sessions:
            host = run.machine.made.host
            await come_to_rest(host.stores.moving, host.tree.deferral)
        with closing(Urgency()) as urgency:
            urgency.begin()
            await _run_quiesced(migrating, run, transfer)


async def _run_quiesced(migrating: Phase, run: Run, transfer: Transfer) -> None:
    host, bells = run.machine.made.host, run.machine.bells
    progress = transfer.progress
    progress.advance(MigrationStatus.ACTIVE)
    progress.advance(MigrationStatus.DEVICE)
    # The stream's head needs no state: made outside the pause.
    writer = StreamWriter(host.start.identity.name or "trio-vmm")
    watch = Stopwatch()
    ran = False
    lost = ""
    try:
        async with migrating.child("quiesced") as phase:
            watch = Stopwatch()
            if not transfer.sessions:
                # What happens is told while the destination loads: until then nothing here has time for it. Clients
                # that go along take what they have been told with them.
                host.events.hold()
            progress.pause_begins()
            ran = run.gang.running
            # Shielded: half a stop cannot be undone. Bounded by a kick's way, and by one non-blocking write.
            with trio.CancelScope(shield=True):
                await run.gang.halt()
                watch.lap("stop")
                await run.machine.quiesce()
                watch.lap("quiesce")
            # A vCPU may have failed in the moment of the stop: then the guest does not run on, neither here nor there.
            ran = ran and run.status.running
            pause = Pause(ran, run.status.name, run.status.failure, bells.pending())
            if ran:
                run.status.stands("finish-migrate")

            def grants(mint: Mint) -> QuiescedGrants:
                guest = StandingGuest(run.machine.state, run.machine.memory)
                return QuiescedGrants(save_state=mint(MaySaveState, guest))

            async with phase.window(grants, withholds=WITHHELD) as window:
                transfer.steps.reach("paused")
                for section in window.grants.save_state.save():
                    told = transfer.older.applied(section)
                    writer.section(told.name, told.version, told.state)
                watch.lap("save")
                body = {**pause.to_json(), "settings": run.machine.made.migration.settings()}
                limit = trio.current_time() + transfer.limits.loading
                await _send(transfer, writer, host.stores.changed_descriptors(), body, limit)
                host.events.release()
                given = await run_handover(phase, transfer, partial(_loaded, transfer, watch, limit))
                watch.lap("resume", given.resumed_ns)
                lost = given.lost
    finally:
        host.events.release()
        # Whichever way this is left, by a cancel too, this process's own swaps of the cell say whose the guest is.
        progress.pause_ends()
        if transfer.cell.ours:
            with trio.CancelScope(shield=True):
                await run.gang.stop()  # whose tasks may not have ended yet
            run.machine.resume()
            if ran:
                run.start_nowait()
        else:
            run.here = False
            host.stores.give_up()
            run.status.stands("postmigrate")
            watch.finish()
            progress.pause_stages = watch.stages
            if lost:
                run.lost = lost
                run.machine.made.migration.failed(progress, lost)
            else:
                # Before a client hears of it: it may tell this process to quit, which is not the service's end.
                host.service.main_process_is(transfer.channel.peer_pid)
                progress.advance(MigrationStatus.COMPLETED)


async def _send(
    transfer: Transfer,
    writer: StreamWriter,
    changed: tuple[dict[str, int], list[str]],
    body: Mapping[str, Any],
    limit: float,
) -> None:
    steps, channel = transfer.steps, transfer.channel
    channel.step = "loading"
    channel.hurry()
    new, gone = changed
    with trio.move_on_at(limit) as patience:
        await transfer.send_descriptors.send("paused", {**body, "gone": gone}, new)
        try:
            await transfer.main.send_all(b"".join(writer.finish()))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise _gone("closed the main channel", steps) from error
        steps.reach("state-sent")
    if patience.cancelled_caught:
        raise _late(transfer)


async def _loaded(transfer: Transfer, watch: Stopwatch, limit: float) -> None:
    with trio.move_on_at(limit) as patience:
        loaded = await transfer.channel.receive("loaded")
        watch.lap("send", loaded.body.get("received-ns"))
        watch.lap("load", loaded.body.get("loaded-ns"))
        watch.lap("answer")
        transfer.steps.reach("loaded")
    if patience.cancelled_caught:
        raise _late(transfer)


def _late(transfer: Transfer) -> CprPeerGone:
    return _gone(f"did not load the state within {transfer.limits.loading:g} s", transfer.steps)


def _gone(what: str, steps: Steps) -> CprPeerGone:
    return CprPeerGone(peer="destination", what=what, step=steps.current, outcome="the guest goes on in the source")
