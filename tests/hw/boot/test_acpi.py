from __future__ import annotations

import struct

import pytest

from tests.hw.boot.acpi_kit import tables
from tests.hw.boot.images import MIB, bzimage, elf, memory_of, source
from vmm.errors import BootError
from vmm.hw.board import PM1_CONTROL, PM1_EVENT
from vmm.hw.boot import aml, layout
from vmm.hw.boot.acpi import SCI, PciRoot, acpi_tables
from vmm.hw.boot.image import plan_boot

WINDOW = range(0xC000_0000, 0xFEC0_0000)


def test_a_search_finds_the_root_and_the_root_everything() -> None:
    made = acpi_tables(1)
    assert (made.address, made.address % 16) == (layout.ACPI, 0)
    assert {key: len(table) for key, table in tables(made).items() if key != b"DSDT"} == {
        b"XSDT": 52,
        b"FACP": 276,
        b"APIC": 80,
        b"FACS": 64,
    }


def test_the_madt_lists_processors_ioapic_sci_and_nmi() -> None:
    madt = tables(acpi_tables(2))[b"APIC"]
    assert struct.unpack_from("<II", madt, 36) == (0xFEE00000, 1)
    assert madt[44:] == (
        bytes([0, 8, 0, 0, 1, 0, 0, 0])
        + bytes([0, 8, 1, 1, 1, 0, 0, 0])
        + bytes([1, 12, 2, 0, 0, 0, 0xC0, 0xFE, 0, 0, 0, 0])
        + bytes([2, 10, 0, SCI, SCI, 0, 0, 0, 0x0D, 0])
        + bytes([4, 6, 0xFF, 0, 0, 1])
    )


def test_the_fadt_tells_power_and_reset_ports() -> None:
    fadt = tables(acpi_tables(1))[b"FACP"]
    assert struct.unpack_from("<I", fadt, 56) == (PM1_EVENT.start,)
    assert struct.unpack_from("<I", fadt, 64) == (PM1_CONTROL.start,)
    assert fadt[116:129] == b"\x01\x08\x00\x01\x64\0\0\0\0\0\0\0\xfe"


def virtio_slot(number: int) -> bytes:
    """A device LNRO0005 with 512 bytes of registers, and a level-triggered interrupt of its own."""
    named = b"VR0%d" % number + b"\x08_HID\x0dLNRO0005\0" + b"\x08_UID" + aml.integer(number)
    memory = b"\x86\x09\x00\x01" + struct.pack("<II", 0xFEB0_0000 + 0x200 * number, 0x200)
    interrupt = b"\x89\x06\x00\x01\x01" + struct.pack("<I", 16 + number)
    crs = b"\x08_CRS\x11\x1a\x0a\x17" + memory + interrupt + b"\x79\x00"
    body = named + crs
    return b"\x5b\x82" + bytes([len(body) + 1]) + body


def test_the_dsdt_of_a_machine_without_pci_knows_power_off_and_eight_virtio_slots() -> None:
    slots = b"".join(map(virtio_slot, range(8)))
    size = 5 + 2 + len(slots)  # the name and the length itself are counted
    scope = b"\x10" + bytes([0x40 | size & 0xF, size >> 4]) + b"\\_SB_" + slots
    assert tables(acpi_tables(1))[b"DSDT"][36:] == b"\x08_S5_\x12\x08\x04\x0a\x05\x0a\x05\x00\x00" + scope


def test_the_dsdt_describes_a_pci_root_with_its_window_and_interrupts() -> None:
    dsdt = tables(acpi_tables(1, PciRoot((WINDOW,), ((1, 0, 17),))))[b"DSDT"]
    assert b"PCI0\x08_HID\x0c\x41\xd0\x0a\x03" in dsdt
    assert b"\x8a\x2b\x00\x00\x0c\x01" + struct.pack("<5Q", 0, WINDOW.start, WINDOW.stop - 1, 0, len(WINDOW)) in dsdt
    assert dsdt.endswith(b"\x08_PRT\x12\x0e\x01\x12\x0b\x04\x0c\xff\xff\x01\x00\x00\x00\x0a\x11")


def test_a_kernel_is_told_where_the_root_is() -> None:
    acpi = acpi_tables(1)
    size = 32 * MIB
    linux = memory_of(plan_boot(source(bzimage()), None, "", size, 1, acpi), size)
    assert struct.unpack_from("<Q", linux, layout.BOOT_PARAMS + 0x70) == (layout.ACPI,)
    pvh = memory_of(plan_boot(source(elf()), None, "", size, 1, acpi), size)
    assert struct.unpack_from("<Q", pvh, layout.START_INFO + 32) == (layout.ACPI,)
    for memory in (linux, pvh):
        assert memory[layout.ACPI :].startswith(b"RSD PTR ")


def test_tables_that_do_not_fit() -> None:
    acpi_tables(255)
    with pytest.raises(BootError) as caught:
        acpi_tables(1, PciRoot((WINDOW,) * 3000))
    assert str(caught.value) == ("Cannot boot the machine: its ACPI tables take 139188 bytes, there is room for 131072")
