from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from tests.hw.boot.images import MIB, bzimage, memory_of, source
from vmm.errors import BootError
from vmm.hw.boot import layout
from vmm.hw.boot.bzimage import plan_bzimage, read_setup_header
from vmm.hw.boot.plan import BinarySource, BootPlan, FileRange
from vmm.hw.boot.tables import firmware_tables

RAM = 64 * MIB


def plan(image: bytes, *, initrd: bytes | None = None, cmdline: str = "", ram: int = RAM) -> BootPlan:
    return plan_bzimage(
        source(image), None if initrd is None else source(initrd, "initrd"), cmdline, ram, firmware_tables(1, None)
    )


def refusal(image: bytes, *, initrd: bytes | None = None, cmdline: str = "", ram: int = RAM) -> str:
    with pytest.raises(BootError) as caught:
        plan(image, initrd=initrd, cmdline=cmdline, ram=ram)
    text = str(caught.value)
    assert text.startswith("Cannot boot kernel: ")
    return text.removeprefix("Cannot boot kernel: ")


def boot_params(memory: bytes) -> bytes:
    return memory[layout.BOOT_PARAMS : layout.BOOT_PARAMS + 4096]


# --- what the kernel finds ---------------------------------------------------------------------------------------


def test_a_relocatable_kernel_goes_to_its_preferred_address() -> None:
    made = plan(bzimage(payload=b"x" * 320))
    assert memory_of(made, RAM)[16 * MIB :].startswith(b"x" * 320 + b"\xee")
    assert (made.start.rip, made.start.rsi) == (16 * MIB + 0x200, layout.BOOT_PARAMS)


def test_a_relocatable_kernel_goes_to_1_mib_where_the_preferred_address_does_not_fit() -> None:
    made = plan(bzimage(), ram=20 * MIB)
    assert made.start.rip == MIB + 0x200
    assert int.from_bytes(boot_params(memory_of(made, 20 * MIB))[0x214:0x218], "little") == MIB


def test_a_kernel_that_is_not_relocatable_goes_to_1_mib() -> None:
    assert plan(bzimage(relocatable=0)).start.rip == MIB + 0x200


def test_the_setup_header_reaches_boot_params_and_nothing_around_it() -> None:
    image = bytearray(bzimage())
    image[0x1E8] = image[0x1EF] = image[0x270] = 0xCC  # before, the sentinel, and behind the header
    params = boot_params(memory_of(plan(bytes(image)), RAM))
    assert params[0x202:0x208] == b"HdrS\x0f\x02"
    assert (params[0x1EF], params[0x270]) == (0, 0)
    assert params[0x210] == 0xFF
    assert struct.unpack_from("<II", params, 0x218) == (0, 0)


def test_the_command_line_ends_in_a_zero_where_boot_params_says() -> None:
    memory = memory_of(plan(bzimage(), cmdline="console=ttyS0 quiet"), RAM)
    (at,) = struct.unpack_from("<I", boot_params(memory), 0x228)
    assert memory[at:].startswith(b"console=ttyS0 quiet\0")


def test_the_memory_map_has_low_memory_ebda_and_ram() -> None:
    params = boot_params(memory_of(plan(bzimage()), RAM))
    assert params[0x1E8] == 3
    assert list(struct.iter_unpack("<QQI", params[0x2D0 : 0x2D0 + 60])) == [
        (0, 0x9FC00, 1),
        (0x9FC00, 0x400, 2),
        (MIB, RAM - MIB, 1),
    ]


def test_ram_beyond_3_gib_appears_above_4_gib() -> None:
    made = plan(bzimage(), ram=5 << 30)
    (params,) = [bytes(write.data) for write in made.writes if write.address == layout.BOOT_PARAMS]  # type: ignore[union-attr]
    assert params[0x1E8] == 4
    assert struct.unpack_from("<QQI", params, 0x2D0 + 60) == (4 << 30, 2 << 30, 1)


def test_an_initrd_lies_page_aligned_at_the_end_of_ram() -> None:
    memory = memory_of(plan(bzimage(), initrd=b"initrd" * 1000), RAM)
    at, size = struct.unpack_from("<II", boot_params(memory), 0x218)
    assert (at, size) == (RAM - 8192, 6000)
    assert memory[at : at + size] == b"initrd" * 1000


def test_an_initrd_lies_below_the_limit_of_the_kernel() -> None:
    memory = memory_of(plan(bzimage(initrd_addr_max=32 * MIB - 1), initrd=b"i"), RAM)
    assert struct.unpack_from("<I", boot_params(memory), 0x218) == (32 * MIB - 4096,)


def test_the_first_4_gib_are_mapped_one_to_one() -> None:
    made = plan(bzimage())
    memory = memory_of(made, RAM)

    def entry(table: int, index: int) -> int:
        return int(struct.unpack_from("<Q", memory, table + 8 * index)[0])

    assert made.start.cr3 == layout.PAGE_TABLES
    for address in (0, 0x20_0000, 0x1234_5678, 0xFFFF_FFFF):
        pdpt = entry(made.start.cr3, address >> 39)
        directory = entry(pdpt & ~0xFFF, address >> 30)
        page = entry(directory & ~0xFFF, address >> 21 & 0x1FF)
        assert (pdpt & 3, directory & 3, page & 0x83) == (3, 3, 0x83)
        assert page & ~0xFFF == address & ~0x1F_FFFF
    assert entry(entry(made.start.cr3, 0) & ~0xFFF, 4) == 0


def test_the_processor_starts_in_long_mode_with_the_gdt_of_the_protocol() -> None:
    made = plan(bzimage())
    start = made.start
    assert (start.mode, start.cr0, start.cr4, start.efer) == ("long", 0x8000_0011, 0x20, 0x500)
    assert (start.code.selector, start.data.selector, start.rflags) == (0x10, 0x18, 2)
    memory = memory_of(made, RAM)
    assert struct.unpack_from("<2Q", memory, start.gdt.start + 0x10) == (0x00AF9B000000FFFF, 0x00CF93000000FFFF)


def test_a_file_is_named_and_not_copied(tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(bzimage(payload=b"x" * 320))
    with path.open("rb") as file:
        made = plan_bzimage(BinarySource.from_fd("vmlinuz", file.fileno()), None, "", RAM, firmware_tables(1, None))
        assert [write for write in made.writes if isinstance(write, FileRange)] == [
            FileRange(16 * MIB, file.fileno(), 1536, 320, "vmlinuz")
        ]


# --- refusals ----------------------------------------------------------------------------------------------------


def test_no_bzimage() -> None:
    assert refusal(bytes(4096)) == "it is no bzImage: 'HdrS' is missing at byte 0x202"


def test_cut_off_in_the_header() -> None:
    assert refusal(bzimage()[:0x250]) == "it is truncated: 592 bytes do not hold a setup header"


def test_cut_off_in_the_kernel() -> None:
    assert refusal(bzimage(payload=bytes(1600))[:-1]) == (
        "it is truncated: its header promises 3136 bytes, the file has 3135"
    )


def test_a_header_that_promises_nothing() -> None:
    assert refusal(bzimage(payload=b"")) == "it is truncated: its header promises 1536 bytes, the file has 1536"


@pytest.mark.parametrize(("version", "text"), [(0x020B, "2.11"), (0x0210, "2.16"), (0x0300, "3.00"), (0, "0.00")])
def test_a_protocol_older_or_newer_than_known(version: int, text: str) -> None:
    assert refusal(bzimage(version=version)) == f"it speaks boot protocol {text}, and 2.12 to 2.15 are known here"


def test_a_32_bit_kernel() -> None:
    assert refusal(bzimage(xloadflags=0)) == (
        "it has no 64-bit entry (XLF_KERNEL_64); a kernel built for x86-64 has one"
    )


def test_a_header_of_impossible_length() -> None:
    image = bytearray(bzimage())
    image[0x201] = 0xFF
    assert refusal(bytes(image)) == "its setup header ends at 0x301; 0x264 to 0x290 would be right"


def test_an_alignment_that_is_none() -> None:
    assert refusal(bzimage(alignment=0x300000)) == "its kernel_alignment 0x300000 is not a power of two"


def test_a_kernel_larger_than_ram() -> None:
    assert refusal(bzimage(init_size=63 * MIB)) == (
        "it needs RAM up to 0x4100000, and of 64 MiB what lies below 4 GiB ends at 0x4000000; "
        "give the machine at least 65 MiB"
    )


def test_an_initrd_larger_than_what_the_kernel_leaves() -> None:
    assert refusal(bzimage(), initrd=bytes(41 * MIB)) == (
        "initrd initrd has 41 MiB, and of 64 MiB of RAM the kernel leaves it 40 MiB; give the machine at least 65 MiB"
    )


def test_an_initrd_larger_than_what_the_kernel_ever_takes() -> None:
    assert refusal(bzimage(initrd_addr_max=32 * MIB - 1), initrd=bytes(9 * MIB)) == (
        "initrd initrd has 9 MiB, and of 64 MiB of RAM the kernel leaves it 8 MiB; "
        "no amount of RAM helps, because an initrd must lie below 32 MiB"
    )


def test_an_empty_initrd() -> None:
    assert refusal(bzimage(), initrd=b"") == "initrd initrd is empty"


def test_a_command_line_that_is_too_long() -> None:
    plan(bzimage(cmdline_size=10), cmdline="x" * 10)
    assert refusal(bzimage(cmdline_size=10), cmdline="x" * 11) == "the command line has 11 bytes, it takes at most 10"


def test_a_command_line_with_a_zero() -> None:
    assert refusal(bzimage(), cmdline="a\0b") == "the command line contains a zero byte, where it would end"


# --- a real one --------------------------------------------------------------------------------------------------

REAL = os.environ.get("VMM_TEST_KERNEL", "")

if REAL:

    def test_a_distribution_kernel_is_planned() -> None:
        with Path(REAL).open("rb") as file:
            kernel = BinarySource.from_fd(REAL, file.fileno())
            header = read_setup_header(kernel)
            made = plan_bzimage(kernel, None, "console=ttyS0", 1 << 30, firmware_tables(2, None))
        assert header.relocatable
        assert made.start.rip == header.pref_address + 0x200

    def test_a_truncated_distribution_kernel_is_refused() -> None:
        with Path(REAL).open("rb") as file:
            half = file.read(os.fstat(file.fileno()).st_size // 2)
        assert refusal(half).startswith("it is truncated: its header promises ")
