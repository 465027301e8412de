"""Guest memory over a memfd."""

from __future__ import annotations

import fcntl
import os

import pytest

from vmm.errors import DescriptorWrongKind, GuestAddressInvalid, OptionInvalid
from vmm.hostio import create_ram
from vmm.kvm.memory import GuestMemory, Region, ram_layout

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
