"""Phase ``running``: the guest lives. That it runs, stands or has failed are run states of this one phase."""

from __future__ import annotations

import contextlib
import time
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Final, TypeAlias, final

import attrs
import trio

from vmm.capabilities import (
    MayCreateBackend,
    MayInject,
    MayOpenHostFile,
    MayPlugDevice,
    MayRestoreGuest,
    MayRunVcpus,
    MaySetMigrationCap,
    MaySetMigrationParam,
    MayStartMigration,
)
from vmm.cpr.handover import take
from vmm.decisions import Inbox
from vmm.errors import CprError, InvalidState, VmmError
from vmm.migration.status import MigrationStatus
from vmm.phases.building import SavedState
from vmm.phases.copy_plan import CopyPlan
from vmm.phases.copying import Gone, run_copying
from vmm.phases.departure import Departure
from vmm.phases.dirty_limits import DirtyLimits
from vmm.phases.dirty_rate import DirtyRates
from vmm.phases.executing import ExecPlan, run_executing
from vmm.phases.guest_requests import GuestRequests, GuestWishes
from vmm.phases.migrating import TransferPlan, run_migrating
from vmm.phases.postmigrate import run_postmigrate
from vmm.phases.restoring import run_restoring
from vmm.phases.run_state import NEEDS_RESET, RunStateName
from vmm.phases.session_moves import go_on
from vmm.phases.snapshots import DeletePlan, SavePlan, run_snapshot
from vmm.phases.vcpus import VcpuGang

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from typing import Any

    from vmm.capabilities import Mint
    from vmm.decisions import Turn
    from vmm.kvm.exits import Stop
    from vmm.migration.status import MigrationProgress
    from vmm.nursery_tree import Phase
    from vmm.phases.absent_pages import AbsentPages
    from vmm.phases.incoming import Loaded
    from vmm.phases.machine import Machine
    from vmm.phases.postcopy_target import IncomingPostcopy
    from vmm.phases.quiesced import Pause
    from vmm.phases.vcpus import GuestCpu


Plan: TypeAlias = TransferPlan | ExecPlan | CopyPlan | SavedState | SavePlan | DeletePlan
"""What this phase is asked for that opens another one, or has the guest stand."""


@final
@attrs.frozen
class RunningGrants:
    """Tokens of this phase."""

    run_vcpus: MayRunVcpus
    plug_device: MayPlugDevice
    inject: MayInject
    create_backend: MayCreateBackend
    open_host_file: MayOpenHostFile
    set_migration_cap: MaySetMigrationCap
    set_migration_param: MaySetMigrationParam
    start_migration: MayStartMigration
    restore_guest: MayRestoreGuest


@final
class Run:
    """The guest's run control, and the facet of `may-run-vcpus` once there is a guest."""

    def __init__(self, machine: Machine, *, here: bool = True) -> None:
        self.machine = machine
        self.here = here
        """Whether the guest is this process's to run. Changed under `control`, or before anybody else has it."""
        self.doubt = ""
        """Why nobody here knows whether it is, where it is then not run; empty where that is known."""
        self.lost = ""
        """Why the guest, which has gone, is known to be nowhere; empty if it is not."""
        self.leaves = False
        """Whether it has gone, and this process's machine ends by itself: its clients went along, or it is awaited."""
        self.control: Final = trio.Lock()
        """Held by whoever starts, stops or resets the guest, or pauses it to give it away, from beginning to end."""
        self.status = machine.made.host.status
        self.gang = VcpuGang(machine.vcpus, self._failed)
        self._absent: AbsentPages | None = None

    def see_pages_come(self, phase: Phase) -> None:
        """See the RAM through that comes as it is used, if it does, as a resident of `phase`."""
        pages = self.machine.memory.absent
        if pages is not None:
            from vmm.phases.absent_pages import AbsentPages  # Few guests come so.

            absent = self._absent = self.machine.made.migration.absent = AbsentPages(self, pages)
            phase.residents.start_soon("absent pages", absent.serve)

    async def all_pages(self) -> None:
        """Wait until all of RAM is there, or is lost."""
        if self._absent is not None:
            await self._absent.over.wait()
            self._absent = None

    def start_nowait(self) -> None:
        """Let the vCPUs in, and say so. The guest's watchdogs are told that it stood."""
        self.machine.processors.note_pause()
        self.gang.start_nowait()
        self.status.runs()

    @asynccontextmanager
    async def _controlled(self) -> AsyncGenerator[None, None]:
        # For commands: where it is not known who has the guest, those that wait are deferred.
        await self.machine.made.host.tree.deferral.wait(self.control.acquire)
        try:
            yield
        finally:
            self.control.release()

    async def cont(self) -> None:
        """Run the guest. `InvalidState` after a failure that only a reset mends."""
        async with self._controlled():
            self._require_here("cont")
            if self.status.name in NEEDS_RESET:
                raise InvalidState(
                    what="cont",
                    state=f"in run state {self.status.name}: {self.status.failure}",
                    instead="system_reset first",
                )
            if not self.gang.running:
                self.start_nowait()

    async def stop(self) -> None:
        """Take every vCPU out of the guest."""
        async with self._controlled():
            self._require_here("stop")
            await self.gang.stop()
            if self.status.name in ("running", "prelaunch"):
                self.status.stands("paused")

    async def reset(self) -> None:
        """Put the machine into its power-on state; it runs afterwards if it ran before."""
        async with self._controlled():
            self._require_here("system_reset")
            await self.reset_because("host-qmp-system-reset")

    def _require_here(self, what: str) -> None:
        # For a command that waited while the guest was given away: nothing here may touch it any more.
        if self.doubt:
            instead = "migrate-recover here, and migrate with resume at the source, find out"
            raise InvalidState(what=what, state=f"while nobody knows whose the guest is: {self.doubt}", instead=instead)
        if not self.here:
            instead = "the process that has it answers at this machine's own monitor sockets"
            raise InvalidState(what=what, state="here: the guest has been handed over", instead=instead)

    async def reset_because(self, cause: str) -> None:
        """Reset for `cause`, a QAPI ShutdownCause. Called with `control` held.

        Raises:
            VmmError: it cannot be, as RAM that it takes is not here; the guest stands, as is told, until another reset.
        """
        ran = self.gang.running and self.status.running
        await self.gang.stop()
        try:
            self.machine.power_on_again()
        except VmmError as error:
            self.machine.made.host.complain(f"{error}; the machine stands until system_reset")
            self.status.stands("internal-error", failure=str(error))
            raise
        self.machine.made.host.events.emit("RESET", {"guest": cause.startswith("guest"), "reason": cause})
        if ran:
            self.gang.start_nowait()
            if not self.status.running:  # it failed while it was being stopped
                self.status.runs()
        elif self.status.name in NEEDS_RESET:
            self.status.stands("paused")

    def _failed(self, vcpu: GuestCpu, stop: Stop) -> None:
        """A vCPU cannot go on: everything stands, the monitor says why, and the process lives."""
        for other in self.gang.vcpus:
            if other is not vcpu:
                other.kick()
        name: RunStateName = "guest-panicked" if stop.reason == "shutdown" else "internal-error"
        failure = f"vCPU {vcpu.index}: {stop.detail or stop.reason}"
        data = {"cpu-index": vcpu.index, "reason": stop.reason, "detail": stop.detail, "registers": stop.registers}
        host = self.machine.made.host
        host.events.emit("VCPU_FAILED", data)
        host.complain(f"{failure}; the machine stands until system_reset")
        self.status.stands(name, failure=failure)


@final
class _Restoration:
    """The facet of `may-restore-guest`."""

    def __init__(self, inbox: Inbox[Plan]) -> None:
        self._inbox = inbox

    def decide(self, saved: object) -> Awaitable[None]:
        """Post what is to be put in the guest's place; settles once it is."""
        assert isinstance(saved, SavedState)
        own = SavedState(saved.take(), saved.wishes)
        turn = self._inbox.post(own)
        turn.on_settled(own.close)
        return turn


async def run_running(
    parent: Phase, run: Run, *, start: bool, loaded: Loaded | None = None, copied: Copied | None = None
) -> None:
    """Run the guest until the machine ends, or has gone to another process; then go on to phase postmigrate.

    With `loaded`, the guest is a predecessor's until it has been taken here; `start` is then what it was there. With
    `copied` it has been taken up already.
    """
    async with parent.child("running", machine_phase="machine-ready") as phase:
        if loaded is None and copied is None:
            await phase.residents.start("vcpus", run.gang.serve)
        await phase.residents.start("guest requests", GuestRequests(run).serve)
        if copied is None or copied.rest is None:
            run.see_pages_come(phase)
        if loaded is not None:
            await take_over(run, loaded)
            phase.tree.reserved_for = None
        elif start and copied is None:
            run.start_nowait()
        while (left := await stay_in_running(phase, run, copied, start=start)) is not None:
            copied = None
            # It was copied, and is whole here: whoever says so runs it here again.
            await run_postmigrate(phase, left)
            run.here = True
            run.machine.wake()
            run.machine.bells.take_over(GuestWishes())
            run.start_nowait()
        if run.leaves:
            run.machine.made.host.end_without_clients(run.lost)
        await run_postmigrate(phase, None)


def _way_of(run: Run, plan: CopyPlan) -> Callable[[Phase, Run, CopyPlan, Turn[Any]], Awaitable[Gone | None]]:
    """Return what copies the guest as `plan` and the migration capabilities say. Raises `VmmError` if they disagree."""
    capabilities = run.machine.made.migration.capabilities
    if not capabilities["mapped-ram"] and not capabilities["background-snapshot"]:
        return run_copying
    from vmm.phases.saving import require_saving_possible, run_saving  # Most guests are not saved.

    require_saving_possible(run, plan)
    # What stays where it is has its place there.
    return run_copying if capabilities["x-ignore-shared"] and run.machine.memory.can_stay else run_saving


@final
@attrs.frozen(eq=False)
class Copied:
    """A guest whose state was loaded here, and which no other process runs."""

    pause: Pause
    progress: MigrationProgress
    rest: IncomingPostcopy | None = None
    """What is still to come of it; None where all is here."""

    async def take_up(self, run: Run, *, start: bool) -> int | None:
        """Go on where it stood; run it if it ran and `start` says so. Nobody has had its run control so far.

        Return when it was about to run, CLOCK_MONOTONIC in ns, or None: it does not, or that is not known yet.
        """
        run.control.acquire_nowait()  # without a turn of the loop
        try:
            return await self._take_up(run, start=start)
        finally:
            run.control.release()

    async def _take_up(self, run: Run, *, start: bool) -> int | None:
        pause = self.pause
        resumed: int | None = None
        if self.rest is not None and not self.rest.ours:
            start = run.here = False
            run.doubt = "the connection broke as its source was to let it go"
        run.machine.bells.forget()  # What a client of qtest did here before.
        if pause.runs and start:
            run.machine.processors.note_pause()
            since = time.time_ns()
            resumed = run.gang.start_now()
        else:
            await run.gang.stop()
        run.machine.wake()
        run.machine.bells.take_over(pause.wishes)
        if pause.runs and start:
            run.status.runs(since=since)
        else:
            run.status.stands("paused" if pause.runs else pause.run_state, failure=pause.failure)
        if self.rest is None:
            self.progress.advance(MigrationStatus.COMPLETED)
        else:
            self.progress.advance(MigrationStatus.POSTCOPY_ACTIVE)
        return resumed


async def take_over(run: Run, loaded: Loaded) -> None:
    """Take the guest from its predecessor, and run it if it ran there.

    Raises:
        CprError: the predecessor kept it; nothing here has touched the guest.
    """
    made = run.machine.made
    arrival = loaded.arrival
    progress = made.incoming.progress
    assert progress is not None
    try:
        arrival.steps.reach("loaded")
        with made.host.calling_off.block():
            await take(arrival.cell, arrival.channel, arrival.steps)
    except VmmError as error:
        made.migration.ended(progress, error)
        raise
    made.host.calling_off.end()
    # The guest is ours. Nothing waits, and nothing may fail, before it runs.
    run.here = True
    pause = loaded.pause
    resumed = run.gang.start_now() if pause.runs else None
    arrival.steps.reach("running")
    run.machine.resume()
    run.machine.bells.take_over(pause.wishes)
    arrival.adopt_standard_error(made.host.start)
    if pause.runs:
        run.status.runs()
    else:
        run.status.stands(pause.run_state, failure=pause.failure)
        await run.gang.stop()
    with contextlib.suppress(CprError):
        # The source may be dead by now. It finds in the cell what this message says.
        if pause.runs and resumed is None:
            resumed = await run.gang.entered()
        await arrival.channel.send("running", {"resumed-ns": resumed})
    loaded.urgency.close()
    arrival.over.set()


async def stay_in_running(phase: Phase, run: Run, copied: Copied | None = None, *, start: bool = False) -> Gone | None:
    """Hold the phase's window open until the guest is gone from this process. What is to come of `copied` comes first.

    Return what is left here if it was copied, None if it was handed over.
    """
    machine = run.machine
    made = machine.made
    inbox: Inbox[Plan] = Inbox("running")
    left: Gone | None = None
    rates = DirtyRates(
        machine.memory, machine.accelerator.vm, made.migration.note_rate, made.host.complain, phase.residents
    )
    limits = DirtyLimits(
        machine.memory, machine.accelerator.vm, run.gang.vcpus, rates, made.migration.note_limited,
        made.host.complain, phase.residents,
    )  # fmt: skip

    def grants(mint: Mint) -> RunningGrants:
        return RunningGrants(
            run_vcpus=mint(MayRunVcpus, run),
            plug_device=mint(MayPlugDevice, machine.slots),
            inject=mint(MayInject, machine.access),
            create_backend=mint(MayCreateBackend, made.host.stores),
            open_host_file=mint(MayOpenHostFile, made.host.files),
            set_migration_cap=mint(MaySetMigrationCap, made.migration.capabilities),
            set_migration_param=mint(MaySetMigrationParam, made.migration.parameters),
            start_migration=mint(MayStartMigration, Departure(inbox, run, rates, limits)),
            restore_guest=mint(MayRestoreGuest, _Restoration(inbox)),
        )

    async with phase.window(grants):
        # What came with the guest begins its commands now: here is what they need.
        go_on(made.host.stores.moving, phase.tree.deferral)
        made.host.stores.begin()
        gone = False
        if copied is not None and copied.rest is not None:
            from vmm.phases.postcopy_target import see_postcopy_through  # Few guests come so.

            await see_postcopy_through(phase, run, copied.rest, runs=start and copied.pause.runs)
        while not gone:
            turn = await inbox.take()
            if turn.settled:
                continue
            if made.incoming.arrival is not None:
                # Of two migrations at a time nobody could say what is set for which.
                await made.incoming.arrival.settled.wait()
            await rates.hold()
            await limits.hold()
            with closing(turn.value) as plan:
                try:
                    # What has not come is not here to be given away.
                    await run.all_pages()
                    await phase.tree.drain(turn, "migrating")
                    if isinstance(plan, SavedState):
                        await _restore(phase, run, plan, turn)
                        continue
                    if isinstance(plan, DeletePlan):
                        await plan.carry_out(made.host.jobs, turn)
                        continue
                    with made.migration.attempt("source", plan.wishes):
                        if isinstance(plan, CopyPlan):
                            copy = _way_of(run, plan)
                            left = await copy(phase, run, plan, turn)
                            gone = left is not None
                        elif isinstance(plan, SavePlan):
                            await run_snapshot(phase, run, plan, turn)
                        elif isinstance(plan, ExecPlan):
                            run.leaves = gone = await run_executing(phase, run, plan, turn)
                        else:
                            gone = await run_migrating(phase, run, plan, turn)
                            run.leaves = gone and (plan.sessions or made.host.ending.afterwards is not None)
                except VmmError as error:
                    if turn.settled:
                        raise
                    turn.fail(error)
                finally:
                    # Not before the migration is over: what their commands need must be granted.
                    go_on(made.host.stores.moving, phase.tree.deferral)
                    if not gone:
                        rates.release()
                        limits.release()
        inbox.close()
    return left


async def _restore(phase: Phase, run: Run, saved: SavedState, turn: Turn[Plan]) -> None:
    """Put what was saved in the guest's place. Where that is a job, it has the outcome once it has begun."""
    is_job = saved.wishes.job is not None
    with run.machine.made.migration.attempt("target", saved.wishes):
        try:
            await run_restoring(phase, run, saved, turn.succeed if is_job else lambda: None)
        except VmmError:
            run.see_pages_come(phase)  # of a guest that is neither the old nor the new one
            if not turn.settled:
                raise
            return
    run.see_pages_come(phase)
    turn.succeed()
