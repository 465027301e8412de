"""A migration that copies the guest: its RAM while it runs, what is left of it and its state while it stands.

The phases are those of a live update, `migrating` and `quiesced`, without the change of owner: what goes is a copy, and
the two sides agree by words which of the two runs (`vmm.migration.words`).
"""

from __future__ import annotations

import math
import os
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any, Final, final

import attrs
import trio

from vmm.capabilities import MayCancelMigration, MayReadDirtyLog, MaySaveState, MaySteerPostcopy, MaySwitchOver
from vmm.cpr.urgency import Urgency
from vmm.errors import InvalidState, MigrationPeerGone, MigrationRefused, VmmError, leaves
from vmm.migration.address import ExecAddress, FileAddress, InetAddress, UnixAddress, VsockAddress
from vmm.migration.connect import close_descriptors, connect_channel
from vmm.migration.connection import Connection
from vmm.migration.convergence import Convergence
from vmm.migration.further import open_channels
from vmm.migration.outflow import Outflow
from vmm.migration.precopy import Precopy
from vmm.migration.pump import Stopped
from vmm.migration.ram import RamSender
from vmm.migration.ram_file_records import IDENTITY_SIZE
from vmm.migration.status import MigrationRamStats, MigrationStatus
from vmm.migration.stream_records import Section
from vmm.migration.terms import Terms
from vmm.phases.cpu_differences import cpu_to_json
from vmm.phases.further_channels import plan_channels
from vmm.phases.migrating import WITHHELD, MigratingGrants
from vmm.phases.migration_state import NO_WISHES, Wishes
from vmm.phases.quiesced import WITHHELD as QUIESCED_WITHHELD
from vmm.phases.quiesced import Pause, QuiescedGrants, StandingGuest
from vmm.phases.throttle import Throttle

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vmm.capabilities import Mint
    from vmm.decisions import Turn
    from vmm.kvm.memory import GuestMemory
    from vmm.migration.address import ChannelAddress
    from vmm.migration.page_server import PageServer
    from vmm.migration.status import MigrationProgress
    from vmm.nursery_tree import Phase
    from vmm.phases.migration_state import MigrationState
    from vmm.phases.running import Run
    from vmm.phases.tls_objects import Tls
    from vmm.recipe import Recipe
    from vmm.residents import Residents

_CONNECTING: Final = 10.0
"""Seconds for the channel to be connected."""

_ANSWERING: Final = 60.0
"""Seconds for a destination that has been sent everything to say that it is in force."""


@final
@attrs.define(eq=False)
class CopyPlan:
    """Where a guest is copied to. Owns the descriptor among its address."""

    address: ChannelAddress
    open_file: Callable[[], int] | None = None
    """Of a `FileAddress`: opens the file, which changes it. A migration that is refused before has not touched it."""
    start_command: Callable[[bool], Connection] | None = None
    """Of an `ExecAddress`: starts the command, which can answer if the argument says so."""
    wishes: Wishes = NO_WISHES
    finish: Callable[[], None] | None = None
    """Of a snapshot, after which the guest goes on here: gives the file its name, once all is in it. For a thread."""
    resume: bool = False
    """Whether it is to go on with a postcopy whose connection broke."""
    _closed: bool = False

    async def open(self, residents: Residents, *, two_way: bool = False, tls: Tls | None) -> Connection:
        """Connect. Again and again, if somebody listens there.

        Args:
            residents: of whom whoever serves the connection is one.
            two_way: whether a command can answer.
            tls: what the channel is made secure with.

        Raises:
            HostFileRefused: nobody listens there, the file cannot be written, or the command cannot be started.
            TlsFailed: there is no TLS with who listens there.
        """
        connection = await self._connect(two_way=two_way, tls=tls)
        return connection.serve(residents)

    async def _connect(self, *, two_way: bool, tls: Tls | None) -> Connection:
        if isinstance(self.address, FileAddress):
            assert self.open_file is not None, "given by the command"
            return Connection(self.open_file())
        if isinstance(self.address, ExecAddress):
            assert self.start_command is not None, "likewise"
            return self.start_command(two_way)
        connection = await connect_channel(self.address, within=_CONNECTING)
        if tls is None:
            return connection
        return await tls.secure(connection, "destination", within=_CONNECTING)

    def close(self) -> None:
        """Close the descriptor; what was connected stays. Idempotent."""
        if not self._closed:
            self._closed = True
            close_descriptors([self.address])


@final
class Canceller:
    """The facet of `may-cancel-migration`."""

    def __init__(self) -> None:
        self.scope: Final = trio.CancelScope()
        self.let_go = False
        """Whether the guest is the destination's: nothing can be called off any more."""

    def cancel(self, by: str) -> None:
        """Call the migration off, unless the guest has been let go."""
        if not self.let_go:
            self.scope.cancel()


@final
class _Gate:
    """The facet of `may-switch-over`: where a migration waits with the guest stopped and its state not yet read."""

    def __init__(self) -> None:
        self._opened: trio.Event | None = None

    async def wait(self) -> None:
        """Wait until somebody lets it go on."""
        self._opened = trio.Event()
        await self._opened.wait()
        self._opened = None

    def go_on(self) -> None:
        """Let it go on. Raises `InvalidState` where it does not wait."""
        if self._opened is None:
            raise InvalidState(
                what="migrate-continue",
                state="while the migration does not wait",
                instead="wait until query-migrate says pre-switchover, which it does with pause-before-switchover on",
            )
        self._opened.set()


@final
class _Steering:
    """The facet of `may-steer-postcopy` before the guest has gone."""

    def __init__(self, *, possible: bool, preempts: bool) -> None:
        self.possible: Final = possible
        self.preempts: Final = preempts
        """Whether pages that are asked for go over a channel of their own."""
        self.urgent: Connection | None = None
        """That channel."""
        self.wanted = False
        """Whether the guest is to run at the destination as soon as may be."""
        self.watch: Watch | None = None
        self.identity: Final = os.urandom(16) if possible else b""
        """Names the migration."""
        self.server: PageServer | None = None
        """Who has the pages that have not gone, once the guest has."""

    def close(self) -> None:
        """Close the further channel, if there is one."""
        if self.urgent is not None:
            self.urgent.close()

    def start(self) -> None:
        """End the passes."""
        if not self.possible:
            raise MigrationRefused(
                reason="migrate-start-postcopy: the migration has begun without postcopy-ram, which comes before"
            )
        self.wanted = True
        if self.watch is not None:
            self.watch.hurries = True

    def pause(self) -> None:
        """Refuse."""
        raise MigrationRefused(reason="migrate-pause: no postcopy is under way; migrate_cancel ends the migration")

    async def recover(self, address: object) -> None:
        """Refuse."""
        await trio.lowlevel.checkpoint()
        raise MigrationRefused(reason="migrate-recover: no postcopy is under way, and it is for the destination of one")


@final
class Watch:
    """Hears from the thread that sends how it goes, and tells whoever asks."""

    def __init__(self, progress: MigrationProgress, migration: MigrationState, throttle: Throttle, vcpus: int) -> None:
        self._progress: Final = progress
        modes = [mode for mode in ("auto-converge", "dirty-limit") if migration.capabilities[mode]]
        self._convergence: Final = Convergence(
            modes[0] if modes else None, migration.parameters.values, vcpus, throttle.set
        )
        self._migration: Final = migration
        self._loop: Final = trio.lowlevel.current_trio_token()
        self.hurries = False
        """Whether the passes are to end now."""
        progress.expected_downtime = int(migration.parameters.values["downtime-limit"])

    def passed(self, number: int) -> None:
        """Tell that pass `number` begins."""
        self._loop.run_sync_soon(self._migration.tell_pass, number)

    def expects(self, downtime: float) -> None:
        """Note the pause that is expected, in ms."""
        self._progress.expected_downtime = round(downtime)

    def after_pass(self, sent: int, dirtied: int, seconds: float) -> None:
        """Note that another pass is needed: slow the guest down, where that is wanted."""
        self._convergence.after_pass(sent, dirtied, seconds)


@final
@attrs.frozen(eq=False)
class _Copy:
    """A migration under way."""

    flow: Outflow
    progress: MigrationProgress
    canceller: Canceller
    left: tuple[str, bytes] | None
    """Where RAM stays, and what marks it; None where it is copied."""
    precopy: Precopy
    gate: _Gate | None
    """Where it waits before the switchover; None where it does not."""
    steering: _Steering
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


def travelling(recipe: Recipe) -> Recipe:
    """Return what of a machine's recipe is the machine's: no monitors, qtest, or their chardevs, nor its snapshots."""
    monitors = [step for step in recipe if step.execute == "object-add" and _stays(step.arguments)]
    chardevs = {step.arguments.get("chardev") for step in monitors} - {None}
    return attrs.evolve(
        recipe,
        steps=tuple(
            step
            for step in recipe
            if step not in monitors and not (step.execute == "chardev-add" and step.arguments.get("id") in chardevs)
        ),
    )


def staying(recipe: Recipe) -> Recipe:
    """Return the rest."""
    goes = travelling(recipe).steps
    return attrs.evolve(recipe, steps=tuple(step for step in recipe if step not in goes))


def _stays(arguments: Mapping[str, Any]) -> bool:
    kind = str(arguments.get("qom-type"))
    return kind.startswith("monitor-") or kind in ("qtest", "snapshot-directory")


async def run_copying(running: Phase, run: Run, plan: CopyPlan, turn: Turn[Any]) -> Gone | None:
    """Copy the guest to where `plan` says. Return what is left if it has gone; if not, None: it goes on here.

    Raises:
        VmmError: only before the phase has opened; later failures are in `query-migrate`.
    """
    migration = run.machine.made.migration
    pause: Pause | None = None
    failure: VmmError | None = None
    canceller = Canceller()
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
    with closing(Outflow(connection, find_zeros=find_zeros)) as flow:
        async with running.child("migrating") as phase:
            gate = _Gate()
            log = None if left is not None else run.machine.accelerator.dirty_log(run.machine.memory)
            steering = _Steering(
                possible=migration.capabilities["postcopy-ram"], preempts=migration.capabilities["postcopy-preempt"]
            )

            def grants(mint: Mint) -> MigratingGrants:
                return MigratingGrants(
                    cancel_migration=mint(MayCancelMigration, canceller),
                    send_descriptors=None,
                    read_dirty_log=None if log is None else mint(MayReadDirtyLog, log),
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
                copy = _Copy(flow, progress, canceller, left, precopy, waits, steering, migration)
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
                            async with throttle.serving():
                                await flow.precopy(precopy, lingers=waits is not None)
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
        try:
            async with migrating.child("quiesced") as phase:
                host.stores.declare_ports(machine.state)
                if copy.precopy.noticed:
                    # The destination has made ready, and so does this side.
                    machine.rehearse_save()
                    urgency.begin()
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
                        urgency.close()
                        await _hand_on(run, copy, window.grants.save_state, pause)
                        return pause
                    await _send(run, copy, window.grants.save_state, pause, urgency.close)
                    # From here on it is the destination's, unless that is known to be gone.
                    copy.canceller.let_go = True
                    # Shielded: whether it was told must be known. Not a moment's wait: it has read all before.
                    with trio.CancelScope(shield=True):
                        await copy.flow.let_go()
                    run.here = False
        finally:
            urgency.close()
            progress.pause_ends()
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
    sections = [Section(Pause.KIND, Pause.VERSION, pause.to_json()), *may.save().values()]
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


async def _announce(run: Run, flow: Outflow, steering: _Steering, terms: Terms) -> None:
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


async def _send(run: Run, copy: _Copy, may: MaySaveState, pause: Pause, late: Callable[[], None]) -> None:
    progress = copy.progress

    def save() -> list[Section]:
        return [*may.save().values(), Section(Pause.KIND, Pause.VERSION, pause.to_json())]

    if copy.left is None:
        await copy.flow.send(save, copy.precopy, late)
    else:
        ram = may.ram()
        transferred = await copy.flow.leave(save(), ram, *copy.left)
        progress.ram = MigrationRamStats(transferred=transferred, downtime_bytes=transferred, total=ram.size)
    progress.advance(MigrationStatus.DEVICE)
    with trio.move_on_after(_ANSWERING) as patience:
        await copy.flow.wait_loaded(late)
    if patience.cancelled_caught:
        what = f"did not load the state within {_ANSWERING:g} s"
        raise MigrationPeerGone(peer="destination", what=what, outcome="the guest goes on in the source")
