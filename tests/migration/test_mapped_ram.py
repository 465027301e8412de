"""The records of RAM at fixed places, and a stream that goes on behind them."""

from __future__ import annotations

import os
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.errors import StreamCorrupt
from vmm.hostio import create_ram
from vmm.kvm.memory import PAGE_SIZE, GuestMemory
from vmm.kvm.page_map import PageMap
from vmm.migration.mapped_file import MappedFile
from vmm.migration.mapped_ram import MappedReader
from vmm.migration.ram_file_records import RamMapped, RamMappedSums
from vmm.migration.section_payload import Misshapen
from vmm.migration.stream import HEAD_SIZE, StreamReader, StreamWriter
from vmm.migration.stream_records import End, Section

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from vmm.migration.stream_records import Record

EXTENTS = ((0, 3 << 30), (4 << 30, 1 << 20))
SIZE = 100 * PAGE_SIZE


@given(at=st.integers(0, 1 << 40), start=st.integers(0, 1 << 40), pages=st.integers(1, 1 << 28))
def test_a_map_is_laid_out_behind_its_record_and_read_back(at: int, start: int, pages: int) -> None:
    record = RamMapped.after(at, ((0, pages * PAGE_SIZE),), start)
    assert RamMapped.decode(record.payload()) == record
    assert record.pages == pages
    assert at + len(record.payload()) <= record.bitmap
    assert (start + record.area) % (1 << 20) == 0
    assert record.onward == record.area + pages * PAGE_SIZE


def test_a_map_of_two_extents_has_their_pages_in_one_row() -> None:
    record = RamMapped.after(1000, EXTENTS, 0)
    assert record.pages == (3 << 18) + 256
    assert RamMapped.decode(record.payload()).extents == EXTENTS


def places(*numbers: int, extents: bytes = bytes(8) + (4096).to_bytes(8, "little"), page: int = 4096) -> bytes:
    """Return a payload with these places."""
    return page.to_bytes(4, "little") + bytes(4) + b"".join(n.to_bytes(8, "little") for n in numbers) + extents


FAR = 1 << 20


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (b"", "0 bytes, expected 40 and 16 for each extent"),
        (places(0, FAR, 2 * FAR, 3 * FAR, extents=b""), "40 bytes, expected 40 and 16 for each extent"),
        (places(0, FAR, 2 * FAR, 3 * FAR, page=8192), "pages of 8192 bytes and 0, expected 4096 and 0"),
        (places(0, FAR, 2 * FAR, 3 * FAR, extents=bytes(16)), "extent 0x0 of 0x0 bytes is empty, misaligned or out of"),
        (places(0, 4, 2 * FAR, 3 * FAR), r"at \[0, 4, 2097152, 3145728\], which are too near to each other"),
        (places(0, FAR, FAR, 3 * FAR), "which are too near to each other"),
        (places(0, FAR, 2 * FAR, 2 * FAR), "which are too near to each other"),
        (places(0, FAR, 2 * FAR, 1 << 62), "which are too near to each other"),
    ],
)
def test_a_malformed_map_is_refused(payload: bytes, text: str) -> None:
    with pytest.raises(Misshapen, match=text):
        RamMapped.decode(payload)


def test_checksums_have_one_size() -> None:
    record = RamMappedSums(1 << 40, 0xFFFF_FFFF, 7)
    assert RamMappedSums.decode(record.payload()) == record
    with pytest.raises(Misshapen, match="15 bytes, expected 16"):
        RamMappedSums.decode(bytes(15))


def mapped_stream(*, bitmap: int | None = None, twice: bool = False) -> tuple[bytes, RamMapped]:
    """Return a stream with a map at its places."""
    writer = StreamWriter("vm")
    head = b"".join(writer.take())
    record = RamMapped.after(len(head) + HEAD_SIZE, ((0, 4096),), 0)
    if bitmap is not None:
        record = RamMapped(record.extents, bitmap, record.sums, record.area, record.onward)
    writer.ram_mapped(record)
    data = head + b"".join(writer.take())
    if twice:
        writer.ram_mapped(record)
    writer.section("a", 1, {})
    writer.ram_mapped_sums(RamMappedSums(0, 0, 0))
    return data.ljust(record.onward, b"?") + b"".join(writer.finish()), record


@pytest.mark.parametrize("piece", [1, 100, 1 << 16, 1 << 22])
def test_a_stream_goes_on_behind_its_pages(piece: int) -> None:
    data, record = mapped_stream()
    reader = StreamReader(seekable=True, limit=1 << 20)
    found: list[Record] = []
    at = 0
    while not reader.ended:
        found += reader.feed(data[at : at + piece])
        at += piece
        if reader.jump is not None:
            assert reader.feed(b"") == []
            at = reader.jump
            reader.jumped()
    assert [type(each) for each in found[1:]] == [RamMapped, Section, RamMappedSums, End]
    assert found[1] == record


def test_a_stream_that_nobody_can_jump_in_has_no_map() -> None:
    with pytest.raises(
        StreamCorrupt, match=r"record 1 at offset \d+: map of RAM in the file, which only a file can have"
    ):
        StreamReader().feed(mapped_stream()[0])


def test_a_map_over_its_own_record_and_a_second_one_are_refused() -> None:
    data, _ = mapped_stream(bitmap=8)
    with pytest.raises(StreamCorrupt, match="a second one, or with its bitmap at 8, before 11"):
        StreamReader(seekable=True).feed(data)
    data, record = mapped_stream(twice=True)
    reader = StreamReader(seekable=True)
    reader.feed(data)
    reader.jumped()
    with pytest.raises(StreamCorrupt, match="a second one, or"):
        reader.feed(data[record.onward :])


@pytest.fixture
def memory() -> Generator[GuestMemory, None, None]:
    with closing(GuestMemory.from_memfd(create_ram(SIZE, "test"), SIZE)) as made:
        made.write(5 * PAGE_SIZE, b"five")
        yield made


async def written(memory: GuestMemory, path: Path) -> tuple[RamMapped, RamMappedSums]:
    """Save memory in a file; return the records."""
    with closing(MappedFile(os.open(path, os.O_RDWR | os.O_CREAT))) as file:
        file.begin("vm", [], {}, [], memory)
        every = PageMap(100)
        every.set_all()
        reports: list[int] = []
        await file.ram.save(every, lambda: reports.append(file.ram.statistics().remaining), lambda: 1 << 40)
        assert reports == [0]
        sums = file.ram.finish()
        file.finish([])
        return file.ram.record, sums


def read(memory: GuestMemory, path: Path, record: RamMapped, sums: RamMappedSums) -> None:
    """Read the tables back."""
    fd = os.open(path, os.O_RDONLY)
    try:
        with closing(MappedReader(record, memory, fd, 0)) as reader:
            reader.check(sums)
    finally:
        os.close(fd)


async def test_tables_are_compared_with_their_record(memory: GuestMemory, tmp_path: Path) -> None:
    path = tmp_path / "state"
    record, sums = await written(memory, path)
    assert sums.present == 1
    read(memory, path, record, sums)
    with pytest.raises(StreamCorrupt, match="its bitmap has 1 of 100 pages and page 5, its record says 2"):
        read(memory, path, record, RamMappedSums(2, sums.bitmap, sums.sums))
    with pytest.raises(StreamCorrupt, match=f"a damaged table of checksums at offset {record.sums}: its checksum is"):
        read(memory, path, record, RamMappedSums(1, sums.bitmap, 0))
    with pytest.raises(StreamCorrupt, match="its RAM is 4096 bytes at 0x0, this machine has 409600 bytes at 0x0"):
        read(memory, path, RamMapped(((0, 4096),), *(record.bitmap, record.sums, record.area, record.onward)), sums)
    os.truncate(path, record.area)
    with pytest.raises(StreamCorrupt, match=f"it ends after {record.area} bytes, before its last page of RAM"):
        read(memory, path, record, sums)
    os.truncate(path, record.sums + 7)
    with pytest.raises(StreamCorrupt, match=f"it ends after {record.sums + 7} bytes, in its table of checksums"):
        read(memory, path, record, sums)
