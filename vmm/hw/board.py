"""The `microvm` machine's fixed addresses and interrupt lines.

Those of a PC, as far as the machine has the device. Lines are GSIs: pins of both PICs (0 to 15) and of the IOAPIC.
Source: IBM PC/AT Technical Reference, I/O address map; Intel MultiProcessor Specification 1.4 §3.6 (APICs).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Final

I8042_DATA: Final = 0x60
I8042_COMMAND: Final = 0x64
I8042_PORTS: Final = (range(I8042_DATA, I8042_DATA + 1), range(I8042_COMMAND, I8042_COMMAND + 1))
I8042_GSI: Final = 1

RTC_PORTS: Final = range(0x70, 0x72)

POST_PORT: Final = range(0x80, 0x81)
SYSTEM_CONTROL_A: Final = range(0x92, 0x93)

COM1_PORTS: Final = range(0x3F8, 0x400)
COM1_GSI: Final = 4
COM2_PORTS: Final = range(0x2F8, 0x300)
COM2_GSI: Final = 3
COM3_PORTS: Final = range(0x3E8, 0x3F0)
COM3_GSI: Final = 4
COM4_PORTS: Final = range(0x2E8, 0x2F0)
COM4_GSI: Final = 3
COM: Final = ((COM1_PORTS, COM1_GSI), (COM2_PORTS, COM2_GSI), (COM3_PORTS, COM3_GSI), (COM4_PORTS, COM4_GSI))
"""COM1 to COM4. The first and the third share a line, and so do the second and the fourth, as on a PC."""

DEBUG_EXIT_PORTS: Final = range(0x501, 0x505)

PM1_EVENT: Final = range(0x600, 0x604)
PM1_CONTROL: Final = range(0x604, 0x606)
SCI_GSI: Final = 9
"""ACPI's fixed hardware. QEMU's PIIX4 has it here too, until firmware moves it."""

VIRTIO_SLOTS: Final = 8
VIRTIO_SLOT_SIZE: Final = 0x200
VIRTIO_MMIO: Final = 0xFEB0_0000
VIRTIO_GSI: Final = 16
"""Of slot 0; each slot has the next. These are pins of the IOAPIC alone, which nothing else uses."""


def virtio_addresses(slot: int) -> range:
    """Return where the registers of a virtio-mmio slot are."""
    start = VIRTIO_MMIO + VIRTIO_SLOT_SIZE * slot
    return range(start, start + VIRTIO_SLOT_SIZE)


def virtio_bus(slot: int) -> str:
    """Return the name of a virtio-mmio slot."""
    return f"virtio-mmio-bus.{slot}"
