"""RAM at fixed places of a file."""

from __future__ import annotations

import os
import random
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from vmm.errors import GuestPageLost, HostFileRefused
from vmm.hostio import create_ram
from vmm.kvm.memory import HIGH_RAM_START, LOW_RAM_END, PAGE_SIZE, GuestMemory
from vmm.kvm.page_file import PageFile, all_pages, checksum
from vmm.kvm.page_map import PageMap

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

PAGES = 300
AT = 1 << 20
"""Where page 0 is in the file."""


@pytest.fixture
def memory() -> Generator[GuestMemory, None, None]:
    size = PAGES * PAGE_SIZE
    with closing(GuestMemory.from_memfd(create_ram(size, "test"), size)) as made:
        yield made


@pytest.fixture
def file(tmp_path: Path) -> Generator[PageFile, None, None]:
    fd = os.open(tmp_path / "pages", os.O_RDWR | os.O_CREAT)
    yield PageFile(fd, AT, PAGES)
    os.close(fd)


def fill(memory: GuestMemory, *pages: int) -> None:
    for page in pages:
        memory.write(page * PAGE_SIZE, (page + 1).to_bytes(2, "little") * (PAGE_SIZE // 2))


def words(*pages: int) -> PageFile:
    """Return something whose bitmap has these pages."""
    made = PageFile(-1, 0, PAGES)
    for page in pages:
        made.listed[page // 64] |= 1 << page % 64
    return made


def listed(file: PageFile) -> list[int]:
    return [page for page in range(PAGES) if file.listed[page // 64] >> page % 64 & 1]


def save(file: PageFile, memory: GuestMemory, *pages: int) -> tuple[int, int]:
    tally = file.save(memory, words(*(pages or range(PAGES))).listed, 0, PAGES)
    return tally.data, tally.zero


DATA = (1, 2, 63, 64, *range(100, 200), 299)


def test_what_was_saved_is_loaded_and_what_is_zero_takes_no_room(memory: GuestMemory, file: PageFile) -> None:
    fill(memory, *DATA)
    assert save(file, memory) == (len(DATA), PAGES - len(DATA))
    assert listed(file) == list(DATA)
    assert os.fstat(file.fd).st_size == AT + PAGES * PAGE_SIZE
    assert os.fstat(file.fd).st_blocks * 512 <= (len(DATA) + 64) * PAGE_SIZE
    before = memory.read(0, memory.size)
    memory.clear()
    assert file.load(memory, 0, PAGES).data == len(DATA)
    assert memory.read(0, memory.size) == before


def test_pieces_are_saved_and_loaded_alone(memory: GuestMemory, file: PageFile) -> None:
    fill(memory, *DATA)
    every = words(*range(PAGES)).listed
    file.save(memory, every, 64, 64)
    assert listed(file) == [64, *range(100, 128)]
    memory.clear()
    file.load(memory, 128, 172)
    assert not any(memory.read(0, memory.size))
    file.load(memory, 64, 64)
    assert memory.read(100 * PAGE_SIZE, 2) == (101).to_bytes(2, "little")


def test_a_page_is_written_again_in_its_place_or_is_a_hole_again(memory: GuestMemory, file: PageFile) -> None:
    fill(memory, *DATA)
    save(file, memory)
    length = os.fstat(file.fd).st_size
    memory.write(0, b"fresh")
    memory.write(64 * PAGE_SIZE, bytes(PAGE_SIZE))
    memory.write(150 * PAGE_SIZE, b"changed")
    assert save(file, memory, 0, 64, 150) == (2, 1)
    assert os.fstat(file.fd).st_size == length
    assert listed(file) == sorted({0, *DATA} - {64})
    assert not any(os.pread(file.fd, PAGE_SIZE, AT + 64 * PAGE_SIZE))
    before = memory.read(0, memory.size)
    memory.clear()
    file.load(memory, 0, PAGES)
    assert memory.read(0, memory.size) == before


def test_a_damaged_page_is_named(memory: GuestMemory, file: PageFile) -> None:
    fill(memory, *DATA)
    save(file, memory)
    os.pwrite(file.fd, b"!", AT + 170 * PAGE_SIZE + 5)
    wanted = rf"RAM at 0xaa000 from .*, offset {AT + 170 * PAGE_SIZE}: it is damaged: its checksum is 0x"
    for read in (file.load, file.check):
        with pytest.raises(GuestPageLost, match=wanted) as caught:
            read(memory, 0, PAGES)
        assert caught.value.damaged


def test_a_file_that_ends_early_is_named(memory: GuestMemory, file: PageFile) -> None:
    fill(memory, *DATA)
    save(file, memory)
    os.ftruncate(file.fd, AT + 170 * PAGE_SIZE)
    with pytest.raises(GuestPageLost, match="the file ends before it") as caught:
        file.check(memory, 0, PAGES)
    assert not caught.value.damaged


def test_a_file_that_cannot_be_written_is_named(memory: GuestMemory, tmp_path: Path) -> None:
    fill(memory, *DATA)
    (tmp_path / "pages").touch()
    fd = os.open(tmp_path / "pages", os.O_RDONLY)
    try:
        with pytest.raises(HostFileRefused, match=r"Cannot write .*/pages: Bad file descriptor"):
            save(PageFile(fd, AT, PAGES), memory)
    finally:
        os.close(fd)


@pytest.mark.parametrize("pages", [300, 64 * 256])
def test_a_hole_that_cannot_be_made_is_named_whoever_finds_the_zeros(pages: int, tmp_path: Path) -> None:
    path = tmp_path / "pages"
    path.touch()
    fd = os.open(path, os.O_RDONLY)
    try:
        with closing(GuestMemory.from_memfd(create_ram(pages * PAGE_SIZE, "test"), pages * PAGE_SIZE)) as memory:
            file = PageFile(fd, AT, pages)
            file.listed_bytes()[:] = bytes([255]) * len(file.listed_bytes())
            with pytest.raises(HostFileRefused, match=r"Cannot write .*/pages: Bad file descriptor"):
                file.save(memory, all_pages(pages), 0, pages)
    finally:
        os.close(fd)


def test_what_two_threads_found_together_is_what_one_would_have(tmp_path: Path) -> None:
    chance, pages = random.Random(5), 64 * 256
    with (
        closing(GuestMemory.from_memfd(create_ram(pages * PAGE_SIZE, "test"), pages * PAGE_SIZE)) as memory,
        (tmp_path / "pages").open("wb+") as opened,
    ):
        file = PageFile(opened.fileno(), 0, pages)
        expected = {}
        for stamp in range(3):
            changed = sorted(chance.sample(range(pages), pages // 2))
            wanted = PageMap(pages)
            for page in changed:
                expected[page] = bytes([chance.choice((0, stamp + 1))]) * 8
                memory.write(page * PAGE_SIZE, expected[page])
                wanted.add(page)
            tally = file.save(memory, wanted.words, 0, pages)
            zeros = sum(not any(expected[page]) for page in changed)
            assert (tally.data, tally.zero) == (len(changed) - zeros, zeros)
        listed = PageMap(pages)
        listed.load(bytes(file.listed_bytes()))
        assert {page for first, count in listed.runs() for page in range(first, first + count)} == {
            page for page, content in expected.items() if any(content)
        }
        assert file.check(memory, 0, pages).data == len(listed)  # every checksum
        for page, content in expected.items():
            assert os.pread(file.fd, 8, page * PAGE_SIZE) in (content, b"")  # it may end in a hole


def test_the_checksum_is_crc_32c() -> None:
    assert checksum(b"123456789") == 0xE3069283
    assert checksum(b"6789", checksum(b"12345")) == 0xE3069283
    assert checksum(bytes(32)) == 0x8A9136AA


def test_an_address_is_found_in_both_regions() -> None:
    size = LOW_RAM_END + PAGE_SIZE
    with closing(GuestMemory.from_memfd(create_ram(size, "test"), size)) as memory:
        assert memory.address_of(4096) == 4096
        assert memory.address_of(LOW_RAM_END) == HIGH_RAM_START
