"""The MP tables: processors, IOAPIC and interrupt wiring for a guest without ACPI.

Source: Intel MultiProcessor Specification 1.4, chapter 4 (4.1 floating pointer, 4.2 header, 4.3.1 processors, 4.3.2
buses, 4.3.3 IOAPICs, 4.3.4 I/O interrupts, 4.3.5 local interrupts).

Interrupts. KVM_CREATE_IRQCHIP wires GSI n to pin n of the IOAPIC, for n from 0 to 23, and GSI 0 to 15 to the PICs as
well (Linux, arch/x86/kvm/irq.c, default_routing); the PIT raises GSI 0. So here ISA interrupt n is on pin n, the PIT on
pin 0. (A PC has it on pin 2, and VMMs that want that set a routing of their own.) Interrupt 2 is left out: it is the
cascade of the PICs. 16 to 23 do not exist on an ISA bus, but Linux takes them from this table by the same rule, and
devices of this machine that are not found on PCI need them.
"""

from __future__ import annotations

import struct

from vmm.errors import BootError
from vmm.hw.boot import layout
from vmm.hw.boot.plan import Data

IOAPIC_PINS = 24
CASCADE = 2
ISA_BUS = 0

_LOCAL_APIC_VERSION = 0x14  # as KVM's says
_IO_APIC_VERSION = 0x11
_ENABLED = 1
_BOOT_PROCESSOR = 2
_SPECIFICATION = 4  # 1.4
_EVERY_APIC = 0xFF

# Kinds of interrupt
_INT = 0
_NMI = 1
_EXT_INT = 3

_FLOATING_SIZE = 16


def mp_tables(cpus: int) -> Data:
    """Return the floating pointer and, behind it, the configuration table of a machine with `cpus` processors.

    Local APIC identifiers are 0 to cpus - 1, as KVM numbers vCPUs; the IOAPIC's is the next one.

    Raises:
        BootError: the table does not fit into the EBDA.
    """
    table = _configuration(cpus)
    address = layout.EBDA + _FLOATING_SIZE
    if _FLOATING_SIZE + len(table) > layout.EBDA_SIZE:
        raise BootError(
            image="the machine",
            reason=f"the MP table of {cpus} processors takes {len(table)} bytes, "
            f"there is room for {layout.EBDA_SIZE - _FLOATING_SIZE}",
        )
    floating = _with_checksum(struct.pack("<4sIBBB5x", b"_MP_", address, 1, _SPECIFICATION, 0), 10)
    return Data(layout.EBDA, floating + table)


def _configuration(cpus: int) -> bytes:
    io_apic = cpus
    entries = [
        struct.pack(
            "<BBBBII8x",
            0,
            cpu,
            _LOCAL_APIC_VERSION,
            _ENABLED | (_BOOT_PROCESSOR if cpu == 0 else 0),
            0,  # family, model and stepping: a guest asks CPUID
            1 << 9 | 1,  # feature flags: APIC and FPU on chip
        )
        for cpu in range(cpus)
    ]
    entries.append(struct.pack("<BB6s", 1, ISA_BUS, b"ISA   "))
    entries.append(struct.pack("<BBBBI", 2, io_apic, _IO_APIC_VERSION, _ENABLED, layout.IO_APIC))
    entries += [
        # flags 0: polarity and trigger as the bus has them, active high and edge
        struct.pack("<BBHBBBB", 3, _INT, 0, ISA_BUS, irq, io_apic, irq)
        for irq in range(IOAPIC_PINS)
        if irq != CASCADE
    ]
    entries.append(struct.pack("<BBHBBBB", 4, _EXT_INT, 0, ISA_BUS, 0, 0, 0))  # the PICs: LINT0 of the boot processor
    entries.append(struct.pack("<BBHBBBB", 4, _NMI, 0, ISA_BUS, 0, _EVERY_APIC, 1))
    body = b"".join(entries)
    header = struct.pack(
        "<4sHBB8s12sIHHIHBx",
        b"PCMP",
        44 + len(body),
        _SPECIFICATION,
        0,
        b"TRIO".ljust(8),
        b"VMM".ljust(12),
        0,  # no OEM table
        0,
        len(entries),
        layout.LOCAL_APIC,
        0,  # no extended table
        0,
    )
    return _with_checksum(header + body, 7)


def _with_checksum(table: bytes, at: int) -> bytes:
    """Return `table` with the byte at `at`, zero so far, set so that all bytes add up to zero modulo 256."""
    return table[:at] + bytes([-sum(table) & 0xFF]) + table[at + 1 :]
