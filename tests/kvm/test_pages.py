"""Sets of pages, their checksums, and chunks: what goes in comes out, and what is damaged is found."""

from __future__ import annotations

import os
import random
import socket
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.kvm._pages import ffi, lib
from vmm.kvm.page_map import PageMap

if TYPE_CHECKING:
    from vmm.kvm._pages import CData

PAGES = 200

spans = st.lists(st.tuples(st.integers(0, PAGES), st.integers(0, PAGES), st.booleans()), max_size=12)


@given(spans=spans, first=st.integers(0, PAGES), end=st.integers(0, PAGES))
def test_a_set_of_pages_is_one(spans: list[tuple[int, int, bool]], first: int, end: int) -> None:
    found, expected = PageMap(PAGES), set[int]()
    for start, size, add in spans:
        pages = set(range(start, min(start + size, PAGES)))
        if add:
            found.add(start, size)
            expected |= pages
        else:
            found.discard(start, size)
            expected -= pages
    within = {page for page in expected if first <= page < end}
    assert found.count(first, end) == len(within)
    assert {page for at, size in found.runs(first, end) for page in range(at, at + size)} == within
    assert all(
        before + size < after
        for (before, size), (after, _) in zip(list(found.runs()), list(found.runs())[1:], strict=False)
    )
    assert len(found) == len(expected)
    assert [page in found for page in range(PAGES)] == [page in expected for page in range(PAGES)]


def test_sets_are_merged_and_emptied() -> None:
    one, other = PageMap(PAGES), PageMap(PAGES)
    one.add(3)
    other.add(199)
    one.merge(other)
    assert list(one.runs()) == [(3, 1), (199, 1)]
    one.set_all()
    assert list(one.runs()) == [(0, PAGES)]
    one.clear()
    assert len(one) == 0


def address_of(data: object) -> int:
    return int(ffi.cast("uintptr_t", ffi.from_buffer("uint8_t[]", data)))  # type: ignore[call-overload,no-any-return]


def plain_crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_the_checksum_is_crc_32c() -> None:
    assert plain_crc32c(b"123456789") == 0xE3069283  # as RFC 3720 and every catalogue of CRCs have it
    data = random.Random(1).randbytes(3 * 4096) + bytes(4096) + random.Random(2).randbytes(3 * 4096)
    checksums, zeros = ffi.new("uint32_t[7]"), ffi.new("uint64_t[1]")
    address = address_of(data)
    assert lib.tv_checksum_pages(address, 7, checksums, zeros) == 1
    pages = [data[at : at + 4096] for at in range(0, len(data), 4096)]
    assert [checksums[at] for at in range(7)] == [plain_crc32c(page) for page in pages]
    assert zeros[0] == 1 << 3


class Ram:
    """Pages of memory of this process, at two guest-physical addresses."""

    GAP = 1 << 32

    def __init__(self) -> None:
        self.fd = os.memfd_create("ram")
        os.ftruncate(self.fd, PAGES * 4096)
        self.bytes = bytearray(PAGES * 4096)
        self.regions = ffi.new("struct tv_region[2]", [(0, 0, 128), (self.GAP, 128, PAGES - 128)])
        self.received = PageMap(PAGES)
        self.suspects = PageMap(PAGES)

    @property
    def base(self) -> int:
        return address_of(self.bytes)

    def put(self, page: int, data: bytes) -> None:
        self.bytes[page * 4096 : page * 4096 + len(data)] = data

    def gather(self, chunk: CData, pages: PageMap, start: int = 0) -> int:
        end, delta = (128, 0) if start < 128 else (PAGES, self.GAP - 128 * 4096)
        return int(lib.tv_chunk_gather(chunk, self.base, pages.words, start, end, delta, 1))

    def content(self) -> bytes:
        return os.pread(self.fd, PAGES * 4096, 0)

    def take(self, chunk: CData, table: bytes, content: bytes) -> str | None:
        """Put a chunk into the memory object, and return what is wrong with it."""
        wrong = lib.tv_chunk_parse(chunk, table, len(table), self.regions, 2)
        if wrong != ffi.NULL:
            return ffi.string(wrong).decode()
        lib.tv_chunk_verify(chunk, content, self.suspects.words)
        assert lib.tv_chunk_store(chunk, content, self.fd, 0, self.received.words) == 0
        return None


def parts(chunk: CData, ram: Ram) -> tuple[bytes, bytes]:
    """What of a chunk is sent: its table and its content."""
    left, right = socket.socketpair()
    with closing(left), closing(right):
        left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 << 20)
        assert lib.tv_chunk_write(chunk, left.fileno(), ram.base) == 1
        left.close()
        data = b"".join(iter(lambda: right.recv(1 << 20), b""))
    table = data[lib.TV_HEAD_ROOM : lib.TV_HEAD_ROOM + chunk.table_size]
    return table, data[lib.TV_HEAD_ROOM + chunk.table_size :]


def test_pages_arrive_zeros_are_told_and_what_is_not_in_the_set_stays_where_it_is() -> None:
    ram, there = Ram(), Ram()
    for page in (0, 1, 5, 127, 128, 199):
        ram.put(page, bytes([page + 1]) * 4096)
    pages, chunk = PageMap(PAGES), ffi.new("struct tv_chunk *")
    pages.set_all()
    pages.discard(5)
    assert ram.gather(chunk, pages) == 128
    assert (chunk.data_pages, chunk.zero_pages) == (3, 124)
    assert there.take(ffi.new("struct tv_chunk *"), *parts(chunk, ram)) is None
    assert ram.gather(chunk, pages, 128) == PAGES
    assert there.take(ffi.new("struct tv_chunk *"), *parts(chunk, ram)) is None
    assert len(pages) == 0
    ram.put(5, bytes(4096))
    assert there.content() == ram.bytes
    assert list(there.received.runs()) == [(0, 2), (127, 2), (199, 1)]
    # What is zero now was something before, and is made zero.
    ram.put(1, bytes(4096))
    pages.add(0, 3)
    ram.gather(chunk, pages)
    assert there.take(ffi.new("struct tv_chunk *"), *parts(chunk, ram)) is None
    assert there.content() == ram.bytes


def test_a_chunk_has_no_more_than_its_pages_and_its_runs() -> None:
    ram = Ram()
    ram.bytes[:] = random.Random(3).randbytes(len(ram.bytes))
    pages, chunk = PageMap(PAGES), ffi.new("struct tv_chunk *")
    pages.set_all()
    lib.tv_chunk_gather(chunk, ram.base, pages.words, 0, PAGES, 0, 1)
    assert (chunk.data_pages, chunk.runs) == (PAGES, 1)
    big = bytearray(random.Random(4).randbytes(600 * 4096))
    for page in range(1, 600, 2):
        big[page * 4096 : page * 4096 + 4096] = bytes(4096)
    many = PageMap(600)
    many.set_all()
    base = address_of(big)
    after = lib.tv_chunk_gather(chunk, base, many.words, 0, 600, 0, 1)
    assert (after, chunk.runs, chunk.data_pages) == (511, 511, 256)
    assert list(many.runs()) == [(511, 89)]
    lib.tv_chunk_gather(chunk, base, many.words, after, 600, 0, 0)
    assert (chunk.runs, chunk.data_pages) == (1, 89)


def test_a_page_that_changed_on_its_way_is_a_suspect_until_it_comes_again() -> None:
    ram, there = Ram(), Ram()
    ram.put(130, b"one" * 1000)
    ram.put(131, b"two" * 1000)
    pages, chunk, other = PageMap(PAGES), ffi.new("struct tv_chunk *"), ffi.new("struct tv_chunk *")
    pages.add(130, 2)
    ram.gather(chunk, pages, 128)
    ram.put(131, b"three")
    assert there.take(other, *parts(chunk, ram)) is None
    assert (other.bad_pages, other.first_bad) == (1, Ram.GAP + 3 * 4096)
    assert list(there.suspects.runs()) == [(131, 1)]
    pages.add(131)
    ram.gather(chunk, pages, 128)
    assert there.take(other, *parts(chunk, ram)) is None
    assert len(there.suspects) == 0
    assert there.content() == ram.bytes


def table(
    runs: list[tuple[int, int, int]],
    *,
    count: int | None = None,
    method: int = 0,
    content: int | None = None,
    checksums: int | None = None,
) -> bytes:
    data = sum(pages for _, pages, kind in runs if kind == 0)
    return b"".join((
        (len(runs) if count is None else count).to_bytes(4, "little"),
        method.to_bytes(4, "little"),
        (data * 4096 if content is None else content).to_bytes(8, "little"),
        *(address.to_bytes(8, "little") + pages.to_bytes(4, "little") + kind.to_bytes(4, "little")
          for address, pages, kind in runs),
        bytes(4 * (data if checksums is None else checksums)),
    ))  # fmt: skip


@pytest.mark.parametrize(("wrong", "text"), [
    (b"short", "it ends before its numbers"),
    (table([]), "it has no run of pages, or too many"),
    (table([(0, 1, 0)], count=513), "it has no run of pages, or too many"),
    (table([(0, 1, 0)], count=9), "it ends before its last run of pages"),
    (table([(1, 1, 0)]), "a run of pages is empty, misaligned or of an unknown kind"),
    (table([(0, 0, 0)]), "a run of pages is empty, misaligned or of an unknown kind"),
    (table([(0, 1, 2)]), "a run of pages is empty, misaligned or of an unknown kind"),
    (table([(128 * 4096, 1, 0)]), "a run of pages is outside of the guest's RAM"),
    (table([(1 << 63, 1, 0)]), "a run of pages is outside of the guest's RAM"),
    (table([(0, 129, 1)]), "a run of pages goes beyond the guest's RAM"),
    (table([(Ram.GAP, 0xFFFFFFFF, 1)]), "a run of pages goes beyond the guest's RAM"),
    (table([(0, 128, 0), (0, 128, 0), (0, 1, 0)]), "it has too many pages with data"),
    (table([(0, 1, 0)], checksums=2), "its size does not fit its runs of pages"),
    (table([(0, 1, 0)], method=3), "its content is packed by an unknown method"),
    (table([(0, 1, 0)], content=1), "the size of its content does not fit its pages"),
    (table([(0, 1, 0)], method=1, content=8193), "the size of its content does not fit its pages"),
])  # fmt: skip
def test_a_table_that_is_none_is_refused_and_says_why(wrong: bytes, text: str) -> None:
    assert Ram().take(ffi.new("struct tv_chunk *"), wrong, b"") == text


@given(st.binary(max_size=600))
def test_whatever_comes_as_a_table_is_refused_or_is_one(data: bytes) -> None:
    chunk = ffi.new("struct tv_chunk *")
    if lib.tv_chunk_parse(chunk, data, len(data), Ram().regions, 2) == ffi.NULL:
        assert chunk.data_pages <= lib.TV_CHUNK_PAGES
        assert chunk.content <= (chunk.data_pages + 1) * 4096


def test_a_chunk_is_written_and_read_in_pieces_as_there_is_room() -> None:
    ram, there = Ram(), Ram()
    ram.bytes[:] = random.Random(5).randbytes(len(ram.bytes))
    pages, chunk, other = PageMap(PAGES), ffi.new("struct tv_chunk *"), ffi.new("struct tv_chunk *")
    pages.set_all()
    ram.gather(chunk, pages)
    left, right = socket.socketpair()
    with closing(left), closing(right):
        for end in (left, right):
            end.setblocking(False)
        assert lib.tv_chunk_write(chunk, left.fileno(), ram.base) == 0
        head = right.recv(lib.TV_HEAD_ROOM + chunk.table_size)
        assert lib.tv_chunk_parse(other, head[lib.TV_HEAD_ROOM :], chunk.table_size, there.regions, 2) == ffi.NULL
        content = bytearray(other.content)
        sent = read = 0
        while not read:
            read = lib.tv_chunk_read(other, right.fileno(), ffi.from_buffer("uint8_t[]", content))
            sent = sent or lib.tv_chunk_write(chunk, left.fileno(), ram.base)
        assert (sent, read) == (1, 1)
        assert content == ram.bytes[: 128 * 4096]
        lib.tv_chunk_parse(other, head[lib.TV_HEAD_ROOM :], chunk.table_size, there.regions, 2)
        left.close()
        assert lib.tv_chunk_read(other, right.fileno(), ffi.from_buffer("uint8_t[]", content)) == lib.TV_ENDED
        lib.tv_chunk_gather(chunk, ram.base, pages.words, 0, 0, 0, 1)
        assert lib.tv_chunk_write(chunk, right.fileno(), ram.base) < 0
