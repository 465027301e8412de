"""Phase ``accel``: the machine is defined; `accel-set` opens the accelerator: KVM, with a virtual machine in it.

The guest's RAM is made by the same decision, so that it fails as a whole and can be made again; phase backends has it.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, ClassVar, Protocol, final

import attrs

from vmm.capabilities import MayOpenHostFile, MayOpenKvm
from vmm.decisions import Inbox
from vmm.hw.irq import IrqLines
from vmm.kvm.dirty_log import LoggingVm
from vmm.kvm.system import Kvm
from vmm.phases.backends import make_ram, run_backends
from vmm.phases.config import AcceleratorOptions
from vmm.phases.processors import KvmProcessors

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from vmm.capabilities import Mint
    from vmm.kvm.cpuid import CpuidEntry
    from vmm.kvm.dirty_log import DirtyLog
    from vmm.kvm.memory import GuestMemory
    from vmm.kvm.vcpu import IoSpace
    from vmm.kvm.vm import Vm
    from vmm.nursery_tree import Phase
    from vmm.phases.assembly import Precreated
    from vmm.phases.processors import Processors
    from vmm.qtest.clock import VirtualClock


@final
@attrs.frozen
class AccelGrants:
    """Tokens of this phase."""

    open_kvm: MayOpenKvm
    open_host_file: MayOpenHostFile


class VirtualMachine(LoggingVm, Protocol):
    """What devices and memory ask of a virtual machine; `vmm.kvm.vm.Vm` says what each does."""

    def assign_irqfd(self, fd: int, gsi: int, *, resample_fd: int | None = None) -> None:
        """From now on a written eventfd `fd` raises `gsi`."""

    def deassign_irqfd(self, fd: int, gsi: int) -> None:
        """Undo `assign_irqfd`."""

    def hold_irqfds(self) -> None:
        """Have every interrupt raised whose eventfd was written, and from now on none."""

    def release_irqfds(self) -> None:
        """Undo `hold_irqfds`, with what was written meanwhile."""

    def assign_ioeventfd(
        self, fd: int, address: int, size: int, *, port: bool = False, value: int | None = None
    ) -> None:
        """From now on a store at `address` writes eventfd `fd`."""

    def deassign_ioeventfd(
        self, fd: int, address: int, size: int, *, port: bool = False, value: int | None = None
    ) -> None:
        """Undo `assign_ioeventfd`."""


class Accelerator(Protocol):
    """What the machine is built on: KVM, or a stand-in that executes nothing."""

    @property
    def vm(self) -> VirtualMachine:
        """The virtual machine."""

    @property
    def lines(self) -> IrqLines:
        """Its interrupt lines."""

    def supported_cpuid(self) -> tuple[CpuidEntry, ...]:
        """Return what vCPUs on it can answer to CPUID."""

    @property
    def has_tsc_deadline(self) -> bool:
        """Whether their timers can be set to a value of the TSC, which the leaves of KVM do not say."""

    def make_processors(
        self, leaves: Sequence[tuple[CpuidEntry, ...]], ports: IoSpace, mmio: IoSpace, stack: ExitStack
    ) -> Processors:
        """Make a vCPU for each of `leaves`, its answers to CPUID; its accesses go to `ports` and `mmio`."""

    def dirty_log(self, memory: GuestMemory) -> DirtyLog | None:
        """Return what finds out what the guest writes; None where it executes nothing, and stands all the time."""

    def time_ns(self) -> int:
        """Return Unix time in ns, as the machine's devices know it."""

    @property
    def clock(self) -> VirtualClock | None:
        """The clock by which alone time passes; None where time passes by itself."""

    def ring(self, address: int, size: int, value: int, *, port: bool) -> bool:
        """Write the ioeventfds that hear a store from outside of the guest; say whether there was one."""

    def close(self) -> None:
        """End it."""


@final
@attrs.frozen(eq=False)
class KvmAccelerator:
    """An open KVM, and the virtual machine in it with its interrupt chips and timer."""

    clock: ClassVar[None] = None

    kvm: Kvm
    vm: Vm
    lines: IrqLines

    @classmethod
    def open(cls, ring_size: int | None = None) -> KvmAccelerator:
        """Open it. With `ring_size`, each vCPU says in a ring of so many entries what it writes.

        On a failure nothing stays open.
        """
        with ExitStack() as stack:
            kvm = stack.enter_context(closing(Kvm.open()))
            vm = stack.enter_context(closing(kvm.create_vm()))
            if ring_size:
                from vmm.kvm.dirty_ring import require_working_rings  # Few machines have them.

                require_working_rings(kvm)
                vm.use_dirty_rings(ring_size)
            vm.create_irqchip()
            vm.create_pit()
            stack.pop_all()
        return cls(kvm, vm, IrqLines(vm.set_irq))

    def supported_cpuid(self) -> tuple[CpuidEntry, ...]:
        """Ask KVM."""
        return self.kvm.supported_cpuid()

    @property
    def has_tsc_deadline(self) -> bool:
        """Whether KVM has the extension."""
        return bool(self.kvm.extension("KVM_CAP_TSC_DEADLINE_TIMER"))

    def make_processors(
        self, leaves: Sequence[tuple[CpuidEntry, ...]], ports: IoSpace, mmio: IoSpace, stack: ExitStack
    ) -> Processors:
        """Make them of KVM's vCPUs."""
        return KvmProcessors.make(self.vm, leaves, ports, mmio, stack)

    def dirty_log(self, memory: GuestMemory) -> DirtyLog:
        """Return KVM's."""
        from vmm.kvm.dirty_log import DirtyLog  # Most machines are never copied.

        return DirtyLog(self.vm, memory)

    def time_ns(self) -> int:
        """Return the host's time."""
        return time.time_ns()

    def ring(self, address: int, size: int, value: int, *, port: bool) -> bool:
        """Say no: KVM hears what vCPUs store, and nothing else."""
        return False

    def close(self) -> None:
        """Close both."""
        self.vm.close()
        self.kvm.close()


def _open(phase: Phase, options: AcceleratorOptions) -> Accelerator:
    """Open what `options` say. On a failure nothing stays open."""
    if options.accel == "kvm":
        return KvmAccelerator.open(options.dirty_ring_size)
    from vmm.qtest.accelerator import QtestAccelerator  # For tests of devices; no guest needs it.

    accelerator = QtestAccelerator()
    phase.residents.start_soon("irqfds", accelerator.vm.serve)
    return accelerator


@final
class _Decision:
    """The facet of `may-open-kvm`."""

    def __init__(self, inbox: Inbox[AcceleratorOptions]) -> None:
        self._inbox = inbox

    def decide(self, decision: object) -> Awaitable[None]:
        """Post the choice of accelerator."""
        assert isinstance(decision, AcceleratorOptions)
        return self._inbox.post(decision, until="preconfig")


async def run_accel(precreate: Phase, made: Precreated) -> None:
    """Wait for the accelerator, then go on to phase backends."""
    async with precreate.child("accel", machine_phase="machine-created") as phase:
        inbox: Inbox[AcceleratorOptions] = Inbox("accel")
        phase.publish(made.definition)

        def grants(mint: Mint) -> AccelGrants:
            return AccelGrants(
                open_kvm=mint(MayOpenKvm, _Decision(inbox)),
                open_host_file=mint(MayOpenHostFile, made.incoming.resources()),
            )

        with ExitStack() as stack:
            async with phase.window(grants) as window:

                def carry_out(options: AcceleratorOptions) -> tuple[Accelerator, GuestMemory]:
                    options.check()
                    with ExitStack() as undo:
                        ram = make_ram(window.grants.open_host_file, made.definition)
                        memory = undo.enter_context(closing(ram))
                        accelerator = undo.enter_context(closing(_open(phase, options)))
                        stack.enter_context(undo.pop_all())
                    made.host.recorder.record_options("accel-set", options)
                    return accelerator, memory

                accelerator, memory = await phase.decided(inbox, carry_out)
            await run_backends(phase, made, accelerator, memory)
