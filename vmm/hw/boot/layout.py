"""Where boot data lies in guest-physical memory: every fixed address of this package, in one place.

    0x00000  interrupt vectors of real mode, left alone
    0x00400  BIOS data area: where the EBDA is, and how much memory lies below it
    0x00500  GDT
    0x06000  PVH start info, module list, memory map
    0x07000  boot_params, the "zero page" of Linux
    0x09000  page tables: PML4, PDPT, four page directories (4 GiB, identity)
    0x10000  flat image
    0x20000  command line
    0x9fc00  EBDA: the MP tables, which Linux looks for here (arch/x86/kernel/mpparse.c, smp_scan_config)
    0xe0000  ACPI tables, where there are any; Linux looks for their root from here on
    0x100000 kernel and all else; initrd at the end of low RAM (vmm.kvm.memory.ram_layout)

Flat images take the room of the command line too; they get none.
"""

from __future__ import annotations

from vmm.kvm.memory import ram_layout

PAGE = 4096
KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

BIOS_DATA = 0x0400
GDT = 0x0500
START_INFO = 0x6000
BOOT_PARAMS = 0x7000
PAGE_TABLES = 0x9000
FLAT_IMAGE = 0x1_0000
COMMAND_LINE = 0x2_0000
COMMAND_LINE_ROOM = 0x1_0000
EBDA = 0x9_FC00
EBDA_SIZE = 0x400
LOW_MEMORY_END = 0xA_0000
ACPI = 0xE_0000
ACPI_ROOM = 0x2_0000
HIGH_MEMORY = 0x10_0000

LOCAL_APIC = 0xFEE0_0000
IO_APIC = 0xFEC0_0000

RAM_MINIMUM = 2 * MIB
"""Less leaves no room above 1 MiB for anything."""


def low_ram_end(ram_size: int) -> int:
    """Return the end of the RAM that starts at 0, of a machine with `ram_size` bytes in all.

    Raises:
        OptionInvalid: `ram_size` is not a positive multiple of 4096.
    """
    return ram_layout(ram_size)[0].size


def align_up(value: int, unit: int) -> int:
    """Round `value` up to a multiple of `unit`."""
    return -(-value // unit) * unit


def align_down(value: int, unit: int) -> int:
    """Round `value` down to a multiple of `unit`."""
    return value // unit * unit


def size_text(size: int) -> str:
    """Word a number of bytes for a sentence: "1.5 MiB"."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f}".removesuffix(".0") + f" {name}"
    return f"{size} bytes"
