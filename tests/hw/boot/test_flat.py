from __future__ import annotations

import pytest

from tests.hw.boot.images import MIB, memory_of, source
from vmm.errors import BootError
from vmm.hw.boot.flat import SIZE_LIMIT, plan_flat
from vmm.hw.boot.tables import firmware_tables


def refusal(image: bytes, *, initrd: bytes | None = None, cmdline: str = "") -> str:
    with pytest.raises(BootError) as caught:
        plan_flat(
            source(image, "a.bin"),
            None if initrd is None else source(initrd, "initrd"),
            cmdline,
            firmware_tables(1, None),
        )
    return str(caught.value)


def test_a_flat_image_lies_at_64_kib_and_starts_there_in_real_mode() -> None:
    plan = plan_flat(source(b"\xf4code", "a.bin"), None, "", firmware_tables(1, None))
    start = plan.start
    assert memory_of(plan, 2 * MIB)[0x10000:].startswith(b"\xf4code\xee")
    assert (start.mode, start.code.selector, start.code.base, start.rip, start.rsp) == (
        "real",
        0x1000,
        0x10000,
        0,
        0x8000,
    )
    assert (start.data.selector, start.data.base, start.data.limit) == (0x1000, 0x10000, 0xFFFF)
    assert (start.cr0, start.efer, start.cr4) == (0x10, 0, 0)


def test_a_flat_image_ends_below_the_ebda() -> None:
    plan = plan_flat(source(b"\xcc" * SIZE_LIMIT, "a.bin"), None, "", firmware_tables(1, None))
    memory = memory_of(plan, 2 * MIB)
    assert memory[0x9FC00 - 1 : 0x9FC04] == b"\xcc_MP_"


@pytest.mark.parametrize("size", [0, SIZE_LIMIT + 1])
def test_a_flat_image_of_impossible_size(size: int) -> None:
    assert refusal(bytes(size)) == (f"Cannot boot a.bin: a flat image has 1 to 588800 bytes (575 KiB), this one {size}")


def test_a_flat_image_takes_no_initrd_and_no_command_line() -> None:
    assert refusal(b"x", initrd=b"i") == "Cannot boot a.bin: a flat image takes no initrd, and initrd was given"
    assert (
        refusal(b"x", cmdline="quiet") == "Cannot boot a.bin: a flat image takes no command line, and 'quiet' was given"
    )
