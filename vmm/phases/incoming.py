"""Phase ``incoming``: a predecessor's state is loaded. All is built; nothing is written to the guest's RAM."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, final

import attrs
import trio

from vmm.capabilities import MayLoadState, MaySetMigrationCap, MaySetMigrationParam
from vmm.errors import StreamCorrupt, VmmError
from vmm.migration.status import MigrationStatus
from vmm.migration.stream_io import receive_stream
from vmm.phases.run_state import RunStateName, run_state_named
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


@final
@attrs.frozen(eq=False)
class Loaded:
    """A machine with a predecessor's state, which still owns it."""

    arrival: Arrival
    runs: bool
    """Whether the guest ran when it was paused."""
    run_state: RunStateName


async def run_incoming(devices: Phase, machine: Machine, arrival: Arrival) -> None:
    """Say that all is built, load the state that comes, and go on to running, where the guest is taken."""
    made = machine.made
    host, channel, steps = made.host, arrival.channel, arrival.steps
    progress = made.incoming.progress
    assert progress is not None
    assert made.incoming.main is not None
    async with devices.child("incoming", machine_phase="machine-ready") as phase:

        def grants(mint: Mint) -> IncomingGrants:
            return IncomingGrants(
                load_state=mint(MayLoadState, machine.state),
                set_migration_cap=mint(MaySetMigrationCap, made.migration.capabilities),
                set_migration_param=mint(MaySetMigrationParam, made.migration.parameters),
            )

        async with phase.window(grants) as window:
            host.status.stands("inmigrate")
            try:
                arrival.inheritance.require_empty()
                machine.rehearse_load()
                run = Run(machine)
                await run.gang.warm()
                steps.reach("built")
                await channel.send("ready", {})
                channel.step = "loading"
                main = trio.SocketStream(await made.incoming.main.accept())
                async with main:
                    progress.advance(MigrationStatus.ACTIVE)
                    message = await channel.receive("paused")
                    stream = await receive_stream(main)
                moments = {"received-ns": time.monotonic_ns()}
                checked = window.grants.load_state.check(stream.sections)
                gone = message.body.get("gone")
                run_state = run_state_named(message.body.get("run-state"))
                if not isinstance(gone, list) or run_state is None:
                    raise StreamCorrupt(reason="the message that the guest is paused lacks gone or run-state")
                host.stores.adopt_changes(message.descriptors, gone)
                message.descriptors = {}
                steps.reach("state-received")
                checked.apply()
                host.stores.require_all_adopted()
                moments["loaded-ns"] = time.monotonic_ns()
                # At once: the source works on while this side leaves one phase and opens the next.
                await channel.send("loaded", moments)
            except VmmError as error:
                made.migration.failed(progress, str(error))
                await channel.refuse(str(error))
                raise
        loaded = Loaded(arrival, bool(message.body.get("running")), run_state)
        await run_running(phase, run, start=False, loaded=loaded)
