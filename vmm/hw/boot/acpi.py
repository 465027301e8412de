"""ACPI tables: processors, IOAPIC, virtio slots, PCI root and power, for guests that do not read the MP tables.

Debian's cloud kernel is one (CONFIG_X86_MPPARSE is not set): without these it runs on one processor, without IOAPIC.
It then looks for PCI devices only below a root that the DSDT describes.

The machine is described as a PC with its legacy devices, not as hardware-reduced ACPI, under which Linux would give up
the PICs, the PIT and the fixed interrupts of the serial port.

Source: ACPI Specification 6.5: 5.2.5 (RSDP), 5.2.8 (XSDT), 5.2.9 (FADT), 5.2.10 (FACS), 5.2.12 (MADT), 7.4.2 (_S5),
4.8.3 (PM1 registers), 6.2.13 (_PRT).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, final

import attrs

from vmm.errors import BootError
from vmm.hw import board
from vmm.hw.acpi_pm import SLEEP_TYPE_S5
from vmm.hw.boot import aml, layout
from vmm.hw.boot.acpi_file import AcpiTable, refused
from vmm.hw.boot.plan import Data

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.hw.boot.numa import Numa

SCI = board.SCI_GSI
RESET_PORT = board.I8042_COMMAND
RESET_VALUE = 0xFE

_ALWAYS = ("RSDT", "XSDT", "FACP", "FACS", "DSDT", "APIC")
_PCI_CONFIG = range(0xCF8, 0xD00)


@final
@attrs.frozen
class PciRoot:
    """What the guest is to know of PCI: bus 0, configured through ports 0xcf8 and 0xcfc."""

    memory: tuple[range, ...]
    """Guest-physical addresses where BARs may lie."""
    interrupts: tuple[tuple[int, int, int], ...] = ()
    """Device number, pin (0 is INTA) and GSI of each interrupt line in use. Devices with MSI-X need none."""


def acpi_tables(
    cpus: int, pci: PciRoot | None = None, *, numa: Numa | None = None, extra: Sequence[AcpiTable] = ()
) -> Data:
    """Return the tables of a machine with `cpus` processors, the RSDP first, at a place where it is found by search.

    `extra` are tables beside the machine's own ones.

    Raises:
        BootError: they do not fit between 0xe0000 and 1 MiB.
        HostFileRefused: one of `extra` is of a kind that the machine has already.
    """
    blob = bytearray(64)  # the RSDP comes last, when the XSDT's address is known

    def add(table: bytes, align: int = 16) -> int:
        blob.extend(bytes(-len(blob) % align))
        blob.extend(table)
        return layout.ACPI + len(blob) - len(table)

    facs = add(struct.pack("<4sI24xB31x", b"FACS", 64, 2), 64)
    dsdt = add(_table(b"DSDT", 2, _dsdt(pci)))
    fadt = add(_table(b"FACP", 6, _fadt(facs, dsdt)))
    listed = [fadt, add(_table(b"APIC", 5, _madt(cpus)))]
    if numa is not None:
        listed += [add(_table(b"SRAT", 3, numa.srat())), add(_table(b"SLIT", 1, numa.slit()))]
    own = {*_ALWAYS, *(("SRAT", "SLIT") if numa is not None else ())}
    for table in extra:
        if table.signature in own:
            raise refused(table.name, f"the machine has a table {table.signature} of its own")
        listed.append(add(table.data))
    xsdt = add(_table(b"XSDT", 1, struct.pack(f"<{len(listed)}Q", *listed)))
    blob[:36] = _rsdp(xsdt)
    if len(blob) > layout.ACPI_ROOM:
        raise BootError(
            image="the machine",
            reason=f"its ACPI tables take {len(blob)} bytes, there is room for {layout.ACPI_ROOM}",
        )
    return Data(layout.ACPI, bytes(blob))


def _rsdp(xsdt: int) -> bytes:
    first = _with_checksum(struct.pack("<8sB6sBI", b"RSD PTR ", 0, b"TRIO  ", 2, 0), 8)
    return _with_checksum(first + struct.pack("<IQB3x", 36, xsdt, 0), 32)


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    header = struct.pack(
        "<4sIBB6s8sI4sI", signature, 36 + len(body), revision, 0, b"TRIO  ", b"TRIOVMM ", 1, b"TRIO", 1
    )
    return _with_checksum(header + body, 9)


def _fadt(facs: int, dsdt: int) -> bytes:
    table = bytearray(276)  # offsets as in the specification, header included
    legacy_devices, keyboard_controller, no_vga, no_aspm = 1 << 0, 1 << 1, 1 << 2, 1 << 4
    wbinvd, no_power_button, no_sleep_button, no_rtc_wake, reset_register = 1 << 0, 1 << 4, 1 << 5, 1 << 6, 1 << 10
    struct.pack_into("<II", table, 36, facs, dsdt)
    struct.pack_into("<H", table, 46, SCI)
    struct.pack_into("<I", table, 56, board.PM1_EVENT.start)
    struct.pack_into("<I", table, 64, board.PM1_CONTROL.start)
    table[88:90] = bytes([4, 2])  # PM1_EVT_LEN, PM1_CNT_LEN
    struct.pack_into("<HH", table, 96, 0xFFF, 0xFFF)  # no C2, no C3
    struct.pack_into("<H", table, 109, legacy_devices | keyboard_controller | no_vga | no_aspm)
    struct.pack_into("<I", table, 112, wbinvd | no_power_button | no_sleep_button | no_rtc_wake | reset_register)
    table[116:129] = _io_register(RESET_PORT, 8) + bytes([RESET_VALUE])
    struct.pack_into("<Q", table, 140, dsdt)
    table[148:160] = _io_register(board.PM1_EVENT.start, 32)
    table[172:184] = _io_register(board.PM1_CONTROL.start, 16)
    return bytes(table[36:])


def _io_register(port: int, bits: int) -> bytes:
    access = 1 if bits == 8 else 2  # by words: the event block is two registers of 16 bits
    return struct.pack("<BBBBQ", 1, bits, 0, access, port)


def _madt(cpus: int) -> bytes:
    """Processors, IOAPIC, and what is not as on an ISA bus: the SCI is active high and level.

    Interrupt 0 is on pin 0 as KVM routes it by default (see mptable.py), so it needs no override.
    """
    enabled, has_pics, active_high_level, every_processor = 1, 1, 0b1101, 0xFF
    entries = [struct.pack("<BBBBI", 0, 8, cpu, cpu, enabled) for cpu in range(cpus)]
    entries.append(struct.pack("<BBBBII", 1, 12, cpus, 0, layout.IO_APIC, 0))
    entries.append(struct.pack("<BBBBIH", 2, 10, 0, SCI, SCI, active_high_level))
    entries.append(struct.pack("<BBBHB", 4, 6, every_processor, 0, 1))  # NMI on LINT1
    return struct.pack("<II", layout.LOCAL_APIC, has_pics) + b"".join(entries)


def _dsdt(pci: PciRoot | None) -> bytes:
    soft_off = aml.integer(SLEEP_TYPE_S5)
    objects = aml.name("_S5", aml.package(soft_off, soft_off, aml.integer(0), aml.integer(0)))
    devices = [_virtio_slot(slot) for slot in range(board.VIRTIO_SLOTS)]
    if pci is not None:
        devices.append(_pci_root(pci))
    return objects + aml.scope("_SB", *devices)


def _virtio_slot(slot: int) -> bytes:
    """Describe a place for a virtio device: whether there is one, the guest finds out by its registers."""
    return aml.device(
        f"VR{slot:02X}",
        aml.name("_HID", aml.string("LNRO0005")),
        aml.name("_UID", aml.integer(slot)),
        aml.name(
            "_CRS",
            aml.resources(aml.memory(board.virtio_addresses(slot)), aml.interrupt(board.VIRTIO_GSI + slot)),
        ),
    )


def _pci_root(pci: PciRoot) -> bytes:
    every_function = 0xFFFF
    routes = [
        aml.package(*(aml.integer(value) for value in (device << 16 | every_function, pin, 0, gsi)))
        for device, pin, gsi in pci.interrupts
    ]
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", aml.integer(0)),
        aml.name(
            "_CRS",
            aml.resources(
                aml.bus_window(range(1)),
                aml.io_port(_PCI_CONFIG),
                aml.io_window(range(0x1000, 0x10000)),
                *(aml.memory_window(addresses) for addresses in pci.memory),
            ),
        ),
        *([aml.name("_PRT", aml.package(*routes))] if routes else []),
    )


def _with_checksum(table: bytes, at: int) -> bytes:
    return table[:at] + bytes([-sum(table) & 0xFF]) + table[at + 1 :]
