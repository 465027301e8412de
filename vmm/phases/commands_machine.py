"""Commands that make the machine and run it."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Annotated, Literal, final

import attrs

from vmm.capabilities import (
    MayAdoptDescriptor,
    MayConfigureMachine,
    MayOpenHostFile,
    MayOpenKvm,
    MayQuery,
    MayResumeHere,
    MayRunVcpus,
)
from vmm.decisions import Turn
from vmm.monitor.command import For
from vmm.phases.config import AcceleratorOptions, CpuOptions, GoOn, MachineOptions
from vmm.phases.run_state import RunState, RunStateName

HostSource = MayOpenHostFile | MayAdoptDescriptor


def machine_set(
    may: Annotated[MayConfigureMachine, For("machine")], host: HostSource, args: MachineOptions
) -> Awaitable[None]:
    """Define the machine: type, memory, vCPUs, kernel. Leads to phase accel; a failure leaves all as it was."""
    from vmm.phases.assembly import Definition  # Brings the boot loaders.

    definition = Definition.obtain(args, host)
    turn = may.decide("machine", definition)
    assert isinstance(turn, Turn)
    turn.on_settled(lambda: definition.close() if turn.failed else None)
    return turn


def x_exit_precreate(may: Annotated[MayConfigureMachine, For("machine")], host: HostSource) -> Awaitable[None]:
    """Leave phase precreate with a machine of defaults; the same as `machine-set` without arguments."""
    return machine_set(may, host, MachineOptions())


def accel_set(may: MayOpenKvm, args: AcceleratorOptions) -> Awaitable[None]:
    """Open the accelerator, make the RAM. Leads through backends to phase preconfig; after a failure, repeat it."""
    return may.decide(args)


def cpu_model_set(may: Annotated[MayConfigureMachine, For("cpu")], args: CpuOptions) -> Awaitable[None]:
    """Choose the CPU model. Leads to phase devices; a host that has then no room for the vCPUs ends the machine."""
    return may.decide("cpu", args)


def x_exit_preconfig(may: Annotated[MayConfigureMachine, For("cpu")]) -> Awaitable[None]:
    """Leave phase preconfig with the host's CPU model. A machine started with `--preconfig` goes on to run."""
    return may.decide("cpu", CpuOptions())


def finish_machine_init(may: Annotated[MayConfigureMachine, For("board")]) -> Awaitable[None]:
    """Complete the machine, and leave it standing. Leads to phase running (or incoming)."""
    return may.decide("board", GoOn(start=False))


def cont(may: MayRunVcpus | MayResumeHere) -> Awaitable[None]:
    """Run the guest. In preconfig and devices: complete the machine first. While incoming: run it once it is here.
    After a migration that copied it: run it here again; that it does not run there, too, is for the caller to know."""
    return may.decide() if isinstance(may, MayResumeHere) else may.cont()


def stop(may: MayRunVcpus) -> Awaitable[None]:
    """Take every vCPU out of the guest. While incoming: do not run it once it is here."""
    return may.stop()


def system_reset(may: MayRunVcpus) -> Awaitable[None]:
    """Put the machine into its power-on state: kernel and initrd are loaded again from the files given."""
    return may.reset()


@final
@attrs.frozen(kw_only=True)
class StatusInfo:
    """QEMU's StatusInfo, with the reason where the guest cannot go on."""

    running: bool
    status: RunStateName
    x_reason: str | None = None


def query_status(may: MayQuery) -> StatusInfo:
    """Say whether the guest runs, and if not, why."""
    state = may.view(RunState)
    return StatusInfo(running=state.running, status=state.name, x_reason=state.failure or None)


@final
@attrs.frozen(kw_only=True)
class CpuInstanceProperties:
    """Where a vCPU sits: one socket, a core each, one thread; and its NUMA node, in a machine that has any."""

    socket_id: int
    core_id: int
    thread_id: int
    node_id: int | None = None


@final
@attrs.frozen(kw_only=True)
class CpuInfoFast:
    """QEMU's CpuInfoFast."""

    cpu_index: int
    qom_path: str
    thread_id: int
    """The host thread that runs it; 0 while none does."""
    props: CpuInstanceProperties
    target: Literal["x86_64"] = "x86_64"


def query_cpus_fast(may: MayQuery) -> list[CpuInfoFast]:
    """List the vCPUs with their host threads, without disturbing them."""
    from vmm.phases.machine import Machine  # Brings KVM.

    machine = may.view(Machine)
    node_of = machine.made.definition.numa.node_of
    return [
        CpuInfoFast(
            cpu_index=vcpu.index,
            qom_path=f"/machine/unattached/device[{vcpu.index}]",
            thread_id=vcpu.thread_id,
            props=CpuInstanceProperties(socket_id=0, core_id=vcpu.index, thread_id=0, node_id=node_of(vcpu.index)),
        )
        for vcpu in machine.vcpus
    ]
