"""Guest memory over a memfd."""

from __future__ import annotations

import fcntl
import os
from contextlib import closing

import pytest

from vmm.errors import DescriptorWrongKind, GuestAddressInvalid, OptionInvalid
from vmm.hostio import create_ram
from vmm.kvm.memory import PAGE_SIZE, GuestMemory, Region, ram_layout

GIB = 1 << 30


def test_ram_up_to_3_gib_is_one_region() -> None:
    assert ram_layout(3 * GIB) == (Region(0, 3 * GIB, 0),)


def test_more_ram_goes_on_at_4_gib() -> None:
    assert ram_layout(3 * GIB + 4096) == (Region(0, 3 * GIB, 0), Region(4 * GIB, 4096, 3 * GIB))


@pytest.mark.parametrize("size", [0, -4096, 4095])
def test_a_size_that_is_no_multiple_of_a_page_is_refused(size: int) -> None:
    with pytest.raises(OptionInvalid) as caught:
        ram_layout(size)
    assert str(caught.value) == f"memory size: {size} is not a positive multiple of 4096"


def test_what_is_written_is_read_on_both_sides_of_the_gap_and_is_in_the_memfd() -> None:
    memory = GuestMemory.from_memfd(create_ram(4 * GIB, "test"), 4 * GIB)
    try:
        memory.write(3 * GIB - 3, b"low")
        memory.write(4 * GIB, memoryview(b"high"))
        assert memory.read(3 * GIB - 3, 3) == b"low"
        assert memory.read(4 * GIB, 4) == b"high"
        assert os.pread(memory.fd, 7, 3 * GIB - 3) == b"lowhigh"
        assert memory.hva(3 * GIB) - memory.hva(0) == 3 * GIB
    finally:
        memory.close()


@pytest.mark.parametrize(
    ("address", "size"), [(3 * GIB - 1, 2), (3 * GIB, 1), (4 * GIB - 1, 1), (4 * GIB + 4095, 2), (-1, 1), (0, -1)]
)
def test_an_access_that_is_not_all_ram_is_refused_whole(address: int, size: int) -> None:
    memory = GuestMemory.from_memfd(create_ram(3 * GIB + 4096, "test"), 3 * GIB + 4096)
    try:
        with pytest.raises(GuestAddressInvalid) as caught:
            memory.read(address, size)
        assert str(caught.value) == (
            f"{size} bytes at guest address {address:#x} are not all RAM, "
            "which is at 0x0 to 0xbfffffff and 0x100000000 to 0x100000fff"
        )
        if size >= 0:
            with pytest.raises(GuestAddressInvalid):
                memory.write(address, bytes(size))
    finally:
        memory.close()


def test_a_write_that_does_not_fit_changes_nothing() -> None:
    memory = GuestMemory.from_memfd(create_ram(4096, "test"), 4096)
    try:
        with pytest.raises(GuestAddressInvalid):
            memory.write(4094, b"abc")
        assert memory.read(4094, 2) == b"\0\0"
    finally:
        memory.close()


def test_a_memfd_that_is_too_short_is_refused_and_closed() -> None:
    fd = create_ram(4096, "test")
    with pytest.raises(DescriptorWrongKind) as caught:
        GuestMemory.from_memfd(fd, 8192)
    assert str(caught.value) == "Descriptor 'ram' is 4096 bytes long, not 8192 bytes or more"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_closing_twice_closes_once() -> None:
    memory = GuestMemory.from_memfd(create_ram(4096, "test"), 4096)
    memory.close()
    other = os.dup(0)
    memory.close()
    os.fstat(other)
    os.close(other)


def test_ram_can_neither_shrink_nor_grow_and_is_closed_on_exec() -> None:
    fd = create_ram(4096, "test")
    try:
        for size in (0, 8192):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    finally:
        os.close(fd)


# --- what is in it ----------------------------------------------------------------------------------------------


def plainly(memory: GuestMemory) -> list[tuple[int, bytes]]:
    """Every page that is not zero, found the slow way."""
    return [
        (region.address + at, page)
        for region in memory.regions
        for at in range(0, region.size, PAGE_SIZE)
        if any(page := memory.read(region.address + at, PAGE_SIZE))
    ]


def found(memory: GuestMemory) -> list[tuple[int, bytes]]:
    """The same, by its runs."""
    return [
        (address + at, bytes(memory.view(address + at, PAGE_SIZE)))
        for address, size in memory.data_runs()
        for at in range(0, size, PAGE_SIZE)
    ]


def test_memory_that_nobody_touched_has_no_runs_and_stays_untouched() -> None:
    with closing(GuestMemory.from_memfd(create_ram(5 << 30, "ram"), 5 << 30)) as memory:
        assert list(memory.data_runs()) == []
        assert os.fstat(memory.fd).st_blocks == 0


def test_runs_are_the_pages_that_are_not_zero() -> None:
    with closing(GuestMemory.from_memfd(create_ram(8 << 20, "ram"), 8 << 20)) as memory:
        for page in (0, 1, 2, 255, 256, 257, 600, 2047):
            memory.write(page * PAGE_SIZE + page % PAGE_SIZE, b"x")
        memory.write(700 * PAGE_SIZE, bytes(PAGE_SIZE))  # touched, and zero
        memory.write(801 * PAGE_SIZE - 1, b"x")  # the last byte
        assert found(memory) == plainly(memory)
        runs = list(memory.data_runs())
        assert [address // PAGE_SIZE for address, _ in runs] == [0, 255, 256, 600, 800, 2047]
        assert all(size <= 1 << 20 for _, size in runs)


def test_runs_beyond_the_hole_have_guest_physical_addresses() -> None:
    size = (3 << 30) + (1 << 20)
    with closing(GuestMemory.from_memfd(create_ram(size, "ram"), size)) as memory:
        memory.write((3 << 30) - 1, b"x")
        memory.write(4 << 30, b"x")
        assert list(memory.data_runs()) == [((3 << 30) - PAGE_SIZE, PAGE_SIZE), (4 << 30, PAGE_SIZE)]


def test_what_is_placed_is_there_and_cleared_memory_is_zero_and_given_back() -> None:
    with closing(GuestMemory.from_memfd(create_ram(8 << 20, "ram"), 8 << 20)) as memory:
        memory.place(5000, b"some bytes")
        assert memory.read(5000, 10) == b"some bytes"
        memory.clear()
        assert memory.read(5000, 10) == bytes(10)
        assert list(memory.data_runs()) == []


def test_nothing_is_placed_or_viewed_outside() -> None:
    with closing(GuestMemory.from_memfd(create_ram(1 << 20, "ram"), 1 << 20)) as memory:
        for address in (-1, (1 << 20) - 1, 1 << 40):
            with pytest.raises(GuestAddressInvalid):
                memory.place(address, b"xx")
            with pytest.raises(GuestAddressInvalid):
                memory.view(address, 2)
