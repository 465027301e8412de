"""ELF images with a PVH entry: uncompressed Linux kernels (CONFIG_PVH), and the built-in guests.

Source: Xen, docs/misc/pvh.pandoc (registers at entry), public/arch-x86/hvm/start_info.h (start info, version 1),
public/elfnote.h (XEN_ELFNOTE_PHYS32_ENTRY); ELF: System V gABI, chapters 4 and 5.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple, final

import attrs

from vmm.errors import BootError
from vmm.hw.boot import layout, tables
from vmm.hw.boot.initrd import place_initrd
from vmm.hw.boot.plan import CODE_TYPE, BootPlan, CpuStart, Data, Segment, Zeros

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.hw.boot.plan import BinarySource, Write

ELF_MAGIC: Final = b"\x7fELF"

_PT_LOAD: Final = 1
_PT_NOTE: Final = 4
_HEADERS_LIMIT: Final = 256  # program headers; Linux has five
_NOTES_LIMIT: Final = 64 * layout.KIB
_PHYS32_ENTRY: Final = 18
_START_MAGIC: Final = 0x336E_C578
_START_INFO: Final = struct.Struct("<4I4Q2I")
_MODULE: Final = struct.Struct("<4Q")
_MAP_ENTRY: Final = struct.Struct("<2Q2I")
_CR0_PE: Final = 1 << 0
_CR0_ET: Final = 1 << 4

CODE_32: Final = Segment(selector=0x10, type=CODE_TYPE, db=1, g=1)


class _Format(NamedTuple):
    """What differs between ELF32 and ELF64."""

    machine: int
    header: struct.Struct  # from e_type to e_phnum
    segment: struct.Struct
    fields: tuple[int, ...]  # places of p_type, p_offset, p_paddr, p_filesz, p_memsz, p_align in a program header


_FORMATS: Final = (
    _Format(3, struct.Struct("<HHIIIIIHHH"), struct.Struct("<8I"), (0, 1, 3, 4, 5, 7)),
    _Format(62, struct.Struct("<HHIQQQIHHH"), struct.Struct("<IIQQQQQQ"), (0, 2, 4, 5, 6, 7)),
)


@final
@attrs.frozen
class _ProgramHeader:
    type: int
    offset: int
    address: int
    file_size: int
    memory_size: int
    align: int


def plan_pvh(
    kernel: BinarySource, initrd: BinarySource | None, cmdline: str, ram_size: int, firmware: tables.FirmwareTables
) -> BootPlan:
    """Plan the start of an ELF image at its PVH entry: 32-bit protected mode, flat segments, EBX at the start info.

    Raises:
        BootError: malformed, truncated or without PVH note; does not fit into RAM; the initrd does not; the
            command line is too long.
    """
    headers = _program_headers(kernel)
    entry = _pvh_entry(kernel, headers)
    loads = [header for header in headers if header.type == _PT_LOAD and header.memory_size]
    writes: list[Write] = [*firmware.writes]
    for header in loads:
        _check_segment(kernel, header, ram_size)
        if header.file_size:
            writes.append(kernel.place(header.address, header.offset, header.file_size))
        if header.memory_size > header.file_size:
            writes.append(Zeros(header.address + header.file_size, header.memory_size - header.file_size))
    if not any(header.address <= entry < header.address + header.memory_size for header in loads):
        raise BootError(image=kernel.name, reason=f"its PVH entry {entry:#x} lies in none of its segments")
    modules = b""
    if initrd is not None:
        kernel_end = max(header.address + header.memory_size for header in loads)
        address = place_initrd(kernel.name, initrd, kernel_end, ram_size)
        writes.append(initrd.place(address, 0, initrd.size))
        modules = _MODULE.pack(address, initrd.size, 0, 0)
    line = tables.encode_command_line(kernel.name, cmdline, layout.COMMAND_LINE_ROOM - 1)
    gdt, gdt_range = tables.gdt(CODE_32)
    writes += [gdt, Data(layout.COMMAND_LINE, line), _start_info(modules, firmware.rsdp, ram_size)]
    return BootPlan(
        kind="pvh",
        image=kernel.name,
        writes=tuple(writes),
        start=CpuStart(
            mode="protected",
            rip=entry,
            rbx=layout.START_INFO,
            cr0=_CR0_PE | _CR0_ET,
            code=CODE_32,
            data=tables.FLAT_DATA,
            task=tables.TASK,
            gdt=gdt_range,
        ),
    )


def _program_headers(kernel: BinarySource) -> list[_ProgramHeader]:
    ident = kernel.read(0, 16)
    if ident[:4] != ELF_MAGIC or len(ident) < 16 or ident[4] not in (1, 2) or ident[5] != 1:
        raise BootError(image=kernel.name, reason="it is an ELF file, but not one of 32 or 64 bits, little endian")
    form = _FORMATS[ident[4] - 1]
    raw = kernel.read(16, form.header.size)
    if len(raw) < form.header.size:
        raise BootError(image=kernel.name, reason="it is truncated: its ELF header is not whole")
    _, machine, _, _, table, _, _, _, entry_size, count = form.header.unpack(raw)
    if machine != form.machine:
        raise BootError(
            image=kernel.name,
            reason=f"it is an ELF file for machine {machine}; {form.machine} (x86) would be right for its class",
        )
    if entry_size != form.segment.size or not 0 < count <= _HEADERS_LIMIT:
        raise BootError(
            image=kernel.name,
            reason=f"it has {count} program headers of {entry_size} bytes; "
            f"1 to {_HEADERS_LIMIT} of {form.segment.size} would be right",
        )
    raw = kernel.read(table, count * entry_size)
    if len(raw) < count * entry_size:
        raise BootError(image=kernel.name, reason=f"it is truncated: its program headers lie beyond byte {kernel.size}")
    return [_ProgramHeader(*(fields[at] for at in form.fields)) for fields in form.segment.iter_unpack(raw)]


def _pvh_entry(kernel: BinarySource, headers: list[_ProgramHeader]) -> int:
    for header in headers:
        if header.type != _PT_NOTE:
            continue
        if header.file_size > _NOTES_LIMIT:
            raise BootError(
                image=kernel.name,
                reason=f"it has {header.file_size} bytes of ELF notes, at most {_NOTES_LIMIT} are read",
            )
        notes = kernel.read(header.offset, header.file_size)
        for name, kind, content in _notes(notes, 8 if header.align == 8 else 4):
            if name == b"Xen\0" and kind == _PHYS32_ENTRY and len(content) >= 4:
                return int.from_bytes(content[:4], "little")  # Linux stores 8 bytes, of which the upper 4 are zero
    raise BootError(
        image=kernel.name,
        reason="it is an ELF file without a PVH entry (note XEN_ELFNOTE_PHYS32_ENTRY); a Linux kernel has one if built "
        "with CONFIG_PVH, or boot its bzImage",
    )


def _notes(raw: bytes, align: int) -> Iterator[tuple[bytes, int, bytes]]:
    """Yield name, type and content of each whole note."""
    at = 0
    while at + 12 <= len(raw):
        name_size, content_size, kind = struct.unpack_from("<3I", raw, at)
        name = raw[at + 12 : at + 12 + name_size]
        start = at + layout.align_up(12 + name_size, align)
        if start + content_size > len(raw):
            return
        yield name, kind, raw[start : start + content_size]
        at = start + layout.align_up(content_size, align)


def _start_info(modules: bytes, rsdp: int, ram_size: int) -> Data:
    """Return start info, module list and memory map, one behind the other from START_INFO."""
    ranges = tables.memory_map(ram_size)
    module_list = layout.START_INFO + _START_INFO.size
    map_at = module_list + len(modules)
    info = _START_INFO.pack(
        _START_MAGIC,
        1,  # version: with a memory map
        0,
        len(modules) // _MODULE.size,
        module_list if modules else 0,
        layout.COMMAND_LINE,
        rsdp,
        map_at,
        len(ranges),
        0,
    )
    entries = b"".join(_MAP_ENTRY.pack(entry.address, entry.size, entry.type, 0) for entry in ranges)
    return Data(layout.START_INFO, info + modules + entries)


def _check_segment(kernel: BinarySource, header: _ProgramHeader, ram_size: int) -> None:
    where = f"its segment at {header.address:#x}"
    if header.file_size > header.memory_size:
        raise BootError(
            image=kernel.name,
            reason=f"{where} has {header.file_size} bytes in the file, but room for {header.memory_size}",
        )
    if header.offset + header.file_size > kernel.size:
        raise BootError(
            image=kernel.name,
            reason=f"it is truncated: {where} ends at byte {header.offset + header.file_size}, "
            f"the file at {kernel.size}",
        )
    if header.address < layout.HIGH_MEMORY:
        raise BootError(image=kernel.name, reason=f"{where} lies below 1 MiB, where the tables for the guest go")
    end = header.address + header.memory_size
    if end > layout.low_ram_end(ram_size):
        raise BootError(
            image=kernel.name,
            reason=f"{where} ends at {end:#x}, and RAM ends at {layout.low_ram_end(ram_size):#x} "
            f"({layout.size_text(ram_size)} of RAM)",
        )
