"""Phase ``devices``: the board with its vCPUs and devices; what starts out in the guest's RAM is written here."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, final

import attrs

from vmm.capabilities import (
    MayConfigureMachine,
    MayCreateBackend,
    MayDeclareState,
    MayInject,
    MayListen,
    MayMapGuestMemory,
    MayOpenHostFile,
    MayPlugDevice,
    MayRestoreGuest,
    MayRunVcpus,
    MaySetNuma,
    MayWriteGuestMemory,
)
from vmm.decisions import Inbox
from vmm.errors import VmmError
from vmm.phases.board import BoardBuilder
from vmm.phases.building import Onward, WishToRun
from vmm.phases.config import GoOn
from vmm.phases.incoming import run_incoming
from vmm.phases.incoming_stream import run_incoming_stream
from vmm.phases.running import Run, run_running

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from vmm.capabilities import Mint
    from vmm.kvm.memory import GuestMemory
    from vmm.nursery_tree import Phase
    from vmm.phases.accel import Accelerator
    from vmm.phases.assembly import Precreated
    from vmm.phases.cpus import CpuModel
    from vmm.phases.slot_plan import SlotPlan


@final
@attrs.frozen
class DevicesGrants:
    """Tokens of this phase. The last two are there only if this process owns the guest's RAM."""

    plug_device: MayPlugDevice
    map_guest_memory: MayMapGuestMemory
    declare_state: MayDeclareState
    create_backend: MayCreateBackend
    open_host_file: MayOpenHostFile
    configure_machine: MayConfigureMachine
    set_numa: MaySetNuma
    listen: MayListen
    restore_guest: MayRestoreGuest
    run_vcpus: MayRunVcpus
    write_guest_memory: MayWriteGuestMemory | None
    inject: MayInject | None


@final
class _Decision:
    """The facet of `may-configure-machine`, for the board."""

    def __init__(self, inbox: Inbox[GoOn]) -> None:
        self._inbox = inbox

    def decide(self, decision: object) -> Awaitable[None]:
        """Post the wish to go on."""
        assert isinstance(decision, GoOn)
        return self._inbox.post(decision)


async def run_devices(
    preconfig: Phase,
    made: Precreated,
    accelerator: Accelerator,
    memory: GuestMemory,
    cpu: CpuModel,
    plan: SlotPlan,
    onward: GoOn | None,
) -> None:
    """Build the board; unless `onward` says so, wait for the wish to go on; then go on to incoming or running.

    Raises:
        VmmError: the board could not be built. What fails after it leaves the phase open.
    """
    host = made.host
    async with preconfig.child("devices", machine_phase="machine-initialized") as phase:
        with ExitStack() as stack:
            inbox: Inbox[GoOn] = Inbox("devices")
            builder = BoardBuilder(made, accelerator, memory, cpu, plan, phase.residents, stack)
            owned = made.incoming.arrival is None

            def grants(mint: Mint) -> DevicesGrants:
                return DevicesGrants(
                    plug_device=mint(MayPlugDevice, builder.slots),
                    map_guest_memory=mint(MayMapGuestMemory, builder),
                    declare_state=mint(MayDeclareState, builder.state),
                    create_backend=mint(MayCreateBackend, host.stores),
                    open_host_file=mint(MayOpenHostFile, host.files),
                    configure_machine=mint(MayConfigureMachine, _Decision(inbox), only=frozenset({"board"})),
                    set_numa=mint(MaySetNuma, made.definition.numa),
                    listen=mint(MayListen, Onward(inbox, made.incoming)),
                    restore_guest=mint(MayRestoreGuest, Onward(inbox, made.incoming)),
                    run_vcpus=mint(MayRunVcpus, WishToRun(inbox, made.incoming)),
                    write_guest_memory=mint(MayWriteGuestMemory, memory) if owned else None,
                    inject=mint(MayInject, builder.access) if owned else None,
                )

            async with phase.window(grants) as window:
                machine = builder.build(
                    window.grants.map_guest_memory, window.grants.plug_device, window.grants.declare_state
                )
                phase.publish(machine)
                await machine.slots.build_planned()

                def carry_out(decision: GoOn) -> GoOn:
                    numa = made.definition.complete()
                    if numa is not None:
                        machine.processors.answer([cpu.leaves(vcpu.index, numa.cpus) for vcpu in machine.vcpus])
                    # What comes in begins nowhere near the boot.
                    comes_in = decision.to_incoming or made.incoming.streams.wait is not None
                    decision = attrs.evolve(decision, to_incoming=comes_in)
                    if window.grants.write_guest_memory is not None and not comes_in:
                        memory.begin_use()
                        machine.power_on(window.grants.write_guest_memory)
                    host.recorder.record("finish-machine-init", {})
                    return decision

                try:
                    onward = carry_out(onward) if onward is not None else None
                except VmmError as error:
                    # What led here from preconfig got this far. The machine stands, and can be led on once more.
                    phase.tree.halt(error)
                    onward = None
                if onward is None:
                    onward = await phase.decided(inbox, carry_out)
            if made.incoming.arrival is not None:
                await run_incoming(phase, machine, made.incoming.arrival)
            elif onward.to_incoming:
                await run_incoming_stream(phase, machine, start=onward.start)
            else:
                await run_running(phase, Run(machine), start=onward.start)
