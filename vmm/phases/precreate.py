"""Phase ``precreate``: there is a monitor and no machine. Migration can be set up, an incoming one awaited.

Left by `machine-set`, `x-exit-precreate`, or the arrival of CPR state, whose recipe begins with `machine-set`.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, final

import attrs

from vmm.capabilities import (
    MayAppendRecipe,
    MayConfigureMachine,
    MayListen,
    MaySetMigrationCap,
    MaySetMigrationParam,
)
from vmm.decisions import Inbox
from vmm.phases.imports import import_the_rest
from vmm.phases.incoming_port import IncomingPort
from vmm.phases.migration_state import MigrationState

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from vmm.capabilities import Mint
    from vmm.nursery_tree import Phase
    from vmm.phases.assembly import Definition
    from vmm.phases.foundation import Host


@final
@attrs.frozen
class PrecreateGrants:
    """Tokens of this phase. `may-append-recipe` notes what is laid over a machine that comes from elsewhere."""

    configure_machine: MayConfigureMachine
    append_recipe: MayAppendRecipe
    set_migration_cap: MaySetMigrationCap
    set_migration_param: MaySetMigrationParam
    listen: MayListen


@final
class _Decision:
    """The facet of `may-configure-machine`, for the machine."""

    def __init__(self, inbox: Inbox[Definition]) -> None:
        self._inbox = inbox

    def decide(self, decision: object) -> Awaitable[None]:
        """Post the machine's definition."""
        from vmm.phases.assembly import Definition  # The caller has imported it, to make one.

        assert isinstance(decision, Definition)
        return self._inbox.post(decision, until="accel")


async def run_precreate(boot: Phase, host: Host) -> None:
    """Wait for the machine's definition, then go on to phase accel."""
    async with boot.child("precreate") as phase:
        migration = MigrationState(host.events, host.jobs)
        incoming = IncomingPort(phase, host, migration)
        inbox: Inbox[Definition] = Inbox("precreate")
        phase.publish(migration)
        phase.publish(incoming)

        def grants(mint: Mint) -> PrecreateGrants:
            return PrecreateGrants(
                configure_machine=mint(MayConfigureMachine, _Decision(inbox), only=frozenset({"machine"})),
                append_recipe=mint(MayAppendRecipe, host.overrides, only=frozenset({"overrides"})),
                set_migration_cap=mint(MaySetMigrationCap, migration.capabilities),
                set_migration_param=mint(MaySetMigrationParam, migration.parameters),
                listen=mint(MayListen, incoming),
            )

        def carry_out(definition: Definition) -> Definition:
            incoming.require_no_cpr_wait("x-exit-precreate")
            definition.check()
            options = definition.options
            with ExitStack() as undo:
                for number, label in enumerate(options.serial, 1):
                    host.stores.take_chardev(label, f"COM{number}")
                    undo.callback(host.stores.free_chardev, label)
                if options.memory_backend is not None:
                    definition.ram = host.stores.take_memory(options.memory_backend, options.memory.size)
                undo.pop_all()
            stack.callback(definition.close)
            host.start.identity.name, host.start.identity.uuid = options.name, options.uuid
            host.recorder.record_options("machine-set", options)
            return definition

        # Here, and so in the phases that follow: what a decision has brought is closed whatever happens next, also if
        # the window that it leaves is cancelled before it has closed.
        with ExitStack() as stack:
            async with phase.window(grants):
                definition = await phase.decided(inbox, carry_out)
            # Only now: the monitor answers without KVM, devices and migration streams.
            await import_the_rest(host.table)
            from vmm.phases.accel import run_accel
            from vmm.phases.assembly import Precreated

            async with incoming.telling_the_source():
                await run_accel(phase, Precreated(host, incoming, migration, definition))
