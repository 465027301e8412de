"""Phase ``restoring``: `loadvm` puts a saved state in place of a running guest's own. An exclusive child of running.

The file is read twice. At first nothing changes: all of it is checked, and compared with the machine. Only then is the
guest stopped, and its state and RAM replaced.
"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Final, final

import attrs
import trio

from vmm.capabilities import (
    MayCreateBackend,
    MayInject,
    MayLoadState,
    MayOpenHostFile,
    MayPlugDevice,
    MayRestoreGuest,
    MayRunVcpus,
    MaySetMigrationCap,
    MayStartMigration,
    MayWriteGuestMemory,
)
from vmm.errors import VmmError, leaves
from vmm.migration.connection import Connection
from vmm.migration.inflow import Inflow
from vmm.migration.status import MigrationStatus
from vmm.phases.arriving import checked
from vmm.phases.loading import read_state
from vmm.phases.run_state import NEEDS_RESET
from vmm.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.capabilities import Mint
    from vmm.nursery_tree import Phase
    from vmm.phases.building import SavedState
    from vmm.phases.quiesced import Pause
    from vmm.phases.running import Run

WITHHELD: Final = (
    MayPlugDevice, MayCreateBackend, MayOpenHostFile, MaySetMigrationCap, MayStartMigration, MayRunVcpus, MayInject,
    MayRestoreGuest,
)  # fmt: skip


@final
@attrs.frozen
class RestoringGrants:
    """Tokens of this phase."""

    load_state: MayLoadState
    write_guest_memory: MayWriteGuestMemory


async def run_restoring(running: Phase, run: Run, saved: SavedState, begun: Callable[[], None]) -> None:
    """Load what is in the file, and run the guest again if it ran.

    Args:
        begun: called once the file is this phase's, and whatever comes is in `query-migrate`.

    Raises:
        VmmError: the file is none that this machine can go on from, and the guest goes on as it was. Or it was so, and
            could not be read a second time: then the guest is gone, and stands until a reset.
    """
    machine = run.machine
    made = machine.made
    async with running.child("restoring") as phase:

        def grants(mint: Mint) -> RestoringGrants:
            return RestoringGrants(
                load_state=mint(MayLoadState, machine.state),
                write_guest_memory=mint(MayWriteGuestMemory, machine.memory),
            )

        progress = made.migration.begin("target")
        failure: VmmError | None = None
        async with phase.window(grants, withholds=WITHHELD) as window:
            try:
                with closing(Inflow(Connection(saved.take()))) as flow:
                    begun()
                    record, processor = await flow.read_head()
                    recipe = Recipe.from_json("of the file", [dict(command) for command in record.commands])
                    made.incoming.streams.require_same(checked(recipe, made.host.table), processor.state, machine.cpu)
                    progress.advance(MigrationStatus.ACTIVE)
                    made.host.stores.declare_ports(machine.state)
                    _, sections = await read_state(flow, machine, None)
                    window.grants.load_state.check(sections)
                    flow.rewind()
                    async with run.control:
                        await _replace(run, flow, window.grants)
            except* VmmError as group:
                failure = next(error for error in leaves(group) if isinstance(error, VmmError))
    # The outcome is told once the phase is over: whoever hears of it can go on at once.
    if failure is not None:
        made.migration.failed(progress, str(failure))
        raise failure
    progress.advance(MigrationStatus.COMPLETED)


async def _replace(run: Run, flow: Inflow, grants: RestoringGrants) -> None:
    """Stop the guest, and put the state in its place. Called with `control` held."""
    machine, status = run.machine, run.status
    ran = run.gang.running
    # Shielded: half a stop cannot be undone. Bounded by a kick's way, and by one non-blocking write.
    with trio.CancelScope(shield=True):
        await run.gang.stop()
        await machine.rest()
    status.stands("restore-vm")
    lost = "its state was being replaced, and is neither the old nor the new one"
    pause: Pause | None = None
    try:
        await flow.read_head()
        pause, sections = await read_state(flow, machine, grants.write_guest_memory)
        machine.processors.let_time_stand(True)
        grants.load_state.check(sections).apply()
    except VmmError as error:
        lost = str(error)
        pause = None
        raise
    finally:
        machine.wake()
        if pause is None:
            status.stands("internal-error", failure=lost)
        elif pause.run_state in NEEDS_RESET:
            status.stands(pause.run_state, failure=pause.failure)
        else:
            _go_on(run, pause, ran=ran)


def _go_on(run: Run, pause: Pause, *, ran: bool) -> None:
    bells = run.machine.bells
    bells.forget()
    bells.take_over(pause.wishes)
    if ran:
        run.start_nowait()
    else:
        run.status.stands("paused")
