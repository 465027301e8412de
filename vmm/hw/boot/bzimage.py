"""bzImage: Linux by its 64-bit boot protocol.

Source: Linux, Documentation/arch/x86/boot.rst ("Details of Header Fields", "64-bit Boot Protocol") and zero-page.rst;
offsets are those of the tables there.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, final

import attrs

from vmm.errors import BootError
from vmm.hw.boot import layout, tables
from vmm.hw.boot.initrd import place_initrd
from vmm.hw.boot.plan import CODE_TYPE, BootPlan, CpuStart, Data, Segment

if TYPE_CHECKING:
    from vmm.hw.boot.plan import BinarySource, Write

HEADER_MAGIC: Final = b"HdrS"
MAGIC_OFFSET: Final = 0x202
OLDEST: Final = 0x020C  # 2.12, the first with xloadflags: it says whether there is a 64-bit entry
NEWEST: Final = 0x020F  # 2.15, the newest that boot.rst describes

_SETUP_START: Final = 0x1F1
_SETUP_LIMIT: Final = 0x290  # edd_mbr_sig_buffer follows in boot_params
_SETUP_LEAST: Final = 0x264  # end of init_size
_E820_COUNT: Final = 0x1E8
_E820_TABLE: Final = 0x2D0
_LOADED_HIGH: Final = 1
_XLF_KERNEL_64: Final = 1
_LOADER_UNDEFINED: Final = 0xFF
_VIDEO_NORMAL: Final = 0xFFFF
_ENTRY_64: Final = 0x200

_CR0_PE: Final = 1 << 0
_CR0_ET: Final = 1 << 4
_CR0_PG: Final = 1 << 31
_CR4_PAE: Final = 1 << 5
_EFER_LME: Final = 1 << 8
_EFER_LMA: Final = 1 << 10

CODE_64: Final = Segment(selector=0x10, type=CODE_TYPE, l=1, g=1)


@final
@attrs.frozen(kw_only=True)
class SetupHeader:
    """The fields of the setup header that matter here, checked; sizes in bytes, names as in boot.rst."""

    raw: bytes
    """From offset 0x1f1 of the file to the header's end, to go into boot_params at 0x1f1."""
    payload_offset: int
    """Where the protected-mode kernel begins in the file, and its size."""
    payload_size: int
    initrd_addr_max: int
    kernel_alignment: int
    relocatable: bool
    cmdline_size: int
    pref_address: int
    init_size: int


def read_setup_header(kernel: BinarySource) -> SetupHeader:
    """Read and check the setup header.

    Raises:
        BootError: no bzImage, of a protocol that is not known here, without 64-bit entry, or truncated.
    """
    first = kernel.read(0, _SETUP_LIMIT)
    if first[MAGIC_OFFSET : MAGIC_OFFSET + 4] != HEADER_MAGIC:
        raise BootError(image=kernel.name, reason="it is no bzImage: 'HdrS' is missing at byte 0x202")
    if len(first) < _SETUP_LIMIT:
        raise BootError(image=kernel.name, reason=f"it is truncated: {kernel.size} bytes do not hold a setup header")
    (version,) = struct.unpack_from("<H", first, 0x206)
    if not OLDEST <= version <= NEWEST:
        raise BootError(
            image=kernel.name,
            reason=f"it speaks boot protocol {_version(version)}, "
            f"and {_version(OLDEST)} to {_version(NEWEST)} are known here",
        )
    (xloadflags,) = struct.unpack_from("<H", first, 0x236)
    if not (xloadflags & _XLF_KERNEL_64 and first[0x211] & _LOADED_HIGH):
        raise BootError(
            image=kernel.name,
            reason="it has no 64-bit entry (XLF_KERNEL_64); a kernel built for x86-64 has one",
        )
    header_end = MAGIC_OFFSET + first[0x201]
    if not _SETUP_LEAST <= header_end <= _SETUP_LIMIT:
        raise BootError(
            image=kernel.name,
            reason=f"its setup header ends at {header_end:#x}; {_SETUP_LEAST:#x} to {_SETUP_LIMIT:#x} would be right",
        )
    payload_offset = ((first[_SETUP_START] or 4) + 1) * 512
    payload_size = 16 * int.from_bytes(first[0x1F4:0x1F8], "little")
    if not payload_size or payload_offset + payload_size > kernel.size:
        raise BootError(
            image=kernel.name,
            reason=f"it is truncated: its header promises {payload_offset + payload_size} bytes, "
            f"the file has {kernel.size}",
        )
    initrd_addr_max, kernel_alignment, relocatable = struct.unpack_from("<IIB", first, 0x22C)
    (cmdline_size,) = struct.unpack_from("<I", first, 0x238)
    pref_address, init_size = struct.unpack_from("<QI", first, 0x258)
    if kernel_alignment.bit_count() != 1:
        raise BootError(image=kernel.name, reason=f"its kernel_alignment {kernel_alignment:#x} is not a power of two")
    return SetupHeader(
        raw=first[_SETUP_START:header_end],
        payload_offset=payload_offset,
        payload_size=payload_size,
        initrd_addr_max=initrd_addr_max,
        kernel_alignment=kernel_alignment,
        relocatable=bool(relocatable),
        cmdline_size=cmdline_size,
        pref_address=pref_address,
        init_size=init_size,
    )


def plan_bzimage(
    kernel: BinarySource, initrd: BinarySource | None, cmdline: str, ram_size: int, firmware: tables.FirmwareTables
) -> BootPlan:
    """Plan the start of a bzImage at its 64-bit entry, RSI at boot_params, the first 4 GiB mapped one to one.

    Raises:
        BootError: as `read_setup_header`; or kernel, initrd or command line do not fit.
    """
    header = read_setup_header(kernel)
    line = tables.encode_command_line(kernel.name, cmdline, min(header.cmdline_size, layout.COMMAND_LINE_ROOM - 1))
    address, end = _place_kernel(kernel.name, header, ram_size)
    writes: list[Write] = [*firmware.writes]
    writes.append(kernel.place(address, header.payload_offset, header.payload_size))
    ramdisk = (0, 0)
    if initrd is not None:
        ramdisk = (place_initrd(kernel.name, initrd, end, ram_size, header.initrd_addr_max + 1), initrd.size)
        writes.append(initrd.place(ramdisk[0], 0, initrd.size))
    gdt, gdt_range = tables.gdt(CODE_64)
    writes += [
        gdt,
        _page_tables(),
        Data(layout.COMMAND_LINE, line),
        _boot_params(header, address, ramdisk, firmware.rsdp, ram_size),
    ]
    return BootPlan(
        kind="bzimage",
        image=kernel.name,
        writes=tuple(writes),
        start=CpuStart(
            mode="long",
            rip=address + _ENTRY_64,
            rsi=layout.BOOT_PARAMS,
            cr0=_CR0_PG | _CR0_ET | _CR0_PE,
            cr3=layout.PAGE_TABLES,
            cr4=_CR4_PAE,
            efer=_EFER_LME | _EFER_LMA,
            code=CODE_64,
            data=tables.FLAT_DATA,
            task=tables.TASK,
            gdt=gdt_range,
        ),
    )


def _version(version: int) -> str:
    return f"{version >> 8}.{version & 0xFF:02}"


def _place_kernel(name: str, header: SetupHeader, ram_size: int) -> tuple[int, int]:
    """Return where to load the kernel, and the end of the memory that it needs before it can read the memory map.

    A relocatable kernel runs at its load address rounded up to its alignment, any other at pref_address, wherever it
    was loaded (boot.rst, init_size). The preferred address saves a relocatable kernel a move.
    """
    ram_end = layout.low_ram_end(ram_size)
    choices = []
    if header.relocatable:
        if header.pref_address >= layout.HIGH_MEMORY and header.pref_address % header.kernel_alignment == 0:
            choices.append((header.pref_address, header.pref_address))
        choices.append((layout.HIGH_MEMORY, layout.align_up(layout.HIGH_MEMORY, header.kernel_alignment)))
    else:
        choices.append((layout.HIGH_MEMORY, header.pref_address))
    ends = [max(load + header.payload_size, run + header.init_size) for load, run in choices]
    for (load, _), end in zip(choices, ends, strict=True):
        if end <= ram_end:
            return load, end
    raise BootError(
        image=name,
        reason=f"it needs RAM up to {min(ends):#x}, and of {layout.size_text(ram_size)} what lies below 4 GiB ends at "
        f"{ram_end:#x}; give the machine at least {layout.size_text(layout.align_up(min(ends), layout.MIB))}",
    )


def _boot_params(header: SetupHeader, address: int, ramdisk: tuple[int, int], rsdp: int, ram_size: int) -> Data:
    page = bytearray(layout.PAGE)
    page[_SETUP_START : _SETUP_START + len(header.raw)] = header.raw
    struct.pack_into("<Q", page, 0x070, rsdp)
    struct.pack_into("<H", page, 0x1FA, _VIDEO_NORMAL)
    page[0x210] = _LOADER_UNDEFINED
    struct.pack_into("<III", page, 0x214, address, *ramdisk)
    struct.pack_into("<I", page, 0x228, layout.COMMAND_LINE)
    ranges = tables.memory_map(ram_size)
    page[_E820_COUNT] = len(ranges)
    for n, entry in enumerate(ranges):
        struct.pack_into("<QQI", page, _E820_TABLE + 20 * n, entry.address, entry.size, entry.type)
    return Data(layout.BOOT_PARAMS, bytes(page))


def _page_tables() -> Data:
    """Return PML4, PDPT and four page directories that map 4 GiB one to one in pages of 2 MiB.

    The protocol asks for the kernel with init_size, boot_params and the command line; they all lie below 3 GiB.
    """
    present_write, large = 0x3, 0x80
    pdpt = layout.PAGE_TABLES + layout.PAGE
    directories = [pdpt + layout.PAGE * (n + 1) for n in range(4)]
    pml4_entries = struct.pack("<Q", pdpt | present_write).ljust(layout.PAGE, b"\0")
    pdpt_entries = struct.pack("<4Q", *(at | present_write for at in directories)).ljust(layout.PAGE, b"\0")
    pages = struct.pack("<2048Q", *(n << 21 | present_write | large for n in range(2048)))
    return Data(layout.PAGE_TABLES, pml4_entries + pdpt_entries + pages)
