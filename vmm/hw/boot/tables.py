"""Tables that more than one kind of image gets: BIOS data area, memory map, GDT."""

from __future__ import annotations

import struct
from typing import Final, final

import attrs

from vmm.errors import BootError
from vmm.hw.boot import layout
from vmm.hw.boot.mptable import mp_tables
from vmm.hw.boot.plan import DATA_TYPE, TSS_TYPE, Data, Segment
from vmm.kvm.memory import ram_layout

RAM: Final = 1
RESERVED: Final = 2

FLAT_DATA: Final = Segment(selector=0x18, type=DATA_TYPE, db=1, g=1)
TASK: Final = Segment(selector=0x20, limit=0x67, type=TSS_TYPE, s=0)


@final
@attrs.frozen
class MemoryRange:
    """One line of the memory map; `type` as ACPI numbers address range types, which e820 and PVH do too."""

    address: int
    size: int
    type: int


@final
@attrs.frozen
class FirmwareTables:
    """BIOS data area, MP tables, and ACPI tables if there are any."""

    writes: tuple[Data, ...]
    rsdp: int
    """Guest-physical address of the RSDP, 0 without ACPI."""


def memory_map(ram_size: int) -> tuple[MemoryRange, ...]:
    """Return the map of a machine with `ram_size` bytes: conventional memory, EBDA, RAM from 1 MiB, RAM from 4 GiB.

    What is not listed is no RAM; a guest may put devices there.
    """
    low, *high = ram_layout(ram_size)
    return (
        MemoryRange(0, layout.EBDA, RAM),
        MemoryRange(layout.EBDA, layout.LOW_MEMORY_END - layout.EBDA, RESERVED),
        MemoryRange(layout.HIGH_MEMORY, low.size - layout.HIGH_MEMORY, RAM),
        *(MemoryRange(region.address, region.size, RAM) for region in high),
    )


def bios_data() -> Data:
    """Return the BIOS data area, zero but for the EBDA's segment (0x40e) and the KiB below it (0x413).

    Linux reserves memory from there to 1 MiB (arch/x86/kernel/ebda.c).
    """
    area = bytearray(0x100)
    struct.pack_into("<H", area, 0x0E, layout.EBDA >> 4)
    struct.pack_into("<H", area, 0x13, layout.EBDA // layout.KIB)
    return Data(layout.BIOS_DATA, bytes(area))


def firmware_tables(cpus: int, acpi: Data | None) -> FirmwareTables:
    """Return what firmware would have left in memory, for a machine with `cpus` processors.

    Raises:
        BootError: the MP tables of that many processors do not fit.
    """
    writes = (bios_data(), mp_tables(cpus))
    return FirmwareTables(writes, 0) if acpi is None else FirmwareTables((*writes, acpi), acpi.address)


def gdt(code: Segment) -> tuple[Data, range]:
    """Return a GDT with `code` at 0x10, flat data at 0x18 and the TSS at 0x20, and the range of its addresses.

    The upper half of a 64-bit TSS descriptor is the zero that follows it.
    """
    entries = (0, 0, code.descriptor(), FLAT_DATA.descriptor(), TASK.descriptor(), 0)
    table = struct.pack(f"<{len(entries)}Q", *entries)
    return Data(layout.GDT, table), range(layout.GDT, layout.GDT + len(table))


def encode_command_line(image: str, text: str, limit: int) -> bytes:
    """Return `text` with its closing zero.

    Raises:
        BootError: it is longer than `limit` bytes, or contains a zero.
    """
    line = text.encode("utf-8", "surrogateescape")
    if b"\0" in line:
        raise BootError(image=image, reason="the command line contains a zero byte, where it would end")
    if len(line) > limit:
        raise BootError(image=image, reason=f"the command line has {len(line)} bytes, it takes at most {limit}")
    return line + b"\0"
