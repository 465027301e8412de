"""Kernel images made up for tests: as small as the formats allow, and wrong in one place where asked."""

from __future__ import annotations

import struct

from vmm.hw.boot.plan import BinarySource, BootPlan, Data, FileRange, Zeros

MIB = 1 << 20


def bzimage(
    *,
    version: int = 0x020F,
    xloadflags: int = 1,
    relocatable: int = 1,
    alignment: int = 2 * MIB,
    pref_address: int = 16 * MIB,
    init_size: int = 8 * MIB,
    initrd_addr_max: int = 0x7FFF_FFFF,
    cmdline_size: int = 2047,
    payload: bytes = b"kernel" * 100,
) -> bytes:
    """A bzImage with a setup of two sectors; `payload` is padded to 16 bytes."""
    payload += bytes(-len(payload) % 16)
    setup = bytearray(3 * 512)
    setup[0x1F1] = 2
    struct.pack_into("<I", setup, 0x1F4, len(payload) // 16)
    struct.pack_into("<H", setup, 0x1FE, 0xAA55)
    setup[0x200:0x202] = b"\xeb\x6a"
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, version)
    setup[0x211] = 1
    struct.pack_into("<II", setup, 0x22C, initrd_addr_max, alignment)
    setup[0x234] = relocatable
    struct.pack_into("<HI", setup, 0x236, xloadflags, cmdline_size)
    struct.pack_into("<QI", setup, 0x258, pref_address, init_size)
    return bytes(setup) + payload


def note(entry: int, width: int = 4, name: bytes = b"Xen\0", kind: int = 18) -> bytes:
    """An ELF note with the PVH entry."""
    return struct.pack("<3I", len(name), width, kind) + name + entry.to_bytes(width, "little")


def elf(
    *,
    bits: int = 64,
    machine: int | None = None,
    notes: bytes = note(MIB),
    address: int = MIB,
    content: bytes = b"\xf4" * 64,
    memory_size: int | None = None,
    count: int | None = None,
) -> bytes:
    """An ELF image with one note segment and one loaded segment of `content`."""
    wide = bits == 64
    header_size, entry_size = (64, 56) if wide else (52, 32)
    notes_at = header_size + 2 * entry_size
    content_at = notes_at + len(notes)
    memory_size = len(content) if memory_size is None else memory_size
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1, 1]) + bytes(9)
    machine = (62 if wide else 3) if machine is None else machine
    header = struct.pack(
        "<HHIQQQIHHHHHH" if wide else "<HHIIIIIHHHHHH",
        *(2, machine, 1, address, header_size, 0, 0, header_size, entry_size, 2 if count is None else count, 0, 0, 0),
    )
    segments = b""
    for kind, at, where, size, memory in (
        (4, notes_at, 0, len(notes), len(notes)),
        (1, content_at, address, len(content), memory_size),
    ):
        if wide:
            segments += struct.pack("<IIQQQQQQ", kind, 5, at, where, where, size, memory, 4)
        else:
            segments += struct.pack("<8I", kind, at, where, where, size, memory, 5, 4)
    return ident + header + segments + notes + content


def source(data: bytes, name: str = "kernel") -> BinarySource:
    """`data` as a kernel or an initrd."""
    return BinarySource.from_bytes(name, data)


def memory_of(plan: BootPlan, size: int) -> bytes:
    """What `plan` makes of `size` bytes of RAM that were all 0xee."""
    memory = bytearray(b"\xee" * size)
    for write in plan.writes:
        match write:
            case Data():
                memory[write.address : write.address + write.size] = write.data
            case Zeros():
                memory[write.address : write.address + write.size] = bytes(write.size)
            case FileRange():
                raise AssertionError("these tests use bytes")
    assert len(memory) == size, "the plan writes outside RAM"
    return bytes(memory)
