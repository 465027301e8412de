"""Phase ``incoming``: a predecessor's state is loaded. All is built; nothing is written to the guest's RAM."""

from __future__ import annotations

import time
from contextlib import closing, suppress
from typing import TYPE_CHECKING, final

import attrs

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
from vmm.errors import DescriptorsUnclaimed, StreamCorrupt, VmmError
from vmm.phases.live_state import receive_state
from vmm.phases.luggage import is_luggage
from vmm.phases.quiesced import Pause
from vmm.phases.running import Run, run_running

if TYPE_CHECKING:
    from vmm.capabilities import Mint
    from vmm.nursery_tree import Phase
    from vmm.phases.fd_receive import Arrival
    from vmm.phases.machine import Machine


@final
@attrs.frozen
class IncomingGrants:
    """Tokens of this phase."""

    load_state: MayLoadState
    set_migration_cap: MaySetMigrationCap
    set_migration_param: MaySetMigrationParam
    write_guest_memory: MayWriteGuestMemory | None = None
    """Where the guest is copied: its RAM here is this process's own. So are the next ones there alone."""
    run_vcpus: MayRunVcpus | None = None
    """Says whether the guest shall run once it is here."""
    listen: MayListen | None = None
    restore_guest: MayRestoreGuest | None = None
    """For another attempt after one that failed and did not end this process."""


@final
@attrs.frozen(eq=False)
class Loaded:
    """A machine with a predecessor's state, which still owns it."""

    arrival: Arrival
    pause: Pause
    urgency: Urgency
    """Ends once the guest runs."""


async def run_incoming(devices: Phase, machine: Machine, arrival: Arrival) -> None:
    """Say that all is built, load the state that comes, and go on to running, where the guest is taken."""
    made = machine.made
    host = made.host
    progress = made.incoming.progress
    assert progress is not None
    async with devices.child("incoming", machine_phase="machine-ready") as phase:

        def grants(mint: Mint) -> IncomingGrants:
            return IncomingGrants(
                load_state=mint(MayLoadState, machine.state),
                set_migration_cap=mint(MaySetMigrationCap, made.migration.capabilities),
                set_migration_param=mint(MaySetMigrationParam, made.migration.parameters),
            )

        with closing(Urgency()) as urgency:
            async with phase.window(grants) as window:
                host.status.stands("inmigrate")
                failure: VmmError | None = None
                try:
                    with host.calling_off.block():
                        run = Run(machine, here=False)
                        await phase.residents.start("vcpus", run.gang.serve)
                        pause = await _load(run, arrival, urgency, window.grants.load_state)
                except* (VmmError, OSError, MemoryError) as group:
                    failure = arrival.channel.blame(group)
                if failure is not None:
                    made.migration.ended(progress, failure)
                    with suppress(DescriptorsUnclaimed):
                        host.stores.require_all_adopted()
                    await arrival.refuse(failure)
                    raise failure
            await run_running(phase, run, start=False, loaded=Loaded(arrival, pause, urgency))


async def _load(run: Run, arrival: Arrival, urgency: Urgency, may: MayLoadState) -> Pause:
    """Say that all is built, and load what comes. Return how the guest was when it was paused. Raises `VmmError`s."""
    machine, made = run.machine, run.machine.made
    host, channel, steps = made.host, arrival.channel, arrival.steps
    progress = made.incoming.progress
    assert progress is not None
    assert made.incoming.main is not None
    host.stores.luggage.add(arrival.inheritance.claim_all(is_luggage))
    arrival.inheritance.require_empty()
    await machine.rehearse_load()
    await run.gang.stand_by()
    host.stores.expect_fdsets(arrival.fdsets)
    steps.reach("built")
    # The guest may be paused from the next message on.
    urgency.begin()
    await channel.send("ready", {})
    channel.step = "loading"
    channel.hurry()
    message, stream = await receive_state(channel, steps, made.incoming.main, progress)
    moments = {"received-ns": time.monotonic_ns()}
    with closing(message):
        pause = Pause.from_json(message.body)
        gone = message.body.get("gone")
        if not isinstance(gone, list) or not all(isinstance(name, str) for name in gone):
            raise StreamCorrupt(reason="the message that the guest is paused lacks gone")
        inherit_settings = made.migration.inherit(message.body.get("settings"))
        host.stores.adopt_changes(arrival.inheritance.used(message.descriptors), gone)
        checked = may.check(stream.sections)
    steps.reach("state-received")
    checked.apply()
    host.stores.settle_fdsets()
    inherit_settings()
    host.stores.require_all_adopted()
    moments["loaded-ns"] = time.monotonic_ns()
    # At once: the source works on while this side leaves one phase and opens the next.
    await channel.send("loaded", moments)
    return pause
