"""Phase ``incoming`` for a guest that is copied: its state and its RAM are loaded into a machine that has not run.

All of the stream is checked before any of its state is put in force. RAM is an exception: it is made zero first,
written as it comes, and made zero again if the stream is refused. RAM that was left in its file is neither: it is as it
was until the state is in force. So is the state of the processors, where the guest stands meanwhile: nobody sees it
before they run, and it is put back if the stream is refused.
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from functools import partial
from typing import TYPE_CHECKING, Final, final

import trio

from vmm.capabilities import (
    MayListen,
    MayLoadState,
    MayRestoreGuest,
    MayRunVcpus,
    MaySetMigrationCap,
    MaySetMigrationParam,
    MayWriteGuestMemory,
)
from vmm.cpr.urgency import Urgency
from vmm.decisions import Turn
from vmm.errors import HostFileRefused, InvalidState, MigrationRefused, VmmError, leaves
from vmm.kvm.page_map import PageMap
from vmm.migration.multifd_intake import MultifdIntake
from vmm.migration.packing import packing
from vmm.migration.status import MigrationStatus
from vmm.phases.building import SavedState
from vmm.phases.incoming import IncomingGrants
from vmm.phases.loading import read_state
from vmm.phases.running import Copied, Run, run_running
from vmm.phases.stream_port import Admission, settled

if TYPE_CHECKING:
    from collections.abc import Awaitable, Collection, Sequence

    from vmm.capabilities import Mint
    from vmm.cpr.cell import OwnershipCell
    from vmm.migration.channel import Channel
    from vmm.migration.connection import Connection
    from vmm.migration.inflow import Inflow
    from vmm.migration.registry import CheckedAhead
    from vmm.migration.stream_records import Section
    from vmm.nursery_tree import Phase
    from vmm.phases.incoming_port import IncomingPort
    from vmm.phases.machine import Machine
    from vmm.phases.migration_state import Wishes
    from vmm.phases.postcopy_target import IncomingPostcopy
    from vmm.phases.quiesced import Pause
    from vmm.phases.stream_receive import StreamWait

_MOMENT: Final = 1.0
"""Seconds for which this process goes before others while it waits for a guest that is about to stand."""


@final
class _Autostart:
    """The facet of `may-run-vcpus` as long as there is no guest, and until its phase opens."""

    def __init__(self, *, on: bool) -> None:
        self.on = on
        self.run: Run | None = None
        """The guest's run control, from when it is taken up. For commands that were under way then."""

    async def cont(self) -> None:
        """Have the guest run once it is here, if it ran where it was."""
        if self.run is not None:
            await self.run.cont()
            return
        self.on = True
        await trio.lowlevel.checkpoint()

    async def stop(self) -> None:
        """Have the guest stand once it is here."""
        if self.run is not None:
            await self.run.stop()
            return
        self.on = False
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        """Refuse: there is no state to reset."""
        if self.run is not None:
            await self.run.reset()
            return
        await trio.lowlevel.checkpoint()
        raise InvalidState(
            what="system_reset", state="while the guest's state is awaited", instead="wait until it is here"
        )


@final
class _Again(Admission):
    """The facet of `may-listen` and `may-restore-guest`: another attempt, after one that failed."""

    def __init__(self, port: IncomingPort) -> None:
        super().__init__(port)
        self.awaited = trio.Event()

    async def listen(self, channels: Sequence[Channel], *, exit_on_error: bool, wishes: Wishes) -> Awaitable[None]:
        """Bind `channels`."""
        if any(channel.channel_type != "main" for channel in channels):
            raise MigrationRefused(reason="migrate-incoming: this machine is complete; a live update brings its own")
        await self._port.listen(channels, exit_on_error=exit_on_error, wishes=wishes)
        self.awaited.set()
        return settled()

    def decide(self, saved: object) -> Awaitable[None]:
        """Load what is in the file; settles once it is in force."""
        turn = Turn[None](None, until="running")
        assert isinstance(saved, SavedState)
        self._port.streams.restore(saved.take(), saved.wishes, tell=turn.fail)
        self._port.streams.tree.move(turn)
        self.awaited.set()
        return turn


@final
class _Landing:
    """What is had while a guest comes in that is about to stand."""

    def __init__(self) -> None:
        self.urgency: Final = Urgency()
        self.ahead: CheckedAhead = {}
        """Sections that were looked at before all had come."""
        self.is_loaded = False
        """Whether one of them is in force."""
        self._untold: Inflow | None = None
        self._cell: OwnershipCell | None = None

    def share(self) -> int | None:
        """Make a cell; return its descriptor, for the source, or None where the host has nothing left for one."""
        from vmm.cpr.cell import OwnershipCell  # Needed on one host alone.

        try:
            self._cell = OwnershipCell.create(ours=False)
        except HostFileRefused:
            return None
        return self._cell.fd

    async def take(self, flow: Inflow) -> None:
        """Take the guest, if its source has got the cell and offers it; else ask for it. Raises as `Inflow.confirm`."""
        if self._cell is not None and self._cell.take():
            self._untold = flow
        else:
            await flow.confirm(self.urgency.close)

    async def finish(self, resumed: int | None) -> None:
        """Do, as the guest runs, what could wait: tell its source, also since when."""
        self.urgency.close()
        if self._untold is not None:
            await self._untold.say_loaded(resumed)

    def close(self) -> None:
        """Put back what was. Idempotent."""
        self.urgency.close()
        if self._cell is not None:
            self._cell.close()


async def run_incoming_stream(devices: Phase, machine: Machine, *, start: bool) -> None:
    """Load the state that comes, and go on to running. After a refusal that does not end the process await another."""
    made = machine.made
    host, port = made.host, made.incoming
    autostart = _Autostart(on=start or host.start.autostart)
    async with devices.child("incoming", machine_phase="machine-ready") as phase:
        again = _Again(port)

        def grants(mint: Mint) -> IncomingGrants:
            return IncomingGrants(
                load_state=mint(MayLoadState, machine.state),
                set_migration_cap=mint(MaySetMigrationCap, made.migration.capabilities),
                set_migration_param=mint(MaySetMigrationParam, made.migration.parameters),
                write_guest_memory=mint(MayWriteGuestMemory, machine.memory),
                run_vcpus=mint(MayRunVcpus, autostart),
                listen=mint(MayListen, again),
                restore_guest=mint(MayRestoreGuest, again),
            )

        async with phase.window(grants) as window:
            host.status.stands("inmigrate")
            # Nothing is read before there is somebody to read it.
            await machine.rest()
            host.stores.declare_ports(machine.state)
            run = Run(machine)
            await phase.residents.start("vcpus", run.gang.serve)
            copied: Copied | None = None
            while copied is None:
                wait = port.streams.wait
                if wait is None:
                    again.awaited = trio.Event()
                    await again.awaited.wait()
                    continue
                with closing(_Landing()) as landing:
                    copied = await _attempt(run, wait, window.grants, landing)
                    if copied is not None:
                        # Here, and not in running: to get there takes longer than all that is left to do.
                        phase.tree.hold_off(until="running")
                        start, autostart.run = autostart.on, run
                        resumed = await copied.take_up(run, start=start)
                        try:
                            await landing.finish(resumed)
                        finally:
                            if copied.rest is None:
                                wait.over.set()
        await run_running(phase, run, start=start, copied=copied)


async def _attempt(run: Run, wait: StreamWait, grants: IncomingGrants, landing: _Landing) -> Copied | None:
    """Load one stream. Return None if it was refused, and nothing of it is left; or raise, if the process ends so."""
    machine = run.machine
    made = machine.made
    port, progress = made.incoming.streams, made.incoming.progress
    await wait.arrived.wait()
    if wait.arrival is None or wait.failure is not None or progress is None:
        return None  # whoever awaited it has said why
    failure: VmmError | None = None
    try:
        pause, rest = await _load(run, wait, grants, landing)
    except* VmmError as group:
        failure = next(error for error in leaves(group) if isinstance(error, VmmError))
    if failure is None:
        port.forget(wait)
        made.incoming.allowed.clear()
        return Copied(pause, progress, rest)
    landing.close()
    port.failed(wait, failure)
    await wait.arrival.flow.refuse(failure)
    if wait.exit_on_error:
        raise failure
    if landing.is_loaded:
        machine.processors.power_on_again()
    assert grants.write_guest_memory is not None, "minted above"
    if machine.memory.stays_for() is None:
        grants.write_guest_memory.clear()
    wait.fail(failure)
    if not wait.is_asked_for:
        made.host.complain(str(failure))
    return None


async def _load(
    run: Run, wait: StreamWait, grants: IncomingGrants, landing: _Landing
) -> tuple[Pause, IncomingPostcopy | None]:
    machine, made, arrival = run.machine, run.machine.made, wait.arrival
    assert arrival is not None
    flow = arrival.flow
    assert grants.write_guest_memory is not None
    assert made.incoming.progress is not None
    made.incoming.streams.require_same(arrival.recipe, arrival.cpu, machine.cpu)
    terms = flow.terms
    packings = [packing(terms.compression) for _ in range(terms.multifd)]
    if terms.multifd or terms.preempt:
        wait.require_listener()
    if terms.postcopy:
        from vmm.kvm.faults import LINK_FEATURES, require_features

        require_features("run the guest before all of its RAM is there", LINK_FEATURES)
    if not flow.from_file:
        # Nothing is done for the first time while the guest stands. One in a file stands anyway.
        await machine.rehearse_load()
    await run.gang.stand_by()
    await flow.invite()
    made.incoming.progress.advance(MigrationStatus.ACTIVE)
    with ExitStack() as stack:
        multifd: MultifdIntake | None = None
        if terms.multifd:
            channels = await wait.more_channels("multifd", terms.multifd)
            multifd = MultifdIntake(machine.memory, channels, store=True, packings=packings)
            stack.enter_context(closing(multifd))
        urgent: Connection | None = None
        if terms.preempt:
            (urgent,) = await wait.more_channels("preempt", 1)
            stack.callback(urgent.close)
        # A file may be of yesterday, or of another boot: what stood in it goes on where it stood.
        machine.processors.let_time_stand(flow.from_file)
        make_ready = None if flow.from_file else partial(_make_ready, machine, flow, grants.load_state, landing)

        def soon(section: Section) -> None:
            # The processors' comes first, and takes the longest: its load goes on while the source sends what is left.
            if section.name in machine.processors.sections and machine.processors.apart_from_ram:
                landing.is_loaded = True
                grants.load_state.load_ahead(section, landing.ahead)

        pause, sections = await read_state(
            flow, machine, grants.write_guest_memory, multifd, make_ready, soon, landing.urgency.close
        )
        if flow.absent is not None:
            rest = await _load_some(machine, flow, urgent, grants, sections, landing.ahead)
            # Nothing of it is closed before all of the guest is here.
            kept = stack.pop_all()
            kept.callback(wait.over.set)
            rest.over = kept.close
            return pause, rest
    grants.load_state.check(sections, landing.ahead).apply()
    # From here on it is this machine's, and no other can go on with the same state.
    machine.memory.begin_use()
    await landing.take(flow)
    return pause, None


async def _make_ready(
    machine: Machine, flow: Inflow, may: MayLoadState, landing: _Landing, sections: Collection[Section]
) -> None:
    """Do now what would take its time while the guest stands, which it is about to; return when it does."""
    machine.rehearse_again()
    landing.ahead = may.check_ahead(sections)
    cell = landing.share() if flow.passes_descriptors else None
    # Before it waits: who is woken as an ordinary process may be left to wait for the very CPU that the source is on.
    landing.urgency.begin()
    await flow.say_prepared(cell)
    with trio.move_on_after(_MOMENT) as moment:
        await flow.wait_more()
    if moment.cancelled_caught:
        landing.urgency.close()
        await flow.wait_more()
        landing.urgency.begin()


async def _load_some(
    machine: Machine,
    flow: Inflow,
    urgent: Connection | None,
    grants: IncomingGrants,
    sections: list[Section],
    ahead: CheckedAhead,
) -> IncomingPostcopy:
    """Put the state of a guest in force whose RAM is not all here, and take it over. Raises `VmmError`."""
    from vmm.kvm.faults import PagesFromLink
    from vmm.phases.postcopy_target import IncomingPostcopy

    memory, absent = machine.memory, flow.absent
    assert absent is not None
    await trio.to_thread.run_sync(memory.forget_all, absent)
    here = PageMap(absent.pages)
    here.set_all()
    for first, count in absent.runs():
        here.discard(first, count)
    rush = None if urgent is None else urgent.fd
    machine.processors.let_time_stand(False)
    pages = PagesFromLink(memory, here, flow.fd, rush, len(machine.vcpus))
    try:
        grants.load_state.check(sections, ahead).apply()
        machine.memory.begin_use()
        pages.say_loaded()
        # If it breaks now, nobody knows whose the guest is, before there is another connection.
        ours = await pages.wait_ours() is None
    except BaseException:
        pages.close()
        raise
    return IncomingPostcopy(pages, bytes.fromhex(flow.terms.id), ours, flow.fd)
