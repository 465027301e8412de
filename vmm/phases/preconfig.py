"""Phase ``preconfig``: KVM and RAM are there, devices and vCPUs are not."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import attrs

from vmm.capabilities import (
    MayAppendRecipe,
    MayConfigureMachine,
    MayCreateBackend,
    MayListen,
    MayOpenHostFile,
    MayRestoreGuest,
    MayRunVcpus,
    MaySetMigrationCap,
    MaySetMigrationParam,
    MaySetNuma,
)
from vmm.decisions import Inbox
from vmm.phases.building import Onward, WishToRun
from vmm.phases.config import CpuOptions, GoOn
from vmm.phases.cpus import CpuOffer
from vmm.phases.devices import run_devices
from vmm.phases.slot_plan import PlannedDevices, SlotPlan

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from vmm.capabilities import Mint
    from vmm.kvm.memory import GuestMemory
    from vmm.nursery_tree import Phase
    from vmm.phases.accel import Accelerator
    from vmm.phases.assembly import Precreated
    from vmm.phases.cpus import CpuModel


@final
@attrs.frozen
class PreconfigGrants:
    """Tokens of this phase. `may-run-vcpus` only says here whether the guest shall run once it can."""

    configure_machine: MayConfigureMachine
    append_recipe: MayAppendRecipe
    set_numa: MaySetNuma
    create_backend: MayCreateBackend
    open_host_file: MayOpenHostFile
    set_migration_cap: MaySetMigrationCap
    set_migration_param: MaySetMigrationParam
    listen: MayListen
    restore_guest: MayRestoreGuest
    run_vcpus: MayRunVcpus


@final
class _Decision:
    """The facet of `may-configure-machine`, for the CPU."""

    def __init__(self, inbox: Inbox[CpuOptions | GoOn], until: str) -> None:
        self._inbox = inbox
        self._until = until

    def decide(self, decision: object) -> Awaitable[None]:
        """Post the CPU model."""
        assert isinstance(decision, CpuOptions)
        return self._inbox.post(decision, until=self._until)


async def run_preconfig(backends: Phase, made: Precreated, accelerator: Accelerator, memory: GuestMemory) -> None:
    """Wait for the CPU model, or for the wish to go on, then go on to phase devices."""
    host = made.host
    async with backends.child("preconfig") as phase:
        inbox: Inbox[CpuOptions | GoOn] = Inbox("preconfig")
        # A predecessor's recipe says itself how it goes on.
        onward = host.start.after_preconfig if not made.incoming.brings_recipe() else None
        until = "devices" if onward is None else made.incoming.leads_to()
        offer = CpuOffer.of(accelerator, made.definition)
        phase.publish(offer)
        plan = SlotPlan(host.stores)

        def grants(mint: Mint) -> PreconfigGrants:
            return PreconfigGrants(
                configure_machine=mint(MayConfigureMachine, _Decision(inbox, until), only=frozenset({"cpu"})),
                append_recipe=mint(MayAppendRecipe, PlannedDevices(plan, host.recorder), only=frozenset({"devices"})),
                set_numa=mint(MaySetNuma, made.definition.numa),
                create_backend=mint(MayCreateBackend, host.stores),
                open_host_file=mint(MayOpenHostFile, host.files),
                set_migration_cap=mint(MaySetMigrationCap, made.migration.capabilities),
                set_migration_param=mint(MaySetMigrationParam, made.migration.parameters),
                listen=mint(MayListen, Onward(inbox, made.incoming)),
                restore_guest=mint(MayRestoreGuest, Onward(inbox, made.incoming)),
                run_vcpus=mint(MayRunVcpus, WishToRun(inbox, made.incoming)),
            )

        def carry_out(decision: CpuOptions | GoOn) -> tuple[CpuModel, GoOn | None]:
            cpu = offer.choose(decision if isinstance(decision, CpuOptions) else CpuOptions())
            further = decision if isinstance(decision, GoOn) else onward
            if further is not None:
                # There is no command in between that could still complete what is not complete.
                made.definition.complete()
            host.recorder.record_options("cpu-model-set", cpu.options)
            return cpu, further

        async with phase.window(grants):
            cpu, decided = await phase.decided(inbox, carry_out)
        await run_devices(phase, made, accelerator, memory, cpu, plan, decided)
