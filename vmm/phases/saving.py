"""A guest that is saved in a file, its RAM at fixed places there (migration capability mapped-ram).

Either it stands at the end and is whole here, as after any migration that copied it: what it has written meanwhile was
written again, in its place. Or, with background-snapshot, it
stands for a moment only, and goes on while its RAM, as it was in that moment, is written.
"""

from __future__ import annotations

from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Any, Final, final

import attrs
import trio

from vmm.capabilities import MayCancelMigration, MayReadDirtyLog, MaySaveState
from vmm.errors import MigrationRefused, PageFaultsUnavailable, VmmError, leaves
from vmm.kvm.faults import KEPT_FEATURES, KeptPages, require_features
from vmm.kvm.page_map import PageMap
from vmm.migration.address import FileAddress
from vmm.migration.mapped_file import MappedFile
from vmm.migration.status import MigrationStatus
from vmm.migration.stream_records import Section
from vmm.phases.copy_control import Canceller, Claim
from vmm.phases.copy_plan import staying, travelling
from vmm.phases.copying import Gone
from vmm.phases.cpu_differences import cpu_to_json
from vmm.phases.migrating import WITHHELD, MigratingGrants
from vmm.phases.quiesced import WITHHELD as QUIESCED_WITHHELD
from vmm.phases.quiesced import Pause, QuiescedGrants, StandingGuest

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from vmm.capabilities import Mint
    from vmm.decisions import Turn
    from vmm.migration.status import MigrationProgress
    from vmm.nursery_tree import Phase
    from vmm.phases.copy_plan import CopyPlan
    from vmm.phases.running import Run

_LOOK: Final = 0.1
"""Seconds between two looks at how far a snapshot is."""

_MEASURED: Final = 4 << 20
"""Bytes that a pass must have had for its bandwidth to be believed."""

_KEEPING: Final = "keep the guest's RAM as it is while the guest runs"


def require_saving_possible(run: Run, plan: CopyPlan) -> None:
    """Find out whether the guest can be saved as the migration capabilities say.

    Raises:
        VmmError: they do not go with where it is to be copied, or with this host.
    """
    capabilities = run.machine.made.migration.capabilities
    mapped, background = capabilities["mapped-ram"], capabilities["background-snapshot"]
    if background and not mapped:
        raise MigrationRefused(
            reason="migrate: background-snapshot needs a place in a file for each page; turn mapped-ram on too"
        )
    if mapped and not isinstance(plan.address, FileAddress):
        raise MigrationRefused(
            reason="migrate: mapped-ram gives each page a place, which only a file has; give a file:, or turn it off"
        )
    if background and capabilities["x-ignore-shared"] and run.machine.memory.can_stay:
        raise MigrationRefused(
            reason="migrate: with x-ignore-shared the guest's RAM stays in its own file, where a guest that goes on "
            "while it is saved (background-snapshot) changes it; turn one of them off"
        )
    if background:
        require_features(_KEEPING, KEPT_FEATURES)


async def run_saving(running: Phase, run: Run, plan: CopyPlan, turn: Turn[Any]) -> Gone | None:
    """Save the guest as `plan` says. Return what is left here if it stands then; None where it goes on.

    Raises:
        VmmError: only before the phase has opened; later failures are in `query-migrate`.
    """
    machine = run.machine
    migration = machine.made.migration
    background = migration.capabilities["background-snapshot"]
    assert plan.open_file is not None, "given by the command"
    failure: VmmError | None = None
    gone: Gone | None = None
    saved = False
    canceller = Canceller(Claim())
    with closing(MappedFile(plan.open_file())) as file:
        async with running.child("migrating") as phase:
            # Who saves a guest over a reboot wants it to stand.
            passes = run.gang.running and not background and migration.parameters["mode"] == "normal"
            live = machine.accelerator.dirty_log(machine.memory) if passes else None

            def grants(mint: Mint) -> MigratingGrants:
                return MigratingGrants(
                    cancel_migration=mint(MayCancelMigration, canceller),
                    send_descriptors=None,
                    read_dirty_log=None if live is None else mint(MayReadDirtyLog, live),
                )

            running.tree.move(turn)
            progress = migration.begin("source")
            async with phase.window(grants, withholds=WITHHELD) as window:
                try:
                    with canceller.scope:
                        progress.advance(MigrationStatus.ACTIVE)
                        await _begin(run, file)
                        save = _Save(phase, run, file, progress, canceller)
                        if plan.finish is not None:
                            await save.as_it_can_be()
                            with trio.CancelScope(shield=True):  # it is on its disk: what is left is its name
                                await trio.to_thread.run_sync(plan.finish)
                        elif background:
                            await save.while_it_runs()
                        else:
                            pause = await save.to_the_end(window.grants.read_dirty_log)
                            gone = Gone(pause, progress, machine.memory)
                        saved = True
                except* VmmError as group:
                    failure = next(error for error in leaves(group) if isinstance(error, VmmError))
                finally:
                    if live is not None:
                        live.stop()
    # The outcome is told once the phase is over: whoever hears of it can go on at once.
    if saved:
        if gone is None:
            progress.advance(MigrationStatus.COMPLETED)
    elif failure is not None:
        migration.failed(progress, str(failure))
    elif canceller.scope.cancelled_caught:
        progress.advance(MigrationStatus.CANCELLING)
        progress.advance(MigrationStatus.CANCELLED)
    return gone


async def _begin(run: Run, file: MappedFile) -> None:
    from vmm.phases.catalog import rank  # Which imports the commands, which import `copying`.

    machine = run.machine
    host = machine.made.host
    made = host.recorder.recipe().ordered(rank)
    recipe, home = travelling(made).to_json(), staying(made).to_json()
    name, processor = host.start.identity.name or "trio-vmm", cpu_to_json(machine.cpu)
    await trio.to_thread.run_sync(file.begin, name, recipe, processor, home, machine.memory)


@final
@attrs.frozen(eq=False)
class _Save:
    """A guest that is being saved."""

    phase: Phase
    run: Run
    file: MappedFile
    progress: MigrationProgress
    canceller: Canceller

    async def to_the_end(self, log: MayReadDirtyLog | None) -> Pause:
        """Save the guest; it stands at last. Raises `VmmError`: then it is as it was before.

        Args:
            log: to save it while it runs, as far as that goes; None: it stands meanwhile.
        """
        progress, ram = self.progress, self.file.ram
        todo = PageMap(ram.record.pages)
        if log is not None:
            await self._in_passes(log, todo)
        async with self._standing() as (may, pause):
            sections = _sections(may, pause)
            ram.stands()
            if log is not None:
                log.collect(todo)
            else:
                # Not before: devices, or a `cont` that came meanwhile, may have used some for the first time.
                todo.merge(await trio.to_thread.run_sync(self.run.machine.memory.touched))
            await ram.save(todo, self._report)
            self._report()
            progress.advance(MigrationStatus.DEVICE)
            await trio.to_thread.run_sync(self.file.finish, sections)
            # What comes while it goes to its disk, which may take long, still calls it off.
            await trio.lowlevel.checkpoint_if_cancelled()
            self.canceller.let_go = True
            self.run.here = False
        return pause

    async def _in_passes(self, log: MayReadDirtyLog, todo: PageMap) -> None:
        """Save the guest while it runs, until what it has written since goes within the downtime limit: `todo`."""
        ram, migration = self.file.ram, self.run.machine.made.migration
        settings = migration.parameters  # which may change meanwhile
        await trio.to_thread.run_sync(log.start)
        rate = 1.0
        while True:
            migration.tell_pass(ram.passes + 1)
            begun, before = trio.current_time(), ram.bytes
            await trio.to_thread.run_sync(log.protect, 0, todo.pages)
            if not ram.passes:
                # Not before: what is used for the first time just before it is protected the log may forget.
                todo.merge(await trio.to_thread.run_sync(self.run.machine.memory.touched))
            await ram.save(todo, self._report, lambda: int(settings.values["max-bandwidth"]))
            seconds = max(trio.current_time() - begun, 1e-6)
            todo.clear()
            await trio.to_thread.run_sync(log.collect, todo)
            ram.dirty_rate = round(len(todo) / seconds)
            if ram.passes == 1 or ram.bytes - before >= _MEASURED:
                rate = max((ram.bytes - before) / seconds, 1.0)
            self.progress.expected_downtime = round(len(todo) * 4096 / rate * 1000)
            if self.progress.expected_downtime <= int(settings.values["downtime-limit"]):
                return

    async def as_it_can_be(self) -> None:
        """Save the guest while it runs, and else while it stands. Raises `VmmError`."""
        try:
            await self.while_it_runs()
        except PageFaultsUnavailable as error:
            self.run.machine.made.host.complain(f"{error}; it stands while it is saved")
            await self.while_it_stands()

    async def while_it_stands(self) -> None:
        """Stop the guest for as long as its RAM is written, and save it. Raises `VmmError`: it runs all the same."""
        ram = self.file.ram
        todo = PageMap(ram.record.pages)
        async with self._standing() as (may, pause):
            sections = _sections(may, pause)
            ram.stands()
            todo.merge(await trio.to_thread.run_sync(self.run.machine.memory.touched))
            await ram.save(todo, self._report)
        self._report()
        await self._rest(sections)

    async def while_it_runs(self) -> None:
        """Stop the guest for a moment, and save it as it is in that moment. Raises `VmmError`: it runs all the same."""
        machine = self.run.machine
        kept = await trio.to_thread.run_sync(KeptPages, machine.memory, self.file.ram.file)
        with closing(kept):
            async with self._standing() as (may, pause):
                sections = _sections(may, pause)
                await trio.to_thread.run_sync(kept.begin)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, kept)
                failure = await kept.wait_over()
                nursery.cancel_scope.cancel()
            self._look_at(kept)
        if failure is not None:
            raise failure
        await self._rest(sections)

    async def _rest(self, sections: list[Section]) -> None:
        self.progress.advance(MigrationStatus.DEVICE)
        self.canceller.let_go = True
        with trio.CancelScope(shield=True):  # what is left is a few writes, and then it is there
            await trio.to_thread.run_sync(self.file.finish, sections)

    @asynccontextmanager
    async def _standing(self) -> AsyncGenerator[tuple[MaySaveState, Pause], None]:
        """Stop the guest in phase quiesced. Afterwards it goes on, unless it was let go (`Run.here`)."""
        run, progress = self.run, self.progress
        machine, host = run.machine, run.machine.made.host
        # Nobody else starts, stops or resets the guest from here on. Who was at it has finished.
        async with run.control:
            ran = False
            try:
                async with self.phase.child("quiesced") as phase:
                    progress.pause_begins()
                    ran = run.gang.running
                    # Shielded: half a stop cannot be undone. Bounded by a kick's way, and by one non-blocking write.
                    with trio.CancelScope(shield=True):
                        await run.gang.stop()
                        await machine.rest()
                    # A vCPU may have failed in the moment of the stop: then the guest runs on nowhere.
                    ran = ran and run.status.running
                    pause = Pause(ran, run.status.name, run.status.failure, machine.bells.pending())
                    if ran:
                        run.status.stands("save-vm")
                    host.stores.declare_ports(machine.state)
                    guest = StandingGuest(machine.state, machine.memory)

                    def grants(mint: Mint) -> QuiescedGrants:
                        return QuiescedGrants(save_state=mint(MaySaveState, guest))

                    async with phase.window(grants, withholds=QUIESCED_WITHHELD) as window:
                        yield window.grants.save_state, pause
            finally:
                progress.pause_ends()
                if run.here:
                    machine.wake()
                    if ran:
                        run.start_nowait()
                else:
                    run.status.stands("postmigrate")

    def _report(self) -> None:
        self.progress.ram = self.file.ram.statistics()

    async def _watch(self, kept: KeptPages) -> None:
        while True:
            await trio.sleep(_LOOK)
            self._look_at(kept)

    def _look_at(self, kept: KeptPages) -> None:
        report = kept.report()
        self.file.ram.note(report.moved, report.passed - report.moved)
        self._report()


def _sections(may: MaySaveState, pause: Pause) -> list[Section]:
    return [Section(Pause.KIND, Pause.VERSION, pause.to_json()), *may.save()]
