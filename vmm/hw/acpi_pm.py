"""The ACPI fixed hardware of a machine that can be turned off, and nothing more: the PM1a register blocks.

Source: ACPI Specification 6.5: 4.8.3.1 (PM1 event registers), 4.8.3.2.1 (PM1 control), 4.8.2.3 (where there is no
SMI_CMD, SCI_EN is always set).

Nothing here raises an event: the status register reads as zero, and the SCI stays low. The enable register keeps what
is written all the same, since ACPICA writes it to find out whether it is there. There is no PM timer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Annotated, ClassVar, Final, final

import attrs

from vmm.hw.board import PM1_CONTROL, PM1_EVENT
from vmm.hw.state import U16, Integer, Schema, host_only

SCI_ENABLED: Final = 1 << 0
SLEEP_ENABLE: Final = 1 << 13
SLEEP_TYPE_SHIFT: Final = 10
SLEEP_TYPE_S5: Final = 5
"""The SLP_TYP of soft off, as the DSDT's _S5 names it."""

_ENABLE_SHIFT: Final = 8 * 2  # bits, from the status register
_CONTROL_SHIFT: Final = 8 * (PM1_CONTROL.start - PM1_EVENT.start)
_BUS_MASTER_RELOAD: Final = 1 << 1
_SLEEP_TYPE: Final = 7 << SLEEP_TYPE_SHIFT
_KEPT: Final = _BUS_MASTER_RELOAD | _SLEEP_TYPE  # the rest of the control register is fixed, write-only or reserved


@attrs.define(kw_only=True)
class AcpiPmState:
    """What the guest last wrote."""

    SCHEMA: ClassVar[Schema] = Schema("acpi-pm1", version=1, accepts=1)

    enable: U16 = 0
    control: Annotated[int, Integer(0, 0x1FFF)] = 0


@final
@attrs.define(eq=False, repr=False, kw_only=True)
class AcpiPm:
    """The registers, byte for byte: status, enable and control, of 16 bits each.

    `request_power_off` is called on a vCPU thread under `lock`: it rings, and never blocks. Sleep states other than
    soft off are not described to the guest, and asking for one does nothing.
    """

    request_power_off: Callable[[], object] = attrs.field(metadata=host_only("the machine's end, in this process"))
    name: str = attrs.field(metadata=host_only("configuration: of the board"), default="acpi-pm")
    addresses: tuple[range, ...] = attrs.field(
        metadata=host_only("configuration: of the board"), default=(PM1_EVENT, PM1_CONTROL)
    )
    widest: int = attrs.field(metadata=host_only("configuration: registers of 16 bits"), default=2, init=False)
    lock: threading.Lock = attrs.field(
        metadata=host_only("orders this process's threads"), factory=threading.Lock, init=False
    )
    state: AcpiPmState = attrs.Factory(AcpiPmState)

    def read(self, offset: int, size: int) -> int:
        """Read a register, or half of one."""
        return self._registers() >> 8 * offset & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register, or half of one; SLP_EN turns the machine off if SLP_TYP says soft off."""
        mask = (1 << 8 * size) - 1 << 8 * offset
        written = self._registers() & ~mask | value << 8 * offset
        control = written >> _CONTROL_SHIFT
        self.state.enable = written >> _ENABLE_SHIFT & 0xFFFF
        self.state.control = control & _KEPT
        if control & SLEEP_ENABLE and control & _SLEEP_TYPE == SLEEP_TYPE_S5 << SLEEP_TYPE_SHIFT:
            self.request_power_off()

    def reset(self) -> None:
        """Go to the power-on state."""
        with self.lock:
            self.state = AcpiPmState()

    def after_load(self) -> None:
        """Do nothing: nothing follows from the state, and the SCI is never raised."""

    def _registers(self) -> int:
        return self.state.enable << _ENABLE_SHIFT | (self.state.control | SCI_ENABLED) << _CONTROL_SHIFT
