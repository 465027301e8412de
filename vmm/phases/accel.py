"""Phase ``accel``: the machine is defined; `accel-set` opens KVM and creates the virtual machine in it."""

from __future__ import annotations

from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, final

import attrs

from vmm.capabilities import MayOpenKvm
from vmm.kvm.system import Kvm
from vmm.nursery_tree import Inbox
from vmm.phases.backends import run_backends
from vmm.phases.config import AcceleratorOptions

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from vmm.capabilities import Mint
    from vmm.kvm.vm import Vm
    from vmm.nursery_tree import Phase
    from vmm.phases.assembly import Precreated


@final
@attrs.frozen
class AccelGrants:
    """Tokens of this phase."""

    open_kvm: MayOpenKvm


@final
@attrs.frozen
class Accelerator:
    """An open KVM, and the virtual machine in it with its interrupt chips and timer."""

    kvm: Kvm
    vm: Vm

    @classmethod
    def open(cls, options: AcceleratorOptions) -> Accelerator:
        """Open it. On a failure nothing stays open."""
        options.check()
        with ExitStack() as stack:
            kvm = stack.enter_context(closing(Kvm.open()))
            vm = stack.enter_context(closing(kvm.create_vm()))
            vm.create_irqchip()
            vm.create_pit()
            stack.pop_all()
        return cls(kvm, vm)

    def close(self) -> None:
        """Close both."""
        self.vm.close()
        self.kvm.close()


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

        def grants(mint: Mint) -> AccelGrants:
            return AccelGrants(open_kvm=mint(MayOpenKvm, _Decision(inbox)))

        def carry_out(options: AcceleratorOptions) -> Accelerator:
            accelerator = Accelerator.open(options)
            stack.callback(accelerator.close)
            made.host.recorder.record_options("accel-set", options)
            return accelerator

        with ExitStack() as stack:
            async with phase.window(grants):
                accelerator = await phase.decided(inbox, carry_out)
            await run_backends(phase, made, accelerator)
