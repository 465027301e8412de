"""A file with a state stream in it, looked at as a whole: for people, not for a machine.

All that can be checked without a machine is checked: form, order, checksums, and the pages of RAM, of which only their
checksums are kept. What is allocated is bounded by the limits of the stream's reader and by the size of the file.
"""

from __future__ import annotations

import errno
import os
from array import array
from bisect import bisect_right
from typing import TYPE_CHECKING, Any, Final, final

import attrs

from vmm.errors import HostFileRefused, StreamCorrupt, Unsupported
from vmm.kvm.page_file import checksum, path_of
from vmm.migration.packing import packing
from vmm.migration.ram_file_records import RamInPlace, RamMapped, RamMappedSums
from vmm.migration.ram_records import DATA, RAW, ZLIB, RamAbsent, RamContent, RamExtents, RamPages, RamPass
from vmm.migration.record_fields import PAGE_SIZE
from vmm.migration.stream import StreamReader
from vmm.migration.stream_records import Header, Home, Recipe, Section
from vmm.migration.terms import Terms

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vmm.migration.stream_records import Record

_PIECE: Final = 1 << 18
"""Bytes that are read at once."""
_BLOCK: Final = 64
"""Pages whose checksums are kept together, where any of them is."""
_THERE: Final = 1 << 32
_MOST_MAPPED: Final = 1 << 40
"""Bytes of RAM at fixed places in a file; of more, the tables alone would not fit here."""


@final
class PageSums:
    """The checksum (CRC-32C) of each page that is not zero, by its number: guest-physical address / 4096."""

    def __init__(self) -> None:
        self._blocks: Final[dict[int, array[int]]] = {}

    def put(self, page: int, value: int) -> None:
        """Note a page."""
        block = self._blocks.get(page // _BLOCK)
        if block is None:
            block = self._blocks[page // _BLOCK] = array("Q", bytes(8 * _BLOCK))
        block[page % _BLOCK] = value | _THERE

    def clear(self, first: int, pages: int) -> None:
        """Forget pages: they are zero."""
        end = first + pages
        if pages // _BLOCK > len(self._blocks):
            touched = [number for number in self._blocks if first // _BLOCK <= number <= (end - 1) // _BLOCK]
        else:
            touched = [n for n in range(first // _BLOCK, (end - 1) // _BLOCK + 1) if n in self._blocks]
        for number in touched:
            block, base = self._blocks[number], number * _BLOCK
            if first <= base and base + _BLOCK <= end:
                del self._blocks[number]
                continue
            for page in range(max(first, base), min(end, base + _BLOCK)):
                block[page - base] = 0

    def get(self, page: int) -> int | None:
        """Return a page's checksum; None where it is zero."""
        block = self._blocks.get(page // _BLOCK)
        value = block[page % _BLOCK] if block is not None else 0
        return value & (_THERE - 1) if value else None

    def pages(self) -> Iterator[int]:
        """Yield the numbers of all pages that are not zero, ascending."""
        for number in sorted(self._blocks):
            for at, value in enumerate(self._blocks[number]):
                if value:
                    yield number * _BLOCK + at

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yield first page and number of pages of what lies together, ascending."""
        first = count = 0
        for page in self.pages():
            if count and page == first + count:
                count += 1
                continue
            if count:
                yield first, count
            first, count = page, 1
        if count:
            yield first, count

    def differences(self, other: PageSums) -> list[int]:
        """Return the pages that are not the same in both, ascending."""
        found = []
        for number in sorted(self._blocks.keys() | other._blocks.keys()):
            one, two = self._blocks.get(number, _NONE), other._blocks.get(number, _NONE)
            if one != two:
                found += [number * _BLOCK + at for at in range(_BLOCK) if one[at] != two[at]]
        return found


_NONE: Final = array("Q", bytes(8 * _BLOCK))


@final
@attrs.define(kw_only=True)
class StreamFile:
    """What is in a file with a stream."""

    version: int = 1
    size: int = 0
    """Bytes from the stream's beginning to its end."""
    records: int = 0
    machine: str = ""
    recipe_digest: bytes = b""
    recipe: tuple[Mapping[str, Any], ...] | None = None
    home: tuple[Mapping[str, Any], ...] | None = None
    sections: dict[str, Section] = attrs.Factory(dict)
    terms: Terms | None = None
    passes: int = 0
    """Passes over RAM, the last one with the guest standing."""
    sent: int = 0
    """Pages with content, as often as they came."""
    unverified: int = 0
    """Of these, pages whose content is packed so that this host cannot unpack it."""
    absent: int = 0
    """Pages that come only after the end, when the guest runs elsewhere: what of them is in it is not the last."""
    ram: str = "none"
    """Where RAM is: "none", "shared memory", "stream", "places" of this file, or the "file" of a back end."""
    extents: list[tuple[int, int]] = attrs.Factory(list)
    in_place: RamInPlace | None = None
    pages: PageSums = attrs.Factory(PageSums)


def read_stream_file(fd: int) -> StreamFile:
    """Read the stream that begins at the present position of file `fd`, which stays the caller's. Blocks.

    Raises:
        StreamCorrupt: it is damaged; says which record, and at which offset.
        HostFileRefused: it cannot be read.
    """
    return _Reading(fd).whole()


@final
class _Reading:
    """One file being read."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._start = os.lseek(fd, 0, os.SEEK_CUR)
        self._length = os.fstat(fd).st_size
        self._at = 0  # what comes next, from the beginning of the stream
        self._reader = StreamReader(seekable=True)
        self._found = StreamFile()
        self._mapped: RamMapped | None = None
        self._suspects: dict[int, tuple[int, int, int]] = {}  # page -> offset of its record, found, expected

    def whole(self) -> StreamFile:
        reader, found = self._reader, self._found
        while not reader.ended:
            data = self._read(self._at, _PIECE)
            if not data:
                reader.close()
            self._at += len(data)
            records = reader.feed(data)
            while records:
                for record in records:
                    self._take(record)
                records = reader.feed(b"") if isinstance(records[-1], RamPages) else []
            if reader.jump is not None:
                self._at = reader.jump
                reader.jumped()
        found.size = self._at
        found.version = reader.version
        for page, (offset, value, expected) in sorted(self._suspects.items() if not found.absent else ()):
            raise _damaged(f"page of RAM {page * PAGE_SIZE:#x}, which does not come again,", offset, value, expected)
        return found

    def _read(self, at: int, size: int) -> bytes:
        try:
            return os.pread(self._fd, size, self._start + at)
        except (OSError, OverflowError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or f"{at} is no place in a file"
            raise HostFileRefused(action="read", path=path_of(self._fd), reason=reason) from error

    def _take(self, record: Record) -> None:
        found = self._found
        found.records += 1
        match record:
            case Header():
                found.machine, found.recipe_digest = record.machine, record.recipe_digest
            case Recipe():
                found.recipe = record.commands
            case Home():
                found.home = record.commands
            case Section():
                found.sections[record.name] = record
            case RamExtents():
                found.ram = "stream" if record.in_stream else "shared memory"
                found.extents += record.extents
            case RamContent():
                for (address, _), data in zip(record.runs, record.data, strict=True):
                    for at in range(0, len(data), PAGE_SIZE):
                        found.pages.put((address + at) // PAGE_SIZE, checksum(data[at : at + PAGE_SIZE]))
            case RamPages():
                self._take_live(record)
            case RamPass():
                found.passes = record.number
            case Terms():
                found.terms = record
            case RamAbsent():
                found.absent = int.from_bytes(record.words, "little").bit_count()
            case RamInPlace():
                found.ram, found.in_place = "file", record
            case RamMapped():
                found.ram = "places"
                found.extents += record.extents
                self._mapped = record
            case RamMappedSums():
                self._take_mapped(record)

    # Pages that may come again: the last content counts. What the guest wrote to while it was sent is damaged once.

    def _take_live(self, record: RamPages) -> None:
        found, reader = self._found, self._reader
        offset = reader.offset
        # Without content, what comes next may be that of a later record.
        content = reader.take_content() if record.content else b""
        if len(content) < record.content:
            more = self._exactly("content of RAM", self._at, reader.content)
            self._at += len(more)
            reader.pass_content(len(more))
            content += more
        sums = iter(record.checksums())
        pages = sum(count for _, count, kind in record.runs() if kind == DATA)
        unpacked = _unpacked(record.method, content, pages * PAGE_SIZE, offset)
        found.sent += pages
        if unpacked is None:
            found.unverified += pages
        at = 0
        for address, count, kind in record.runs():
            self._require_inside(address, count * PAGE_SIZE, offset)
            first = address // PAGE_SIZE
            if kind != DATA:
                found.pages.clear(first, count)
                for page in [page for page in self._suspects if first <= page < first + count]:
                    del self._suspects[page]
                continue
            for page in range(first, first + count):
                expected = next(sums)
                value = expected if unpacked is None else checksum(unpacked[at : at + PAGE_SIZE])
                at += PAGE_SIZE
                found.pages.put(page, value)
                self._suspects.pop(page, None)
                if value != expected:
                    self._suspects[page] = (offset, value, expected)

    def _require_inside(self, address: int, size: int, offset: int) -> None:
        extents = self._found.extents
        at = bisect_right(extents, (address, 1 << 64)) - 1
        if at < 0 or address + size > sum(extents[at]):
            raise StreamCorrupt(
                reason=f"the pages of RAM at offset {offset} are for {size} bytes at {address:#x}, outside its extents"
            )

    # RAM at fixed places: bitmap, table of checksums, pages.

    def _take_mapped(self, totals: RamMappedSums) -> None:
        mapped = self._mapped
        if mapped is None:
            raise StreamCorrupt(reason="it has checksums of a map of RAM, and no such map before them")
        if mapped.pages * PAGE_SIZE > _MOST_MAPPED:
            raise StreamCorrupt(
                reason=f"it has a map of {mapped.pages * PAGE_SIZE} bytes of RAM; at most {_MOST_MAPPED} are looked at"
            )
        bitmap = self._table("bitmap of RAM", mapped.bitmap, mapped.bitmap_size, totals.bitmap)
        self._sums(mapped, totals.sums)
        present = 0
        for first, count in _bits(bitmap):
            if first + count > mapped.pages:
                raise StreamCorrupt(reason=f"the bitmap of RAM at offset {mapped.bitmap} has pages that are not there")
            present += count
            for page in range(first, first + count, 256):
                self._take_pages(mapped, page, min(256, first + count - page))
        if present != totals.present:
            raise StreamCorrupt(reason=f"the bitmap of RAM has {present} pages, its record says {totals.present}")

    def _take_pages(self, mapped: RamMapped, first: int, count: int) -> None:
        at = mapped.area + first * PAGE_SIZE
        sums = memoryview(self._exactly("table of checksums", mapped.sums + 4 * first, 4 * count)).cast("I")
        if (lacking := self._first_hole(at, count)) is not None:
            address, page = _address(mapped.extents, first + lacking), at + lacking * PAGE_SIZE
            reason = f"the page of RAM {address:#x} at offset {page} is in its bitmap, and a hole in the file"
            raise StreamCorrupt(reason=reason)
        data = memoryview(self._exactly("page of RAM", at, count * PAGE_SIZE))
        for n in range(count):
            value = checksum(data[n * PAGE_SIZE : (n + 1) * PAGE_SIZE])
            address = _address(mapped.extents, first + n)
            if value != sums[n]:
                raise _damaged(f"page of RAM {address:#x}", at + n * PAGE_SIZE, value, sums[n])
            self._found.pages.put(address // PAGE_SIZE, value)

    def _sums(self, mapped: RamMapped, expected: int) -> None:
        value = 0
        for at in range(0, 4 * mapped.pages, _PIECE):
            piece = self._exactly("table of checksums", mapped.sums + at, min(_PIECE, 4 * mapped.pages - at))
            value = checksum(piece, value)
        if value != expected:
            raise _damaged("table of checksums", mapped.sums, value, expected)

    def _table(self, what: str, at: int, size: int, expected: int) -> bytes:
        table = self._exactly(what, at, size)
        if (value := checksum(table)) != expected:
            raise _damaged(what, at, value, expected)
        return table

    # A file claims as much RAM as it likes, by holes. What is not there is not read.

    def _seek(self, at: int, whence: int) -> int | None:
        """Return where data begins, or a hole, from `at` of the stream on; None where there is none."""
        try:
            return os.lseek(self._fd, self._start + at, whence) - self._start
        except OSError as error:
            # A file system that knows of no holes may say so.
            return None if error.errno == errno.ENXIO or whence == os.SEEK_HOLE else at

    def _is_hole(self, at: int, size: int) -> bool:
        if self._start + at + size > self._length:
            return False  # it is for a read to find that it ends
        data = self._seek(at, os.SEEK_DATA)
        return data is None or data >= at + size

    def _first_hole(self, at: int, pages: int) -> int | None:
        """Return the first of `pages` pages from `at` of the stream on that is a hole, whole."""
        hole = self._seek(at, os.SEEK_HOLE)
        if hole is None or hole >= at + pages * PAGE_SIZE:
            return None
        return next((page for page in range(pages) if self._is_hole(at + page * PAGE_SIZE, PAGE_SIZE)), None)

    def _exactly(self, what: str, at: int, size: int) -> bytes:
        pieces, done = [], 0
        while done < size:
            most = min(size - done, 1 << 24)
            piece = bytes(most) if self._is_hole(at + done, most) else self._read(at + done, most)
            if not piece:
                raise StreamCorrupt(reason=f"it ends at offset {at + done}, within its {what}, at {at} of {size} bytes")
            pieces.append(piece)
            done += len(piece)
        return b"".join(pieces)


def _damaged(what: str, at: int, value: int, expected: int) -> StreamCorrupt:
    return StreamCorrupt(
        reason=f"the {what} at offset {at} is damaged: its checksum is {value:#010x}, expected {expected:#010x}"
    )


def _unpacked(method: int, content: bytes, size: int, offset: int) -> bytes | None:
    """Return `size` bytes; None where this host cannot unpack them. Raises `StreamCorrupt` if they are none."""
    if method == RAW:
        return content
    try:
        way = packing("zlib" if method == ZLIB else "zstd")
    except Unsupported:
        return None
    assert way is not None
    try:
        return way.unpack(content, size)
    except StreamCorrupt as error:
        raise StreamCorrupt(reason=f"the pages of RAM at offset {offset}: {error.reason}") from error


def _bits(bitmap: bytes) -> Iterator[tuple[int, int]]:
    """Yield first bit and number of bits of what is set together, ascending; apart at multiples of 64 perhaps."""
    for number, word in enumerate(memoryview(bitmap).cast("Q")):
        at = number * 64
        while word:
            skip = (word & -word).bit_length() - 1
            word >>= skip
            at += skip
            run = (~word & (word + 1)).bit_length() - 1
            yield at, run
            word >>= run
            at += run


def _address(extents: tuple[tuple[int, int], ...], page: int) -> int:
    """Return the guest-physical address of page `page` of all extents in a row."""
    at = page * PAGE_SIZE
    for address, size in extents:
        if at < size:
            return address + at
        at -= size
    raise AssertionError("the bitmap was checked against the extents")
