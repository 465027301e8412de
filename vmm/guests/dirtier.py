"""Verify the memory of the guest `dirtier` from outside, and fill it before the guest starts.

The layout is that of `layout.h`, beside this file; `tests/guests/test_dirtier.py` compares the two. The guest writes
its pages in order, round and round, and one counter says how many it has written: so it is known of every page which
generation it must have, and a copy of the memory can be told to be complete and of one moment.

A reader may look while the guest runs. Pages that could have been written while they were read may then have any
generation from then; a guest that stands is verified exactly. Only the page that it was about to write may be half
done.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING, ClassVar, Final, final

import attrs

from vmm.errors import StateRejected
from vmm.guests.heartbeat import DIRTIER, HeartbeatHeader, Read, read_header

if TYPE_CHECKING:
    from collections.abc import Iterator

ADDRESS: Final = 0x0020_1000
MAGIC: Final = 0x5452_4944
VERSION: Final = 1
START: Final = 0x0080_0000
LOW_END: Final = 0xC000_0000
HIGH_START: Final = 1 << 32
KEY: Final = 0x9E37_79B1
FILL_WORDS: Final = 1 << 18
FILL_PAGES: Final = FILL_WORDS // 1024
FILL_FACTOR: Final = 1664525
FILL_SUMMAND: Final = 1013904223
MOST_PAGES: Final = 1 << 28

_PAGE: Final = 4096
_CHUNK: Final = 256
"""Pages that are read at once."""
_STAMP: Final = struct.Struct("<II")
_LAST: Final = _PAGE - _STAMP.size
_LOW: Final = 0xFFFF_FFFF
_NAMED: Final = 8
"""Wrong pages that a report describes; the others are counted."""


@final
@attrs.frozen
class DirtierHeader:
    """What the guest keeps beside its header; fields as in `struct dirtier` of layout.h, in that order."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<4I2Q2I2Q2I")

    magic: int
    version: int
    pages: int
    low_pages: int
    low_address: int
    high_address: int
    pages_per_tick: int
    filled: int
    written: int
    behind: int
    first_bad_page: int
    reserved: int

    def address_of(self, page: int) -> int:
        """Guest-physical address of `page` of the region."""
        if page < self.low_pages:
            return self.low_address + page * _PAGE
        return self.high_address + (page - self.low_pages) * _PAGE


def read_dirtier(read: Read) -> DirtierHeader | None:
    """Read what the guest keeps, or return None as long as it has not started.

    Raises:
        StateRejected: the guest is another one, its layout is not the one read here, or it makes no sense.
    """
    header = read_header(read)
    if header is None:
        return None
    found = DirtierHeader(*DirtierHeader.LAYOUT.unpack(read(ADDRESS, DirtierHeader.LAYOUT.size)))
    faults = []
    if header.guest != DIRTIER:
        faults.append(f"guest {header.guest} is not {DIRTIER} (dirtier)")
    elif found.magic != MAGIC:
        faults.append(f"it begins with {found.magic:#x}, not {MAGIC:#x}")
    elif found.version != VERSION:
        faults.append(f"version {found.version}, {VERSION} is read here")
    elif not (0 < found.pages <= MOST_PAGES and found.low_pages <= found.pages and found.filled <= 1):
        faults.append(f"{found.pages} pages, {found.low_pages} of them low, filled {found.filled}")
    if faults:
        raise StateRejected(section="dirtier header", faults=tuple(faults))
    return found


@final
class Filling:
    """The bytes of which a filled region is made: no page is like another, and nothing comes again within 1 MiB.

    They have no structure that a compressor finds. 1 MiB of memory, some 50 ms to make.
    """

    def __init__(self) -> None:
        word, words = 1, []
        for _ in range(FILL_WORDS):
            word = (word * FILL_FACTOR + FILL_SUMMAND) & _LOW
            words.append(word)
        self._bytes = struct.pack(f"<{FILL_WORDS}I", *words)
        self._bytes += self._bytes[:_PAGE]

    def body(self, page: int) -> bytes:
        """Return what `page` has between its two stamps."""
        at = self._place(page)
        return self._bytes[at + _STAMP.size : at + _LAST]

    def fill(self, fd: int, pages: int, *, start: int = START, low_end: int = LOW_END) -> None:
        """Fill the region of a guest that has not started yet, for its option `filled=1`.

        `fd` is its RAM: a memfd, or a file that is not of huge pages. It has the RAM above 4 GiB from `low_end` on.
        `start` is the guest's option. More than the region can be filled: see `wrong`. Some 1 to 5 GiB a second, if the
        host has memory at hand.

        Raises:
            OSError: the file could not be written.
        """
        view = memoryview(self._bytes)
        low_pages = max(0, low_end - start) // _PAGE
        high_offset = low_end + max(0, start - HIGH_START)
        for first, count in _chunks(pages, low_pages):
            offset = start + first * _PAGE if first < low_pages else high_offset + (first - low_pages) * _PAGE
            pieces: list[bytes | memoryview] = []
            for page in range(first, first + count):
                at = self._place(page)
                head, tail = _STAMP.pack(0, page * 2), _STAMP.pack(0, page * 2 + 1)
                pieces += (head, view[at + _STAMP.size : at + _LAST], tail)
            done = os.pwritev(fd, pieces, offset)
            if done < count * _PAGE:
                done += os.pwrite(fd, b"".join(pieces)[done:], offset + done)
            if done < count * _PAGE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def wrong(self, read: Read, pages: range, *, start: int = START, low_end: int = LOW_END) -> int:
        """Return how many of `pages`, which lie behind the guest's region and were filled too, are not as filled.

        The numbers go on from those of the region. Only of memory that the guest never writes.
        """
        low_pages = max(0, low_end - start) // _PAGE
        high_address = max(HIGH_START, start)
        count = 0
        for page in pages:
            address = start + page * _PAGE if page < low_pages else high_address + (page - low_pages) * _PAGE
            content = read(address, _PAGE)
            stamps = (*_STAMP.unpack_from(content), *_STAMP.unpack_from(content, _LAST))
            whole = stamps == (0, page * 2, 0, page * 2 + 1) and content[_STAMP.size : _LAST] == self.body(page)
            count += not whole
        return count

    def _place(self, page: int) -> int:
        return (page % FILL_PAGES * 1024 + page // FILL_PAGES) % FILL_WORDS * 4


@final
@attrs.frozen(kw_only=True)
class DirtierReport:
    """What one look found."""

    header: HeartbeatHeader
    dirtier: DirtierHeader
    """As it was when the look ended."""
    stood: bool
    """Nothing was written during the look: every page was verified exactly."""
    wrong: int
    """Pages that are not as the counter says."""
    first_wrong: tuple[str, ...]
    """The first of them, in words."""
    went_back: bool
    """The counter is lower than it was at the look before."""

    @property
    def errors(self) -> int:
        """Pages that the guest itself did not find as it had left them."""
        return self.header.lost + self.header.repeated + self.header.torn

    @property
    def generation(self) -> int:
        """Rounds that are complete."""
        return self.dirtier.written // self.dirtier.pages

    @property
    def intact(self) -> bool:
        """Nobody found anything wrong."""
        return not (self.wrong or self.errors or self.went_back)

    def __str__(self) -> str:
        text = (
            f"{self.dirtier.written} pages written, generation {self.generation}, {self.header.head} ticks; "
            f"{self.wrong} of {self.dirtier.pages} pages wrong from outside, {self.errors} from inside"
            f"{', the counter went back' if self.went_back else ''}"
        )
        return "; ".join((text, *self.first_wrong))


@final
class DirtierReader:
    """Looks at one guest again and again. Not for several threads at once."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._written = 0
        self._filling: Filling | None = None

    def follow(self, read: Read) -> None:
        """Go on in another process's view of the guest's memory."""
        self._read = read

    def written(self) -> int | None:
        """Return how many pages the guest has written; None as long as it has not started. Cheap."""
        found = read_dirtier(self._read)
        return None if found is None else found.written

    def look(self) -> DirtierReport | None:
        """Verify the whole region; None as long as the guest has not started. 1 to 2 s per GiB.

        Raises:
            StateRejected: as `read_dirtier`.
        """
        before = begin = read_dirtier(self._read)
        if before is None or begin is None:
            return None
        if begin.filled and self._filling is None:
            self._filling = Filling()
        wrong = 0
        named: list[str] = []
        for first, count in _chunks(begin.pages, begin.low_pages):
            chunk = self._read(begin.address_of(first), count * _PAGE)
            after = read_dirtier(self._read)
            if after is None or after.pages != begin.pages:
                raise StateRejected(section="dirtier header", faults=("the guest has started afresh",))
            for page, reason in self._wrong(chunk, first, before, after):
                wrong += 1
                if len(named) < _NAMED:
                    named.append(f"page {page} at {begin.address_of(page):#x}: {reason}")
            before = after
        header = read_header(self._read)
        assert header is not None
        went_back, self._written = begin.written < self._written, before.written
        return DirtierReport(
            header=header,
            dirtier=before,
            stood=begin.written == before.written,
            wrong=wrong,
            first_wrong=tuple(named),
            went_back=went_back,
        )

    def _wrong(
        self, chunk: bytes, first: int, before: DirtierHeader, after: DirtierHeader
    ) -> Iterator[tuple[int, str]]:
        """Yield page and reason for each page of `chunk` that is not as it must be between the two moments."""
        pages = before.pages
        least_rounds, least_page = divmod(before.written, pages)
        most_rounds, most_page = divmod(after.written + 1, pages)  # the page that is being written counts too
        for page in range(first, first + len(chunk) // _PAGE):
            at = (page - first) * _PAGE
            stamps = (*_STAMP.unpack_from(chunk, at), *_STAMP.unpack_from(chunk, at + _LAST))
            least = least_rounds + (page < least_page)
            most = most_rounds + (page < most_page)
            if (least or before.filled) and not _stamped(stamps, page, least, most):
                yield page, f"{_words(stamps, page)}, not {_range(least, most)}"
            elif chunk[at + _STAMP.size : at + _LAST] != (self._filling.body(page) if self._filling else _EMPTY):
                yield page, f"what is between its stamps is not {'its filling' if self._filling else 'zero'}"


_EMPTY: Final = bytes(_LAST - _STAMP.size)


def _chunks(pages: int, low_pages: int) -> Iterator[tuple[int, int]]:
    """Yield first page and count of pieces that lie in one stretch of RAM each."""
    first = 0
    while first < pages:
        end = min(pages, first + _CHUNK)
        if first < low_pages:
            end = min(end, low_pages)
        yield first, end - first
        first = end


def _check(page: int, index: int, generation: int) -> int:
    return (page * 2 + index) ^ (generation * KEY & _LOW)


def _stamped(stamps: tuple[int, ...], page: int, least: int, most: int) -> bool:
    """Whether each word of both stamps is of a generation from `least` to `most`."""
    if stamps == (least & _LOW, _check(page, 0, least), least & _LOW, _check(page, 1, least)):
        return True
    if least == most:
        return False
    generations = range(least, most + 1)
    words = {generation & _LOW for generation in generations}
    checks = [{_check(page, index, generation) for generation in generations} for index in (0, 1)]
    return stamps[0] in words and stamps[2] in words and stamps[1] in checks[0] and stamps[3] in checks[1]


def _words(stamps: tuple[int, ...], page: int) -> str:
    """Describe the stamps of a page that are not what they should be."""
    if not any(stamps):
        return "empty"
    generation, check, last, last_check = stamps
    place = check ^ (generation * KEY & _LOW)
    if last != generation or last_check != _check(place // 2, 1, generation) or place % 2:
        return "torn"
    return f"generation {generation}" + ("" if place // 2 == page else f" of page {place // 2}")


def _range(least: int, most: int) -> str:
    return f"generation {least}" if least == most else f"generations {least} to {most}"
