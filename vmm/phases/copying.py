"""A migration that copies the guest: its RAM while it runs, what is left of it and its state while it stands.

The phases are those of a live update, `migrating` and `quiesced`, without the change of owner: what goes is a copy, and
the two sides agree which of the two runs: by words (`vmm.migration.words`), or by an ownership cell that they share.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any, Final, final

import attrs
import trio

from vmm.capabilities import (
    MayCancelMigration,
    MayPreviewState,
    MayReadDirtyLog,
    MaySaveState,
    MaySteerPostcopy,
    MaySwitchOver,
)
from vmm.cpr.urgency import Urgency
from vmm.errors import MigrationPeerGone, MigrationRefused, VmmError, leaves
from vmm.migration.address import FileAddress, InetAddress, UnixAddress, VsockAddress
from vmm.migration.further import open_channels
from vmm.migration.outflow import Outflow
from vmm.migration.precopy import Precopy
from vmm.migration.pump import Stopped
from vmm.migration.ram import RamSender
from vmm.migration.ram_file_records import IDENTITY_SIZE
from vmm.migration.status import MigrationRamStats, MigrationStatus
from vmm.migration.stream_records import Section
from vmm.migration.terms import Terms
from vmm.phases.copy_control import Canceller, Claim, Gate, Steering, Watch
from vmm.phases.copy_plan import CopyPlan, staying, travelling
from vmm.phases.cpu_differences import cpu_to_json
from vmm.phases.further_channels import plan_channels
from vmm.phases.migrating import WITHHELD, MigratingGrants
from vmm.phases.quiesced import WITHHELD as QUIESCED_WITHHELD
from vmm.phases.quiesced import Pause, QuiescedGrants, StandingGuest
from vmm.phases.throttle import Throttle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmm.capabilities import Mint
    from vmm.decisions import Turn
    from vmm.kvm.memory import GuestMemory
    from vmm.migration.status import MigrationProgress
    from vmm.nursery_tree import Phase
    from vmm.phases.migration_state import MigrationState
    from vmm.phases.running import Run
    from vmm.phases.tls_objects import Tls

_ANSWERING: Final = 60.0
"""Seconds for a destination that has been sent everything to say that it is in force."""


@final
@attrs.frozen(eq=False)
class _Copy:
    """A migration under way."""

    flow: Outflow
    progress: MigrationProgress
    canceller: Canceller
    claim: Claim
    left: tuple[str, bytes] | None
    """Where RAM stays, and what marks it; None where it is copied."""
    precopy: Precopy
    gate: Gate | None
    """Where it waits before the switchover; None where it does not."""
    steering: Steering
    migration: MigrationState


@final
@attrs.frozen(eq=False)
class Gone:
    """A guest that was copied and let go: how it stands here, and the migration, which completes in postmigrate."""

    pause: Pause
    progress: MigrationProgress
    memory: GuestMemory
    whole: bool = True
    """Whether it may run here again."""


async def run_copying(running: Phase, run: Run, plan: CopyPlan, turn: Turn[Any]) -> Gone | None:
    """Copy the guest to where `plan` says. Return what is left if it has gone; if not, None: it goes on here.

    Raises:
        VmmError: only before the phase has opened; later failures are in `query-migrate`.
    """
    migration = run.machine.made.migration
    pause: Pause | None = None
    failure: VmmError | None = None
    claim = Claim()
    canceller = Canceller(claim)
    left = _left_in_place(run, plan)
    two_way = migration.capabilities["return-path"]
    tls = _tls(run, plan)
    further = None if left is not None else plan_channels(migration, plan.address, tls)
    _require_postcopy_possible(migration, plan)
    calling_off = run.machine.made.host.calling_off
    calling_off.begin()
    try:
        with calling_off.block():
            connection = await plan.open(running.residents, two_way=two_way, tls=tls)
    finally:
        calling_off.end()
    if migration.capabilities["postcopy-ram"] and connection.stream is None:
        connection.close()
        raise _unanswered()
    find_zeros = migration.parameters["zero-page-detection"] != "none"
    with closing(Outflow(connection, find_zeros=find_zeros)) as flow, closing(claim):
        async with running.child("migrating") as phase:
            gate = Gate()
            log = None if left is not None else run.machine.accelerator.dirty_log(run.machine.memory)
            steering = Steering(
                possible=migration.capabilities["postcopy-ram"], preempts=migration.capabilities["postcopy-preempt"]
            )

            def grants(mint: Mint) -> MigratingGrants:
                return MigratingGrants(
                    cancel_migration=mint(MayCancelMigration, canceller),
                    send_descriptors=None,
                    read_dirty_log=None if log is None else mint(MayReadDirtyLog, log),
                    preview_state=None if log is None else mint(MayPreviewState, run.machine),
                    switch_over=mint(MaySwitchOver, gate),
                    steer_postcopy=mint(MaySteerPostcopy, steering),
                )

            running.tree.move(turn)
            progress = migration.begin("source")
            async with phase.window(grants, withholds=WITHHELD) as window:
                ram = RamSender(run.machine.memory, window.grants.read_dirty_log)
                progress.follow_ram(ram.statistics)
                throttle = Throttle(run.gang.vcpus)
                progress.throttle = throttle
                watch = Watch(progress, migration, throttle, len(run.gang.vcpus))
                precopy = Precopy(ram, migration.parameters.values, watch)
                steering.watch = watch
                waits = gate if migration.capabilities["pause-before-switchover"] else None
                copy = _Copy(flow, progress, canceller, claim, left, precopy, waits, steering, migration)
                try:
                    with canceller.scope:
                        progress.advance(MigrationStatus.ACTIVE)
                        await _announce(run, flow, steering, Terms() if further is None else further.terms())
                        if further is not None:
                            dial = partial(plan.open, running.residents, tls=tls)
                            progress.follow_ram(await further.open(dial, flow, ram))
                        if steering.preempts:
                            dial = partial(plan.open, running.residents, tls=tls)
                            (steering.urgent,) = await open_channels(dial, "preempt", 1, steering.identity.hex())
                        run.machine.prepare_to_move()
                        if ram.is_live and migration.parameters["mode"] == "normal":
                            may_preview = window.grants.preview_state
                            assert may_preview is not None, "RAM that is live has a dirty log"
                            async with throttle.serving():
                                await flow.precopy(precopy, None if waits is not None else may_preview.save_ahead)
                        if (cell := flow.take_descriptor()) is not None:
                            claim.share(cell)
                        pause = await _copy(phase, run, copy)
                        if steering.server is not None:
                            from vmm.phases.postcopy_source import OutgoingPostcopy, run_postcopy_source

                            rest = OutgoingPostcopy(
                                steering.server, flow.connection, steering.urgent, steering.identity, progress,
                                lambda again: again.open(running.residents, tls=_tls(run, again)),
                            )  # fmt: skip
                            await run_postcopy_source(phase, rest)
                except* VmmError as group:
                    failure = next(error for error in leaves(group) if isinstance(error, VmmError))
                finally:
                    ram.stop()
                    steering.close()
    # The outcome is told once the phase is over: whoever hears of it can go on at once.
    if pause is not None:
        return Gone(pause, progress, run.machine.memory, whole=steering.server is None)
    if failure is not None:
        migration.failed(progress, str(failure))
    elif canceller.scope.cancelled_caught:
        progress.advance(MigrationStatus.CANCELLING)
        progress.advance(MigrationStatus.CANCELLED)
    return None


async def _copy(migrating: Phase, run: Run, copy: _Copy) -> Pause:
    """Stop the guest, send it, and let it go. On every other way out it is as it was before. Raises `VmmError`."""
    machine = run.machine
    host = machine.made.host
    progress = copy.progress
    # Nobody else starts, stops or resets the guest from here on. Who was at it has finished.
    async with run.control:
        ran = False
        urgency = Urgency()

        def at_leisure() -> None:
            urgency.close()
            host.events.release()

        try:
            async with migrating.child("quiesced") as phase:
                host.stores.declare_ports(machine.state)
                if copy.flow.noticed:
                    # The destination has made ready, and so does this side.
                    machine.rehearse_save()
                    urgency.begin()
                    # Whoever is told of it is told once this side has nothing to do but to wait.
                    host.events.hold()
                progress.pause_begins()
                ran = run.gang.running
                # Shielded: half a stop cannot be undone. Bounded by a kick's way, and by one non-blocking write.
                with trio.CancelScope(shield=True):
                    await run.gang.halt()
                    await machine.rest()
                # A vCPU may have failed in the moment of the stop: then the guest runs on nowhere.
                ran = ran and run.status.running
                pause = Pause(ran, run.status.name, run.status.failure, machine.bells.pending())
                if ran:
                    run.status.stands("finish-migrate")
                if copy.gate is not None:
                    progress.advance(MigrationStatus.PRE_SWITCHOVER)
                    await copy.flow.while_there(copy.gate.wait)
                guest = StandingGuest(machine.state, machine.memory)

                def grants(mint: Mint) -> QuiescedGrants:
                    return QuiescedGrants(save_state=mint(MaySaveState, guest))

                async with phase.window(grants, withholds=QUIESCED_WITHHELD) as window:
                    if copy.steering.wanted:
                        at_leisure()
                        await _hand_on(run, copy, window.grants.save_state, pause)
                        return pause
                    await _give(run, copy, window.grants.save_state, pause, at_leisure)
        finally:
            at_leisure()
            progress.pause_ends()
            if not copy.claim.keep():
                run.here = False
            with trio.CancelScope(shield=True):
                await run.gang.stop()  # whose tasks may not have ended yet
            if run.here:
                _take_back_ram(run)
                machine.wake()
                if ran:
                    run.start_nowait()
            else:
                run.status.stands("postmigrate")
    return pause


def _left_in_place(run: Run, plan: CopyPlan) -> tuple[str, bytes] | None:
    """Return where RAM stays, with a new identity. Raises `MigrationRefused` where it cannot, and was to."""
    machine = run.machine
    if not machine.made.migration.capabilities["x-ignore-shared"] or not machine.memory.can_stay:
        return None
    if not isinstance(plan.address, FileAddress):
        raise MigrationRefused(
            reason="migrate: with x-ignore-shared the guest's RAM stays in its file, which this process has locked as "
            "long as it is there: save the guest in a file:, hand it over by cpr-transfer, or turn x-ignore-shared off"
        )
    return str(machine.made.definition.options.memory_backend), os.urandom(IDENTITY_SIZE)


def _tls(run: Run, plan: CopyPlan) -> Tls | None:
    parameters = run.machine.made.migration.parameters.values
    if not parameters["tls-creds"]:
        return None
    from vmm.phases.tls_objects import of_source  # OpenSSL, which most migrations do without.

    return of_source(run.machine.made.host.stores, parameters, plan.address)


def _require_postcopy_possible(migration: MigrationState, plan: CopyPlan) -> None:
    """Raise `MigrationRefused` if a guest that goes to where `plan` says cannot ask for pages, and is to."""
    if migration.capabilities["postcopy-ram"] and isinstance(plan.address, FileAddress):
        raise _unanswered()
    dialled = isinstance(plan.address, InetAddress | UnixAddress | VsockAddress)
    if migration.capabilities["postcopy-preempt"] and not dialled:
        raise MigrationRefused(
            reason="migrate: postcopy-preempt needs an address that can be connected to twice: tcp:, unix: or vsock:; "
            "turn it off for any other"
        )


def _unanswered() -> MigrationRefused:
    return MigrationRefused(
        reason="migrate: postcopy-ram needs a destination that can ask for pages: give it a socket, or a command with "
        "return-path on; or turn it off"
    )


def _take_back_ram(run: Run) -> None:
    try:
        run.machine.memory.begin_use()
    except VmmError as error:
        # Worse than nothing is a guest that stands for it: what was saved is not complete, and cannot be loaded.
        run.machine.made.host.complain(f"{error}; what was saved of the guest must not be used")


async def _hand_on(run: Run, copy: _Copy, may: MaySaveState, pause: Pause) -> None:
    """Send all but the pages that are left, and those too that are asked for, until the guest is the destination's."""
    from vmm.migration.page_server import PageServer  # Few guests go so.

    progress, ram, parameters = copy.progress, copy.precopy.ram, copy.migration.parameters
    progress.advance(MigrationStatus.POSTCOPY_DEVICE)
    sections = [Section(Pause.KIND, Pause.VERSION, pause.to_json()), *may.save()]
    await copy.flow.hand_on(sections, ram)
    server = PageServer(may.ram(), ram.todo, lambda: int(parameters.values["max-postcopy-bandwidth"]))
    progress.follow_ram(lambda: server.statistics(ram.statistics()))
    patience = trio.CancelScope()

    def let_go() -> None:
        # A cancellation before this stops the thread that asks, also in this very moment; one after it has no effect.
        if patience.cancel_called or copy.canceller.scope.cancel_called:
            raise Stopped
        patience.deadline = math.inf
        copy.canceller.let_go = True
        run.here = False
        copy.steering.server = server

    late = False
    try:
        with patience:
            patience.deadline = trio.current_time() + _ANSWERING
            await copy.flow.serve_until_loaded(server, copy.steering.urgent, let_go)
        late = patience.cancelled_caught
    except VmmError:
        if run.here:
            raise
        # It may have heard that the guest is its own. Whoever goes on with this learns it.
    if late and run.here:
        what = f"did not load the state within {_ANSWERING:g} s"
        raise MigrationPeerGone(peer="destination", what=what, outcome="the guest goes on in the source")


async def _announce(run: Run, flow: Outflow, steering: Steering, terms: Terms) -> None:
    from vmm.phases.catalog import rank  # Which imports the commands, which import this module.

    host = run.machine.made.host
    made = host.recorder.recipe().ordered(rank)
    recipe, home = travelling(made).to_json(), staying(made).to_json()
    terms = attrs.evolve(
        terms,
        acknowledge=run.machine.made.migration.capabilities["switchover-ack"],
        postcopy=steering.possible,
        preempt=steering.preempts,
        id=steering.identity.hex() or terms.id,
    )
    await flow.announce(host.start.identity.name or "trio-vmm", recipe, cpu_to_json(run.machine.cpu), terms, home)


async def _give(run: Run, copy: _Copy, may: MaySaveState, pause: Pause, late: Callable[[], None]) -> None:
    """Send the guest, and let it go. Raises `VmmError`: it did not get there, and is this process's."""
    # A cancel that came while the guest was being stopped. Those that come from here on ask the claim.
    await trio.lowlevel.checkpoint_if_cancelled()
    copy.claim.offer()
    try:
        await _send(run, copy, may, pause, late)
    except VmmError:
        if copy.claim.keep():
            raise
        run.machine.made.host.complain(
            "migrate: the destination has taken the guest, and did not say that it runs; cont runs it here again, for "
            "whoever knows that it does not run there"
        )
    by_word = copy.claim.keep()
    if by_word:
        # A cancel that came with the destination's word: the guest has not been let go.
        await trio.lowlevel.checkpoint_if_cancelled()
    # From here on it is the destination's, unless that is known to be gone.
    copy.canceller.let_go = True
    if by_word:
        # Shielded: whether it was told must be known. Not a moment's wait: it has read all before.
        with trio.CancelScope(shield=True):
            await copy.flow.let_go()
    run.here = False


async def _send(run: Run, copy: _Copy, may: MaySaveState, pause: Pause, late: Callable[[], None]) -> None:
    progress = copy.progress

    def saved() -> Iterator[Section]:
        yield from may.save()
        yield Section(Pause.KIND, Pause.VERSION, pause.to_json())

    if copy.left is None:
        await copy.flow.send(saved(), copy.precopy, late)
    else:
        ram = may.ram()
        transferred = await copy.flow.leave(list(saved()), ram, *copy.left)
        progress.ram = MigrationRamStats(transferred=transferred, downtime_bytes=transferred, total=ram.size)
    progress.advance(MigrationStatus.DEVICE)
    run.machine.made.host.events.release()
    if copy.claim.is_shared:
        late()  # Nothing waits for this side any more.
    with trio.move_on_after(_ANSWERING) as patience:
        at = await copy.flow.wait_loaded(late)
        if at is not None:
            progress.pause_ends((time.monotonic_ns() - at) / 1e9)
    if patience.cancelled_caught:
        what = f"did not load the state within {_ANSWERING:g} s"
        raise MigrationPeerGone(peer="destination", what=what, outcome="the guest goes on in the source")
