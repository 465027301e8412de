from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from tests.hw.boot.images import MIB, elf, memory_of, note, source
from vmm.errors import BootError
from vmm.hw.boot import layout
from vmm.hw.boot.pvh import plan_pvh
from vmm.hw.boot.tables import firmware_tables

if TYPE_CHECKING:
    from vmm.hw.boot.plan import BootPlan

RAM = 16 * MIB
INFO = struct.Struct("<4I4Q2I")


def plan(image: bytes, *, initrd: bytes | None = None, cmdline: str = "", ram: int = RAM) -> BootPlan:
    return plan_pvh(
        source(image), None if initrd is None else source(initrd, "initrd"), cmdline, ram, firmware_tables(1, None)
    )


def refusal(image: bytes, *, initrd: bytes | None = None, cmdline: str = "", ram: int = RAM) -> str:
    with pytest.raises(BootError) as caught:
        plan(image, initrd=initrd, cmdline=cmdline, ram=ram)
    text = str(caught.value)
    assert text.startswith("Cannot boot kernel: ")
    return text.removeprefix("Cannot boot kernel: ")


@pytest.mark.parametrize("bits", [32, 64])
def test_a_segment_is_loaded_and_its_rest_cleared(bits: int) -> None:
    memory = memory_of(plan(elf(bits=bits, content=b"code", memory_size=10)), RAM)
    assert memory[MIB : MIB + 11] == b"code" + bytes(6) + b"\xee"


@pytest.mark.parametrize("width", [4, 8])
def test_the_entry_is_that_of_the_note(width: int) -> None:
    start = plan(elf(notes=note(7, name=b"GNU\0") + note(MIB + 16, width))).start
    assert (start.mode, start.rip, start.rbx) == ("protected", MIB + 16, layout.START_INFO)


def test_registers_are_those_of_the_abi() -> None:
    start = plan(elf()).start
    assert (start.cr0, start.cr3, start.cr4, start.efer, start.rflags) == (0x11, 0, 0, 0, 2)
    assert (start.code.base, start.code.limit, start.code.db, start.code.type) == (0, 0xFFFFFFFF, 1, 0xB)
    assert (start.data.base, start.data.limit, start.data.type) == (0, 0xFFFFFFFF, 3)
    assert start.task is not None
    assert (start.task.base, start.task.limit, start.task.type) == (0, 0x67, 0xB)


def test_the_start_info_leads_to_command_line_and_memory_map() -> None:
    memory = memory_of(plan(elf(), cmdline="region=4M"), RAM)
    magic, version, _, modules, module_list, line, rsdp, map_at, entries, _ = INFO.unpack_from(
        memory, layout.START_INFO
    )
    assert (magic, version, modules, module_list, rsdp, entries) == (0x336EC578, 1, 0, 0, 0, 3)
    assert memory[line:].startswith(b"region=4M\0")
    assert list(struct.iter_unpack("<QQII", memory[map_at : map_at + 72])) == [
        (0, 0x9FC00, 1, 0),
        (0x9FC00, 0x400, 2, 0),
        (MIB, RAM - MIB, 1, 0),
    ]


def test_an_initrd_is_the_first_module() -> None:
    memory = memory_of(plan(elf(), initrd=b"initrd"), RAM)
    fields = INFO.unpack_from(memory, layout.START_INFO)
    at, size, line, _ = struct.unpack_from("<4Q", memory, fields[4])
    assert (fields[3], at, size, line) == (1, RAM - 4096, 6, 0)
    assert memory[at : at + 6] == b"initrd"


def test_an_initrd_does_not_reach_into_the_kernel() -> None:
    assert refusal(elf(memory_size=14 * MIB), initrd=bytes(2 * MIB)) == (
        "initrd initrd has 2 MiB, and of 16 MiB of RAM the kernel leaves it 1 MiB; give the machine at least 17 MiB"
    )


def test_without_the_note_there_is_no_entry() -> None:
    assert refusal(elf(notes=note(1, kind=17))) == (
        "it is an ELF file without a PVH entry (note XEN_ELFNOTE_PHYS32_ENTRY); a Linux kernel has one if built with "
        "CONFIG_PVH, or boot its bzImage"
    )


def test_a_note_that_is_not_whole_is_none() -> None:
    assert "without a PVH entry" in refusal(elf(notes=note(MIB)[:-2]))
    assert "without a PVH entry" in refusal(elf(notes=struct.pack("<3I", 0xFFFFFFFF, 0xFFFFFFFF, 18)))


def test_another_machine() -> None:
    assert refusal(elf(machine=183)) == "it is an ELF file for machine 183; 62 (x86) would be right for its class"


def test_another_class() -> None:
    image = bytearray(elf())
    image[5] = 2
    assert refusal(bytes(image)) == "it is an ELF file, but not one of 32 or 64 bits, little endian"


def test_cut_off_in_the_elf_header() -> None:
    assert refusal(elf()[:40]) == "it is truncated: its ELF header is not whole"


def test_cut_off_in_the_program_headers() -> None:
    assert refusal(elf()[:100]) == "it is truncated: its program headers lie beyond byte 100"


def test_too_many_program_headers() -> None:
    assert refusal(elf(count=257)) == "it has 257 program headers of 56 bytes; 1 to 256 of 56 would be right"


def test_cut_off_in_a_segment() -> None:
    image = elf()
    assert refusal(image[:-1]) == (
        f"it is truncated: its segment at 0x100000 ends at byte {len(image)}, the file at {len(image) - 1}"
    )


def test_more_in_the_file_than_in_memory() -> None:
    assert refusal(elf(memory_size=63)) == "its segment at 0x100000 has 64 bytes in the file, but room for 63"


def test_a_segment_below_1_mib() -> None:
    assert refusal(elf(address=0x8000)) == "its segment at 0x8000 lies below 1 MiB, where the tables for the guest go"


@pytest.mark.parametrize("address", [RAM - 63, RAM, 1 << 63])
def test_a_segment_beyond_ram(address: int) -> None:
    assert refusal(elf(address=address, notes=note(0))) == (
        f"its segment at {address:#x} ends at {address + 64:#x}, and RAM ends at 0x1000000 (16 MiB of RAM)"
    )


def test_an_entry_outside_every_segment() -> None:
    assert refusal(elf(notes=note(MIB + 64))) == "its PVH entry 0x100040 lies in none of its segments"


def test_a_command_line_that_is_too_long() -> None:
    assert refusal(elf(), cmdline="x" * 65536) == "the command line has 65536 bytes, it takes at most 65535"
