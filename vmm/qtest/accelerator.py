"""Accelerator ``qtest``: a machine whose devices are all there and whose vCPUs execute nothing. Needs no KVM.

Time stands still but for `VirtualClock`; interrupt lines keep the level that devices drive them to.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, ClassVar, Final, final

from vmm.hw.irq import IrqLines
from vmm.qtest.clock import VirtualClock
from vmm.qtest.cpu import IdleCpu
from vmm.qtest.state import QtestSection, QtestState
from vmm.qtest.vm import QtestVm

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import ExitStack

    from vmm.capabilities import MayDeclareState
    from vmm.hw.boot.plan import CpuStart
    from vmm.kvm.cpuid import CpuidEntry
    from vmm.kvm.memory import GuestMemory
    from vmm.kvm.vcpu import IoSpace

_SECOND: Final = 1_000_000_000  # ns


@final
class QtestAccelerator:
    """The stand-in for KVM. `vm.serve` is its one task, which also ends it."""

    has_tsc_deadline: ClassVar[bool] = False

    def __init__(self) -> None:
        """Begin at virtual time 0, which is the present second of the host's clock."""
        self.lines: Final = IrqLines()
        self.vm: Final = QtestVm(self.lines)
        self.clock: Final = VirtualClock(int(time.time()) * _SECOND)

    def supported_cpuid(self) -> tuple[CpuidEntry, ...]:
        """Return nothing: no vCPU executes CPUID."""
        return ()

    def make_processors(
        self, leaves: Sequence[tuple[CpuidEntry, ...]], ports: IoSpace, mmio: IoSpace, stack: ExitStack
    ) -> IdleProcessors:
        """Make vCPUs that access nothing."""
        return IdleProcessors(len(leaves), QtestSection(self.clock, self.lines))

    def dirty_log(self, memory: GuestMemory) -> None:
        """Return None: no guest writes."""

    def time_ns(self) -> int:
        """Return Unix time in ns, which moves with the virtual clock alone."""
        return self.clock.time_ns()

    def ring(self, address: int, size: int, value: int, *, port: bool) -> bool:
        """Write the ioeventfds that hear this store; say whether there was one."""
        return self.vm.ring(address, size, value, port=port)

    def close(self) -> None:
        """Do nothing: the task of `vm` ends it."""


@final
class IdleProcessors:
    """vCPUs without registers or chips: nothing to reset, and no state but that of the clock and the lines."""

    sections: ClassVar[tuple[str, ...]] = ("qtest",)
    apart_from_ram: ClassVar[bool] = False
    """It is, but there is nothing to be gained by that, and `power_on_again` would not take it back."""

    def __init__(self, count: int, section: QtestSection) -> None:
        self.vcpus: Final = tuple(IdleCpu(index) for index in range(count))
        self._section: Final = section

    def declare(self, may: MayDeclareState) -> None:
        """Declare section `qtest`."""
        schema, section = QtestState.SCHEMA, self._section
        may.register(schema.name, schema.version, save=section.save, load=section.load, accepts=schema.accepts)

    def answer(self, leaves: Sequence[tuple[CpuidEntry, ...]]) -> None:
        """Do nothing: none is asked."""

    def begin_at(self, start: CpuStart) -> None:
        """Do nothing."""

    def power_on_again(self) -> None:
        """Do nothing."""

    def reset_state(self) -> Mapping[str, Mapping[str, Any]]:
        """Return nothing: nothing was declared."""
        return {}

    def note_pause(self) -> None:
        """Do nothing."""

    def let_time_stand(self, stood_still: bool) -> None:
        """Do nothing."""
