"""The state stream: one format for transfer, exec, reboot, snapshot and migration.

    preamble   8 bytes magic, u16 format version, u16 zero
    record 0   header: machine name, digest of the recipe
    record 1   recipe, where it travels with the state
    …          device sections; RAM extents; where RAM is in the stream, it, after its extents
    last       end: number of records, checksum over their headers

A record is a header of 20 bytes and a payload; all integers are little-endian:

    u16 type   u16 flags   u32 number   u32 payload bytes   u32 CRC-32 of the payload   u32 CRC-32 of these 16 bytes

The header has a checksum of its own so that a damaged length is noticed at once, not when that many bytes have been
awaited. The number counts up from 0: what is missing, repeated or out of order cannot pass. CRC-32 finds damage, not
malice: who may send is the channel's business. Whatever comes in, a reader allocates no more than the limits below
and raises nothing but `StreamCorrupt`. The content of RAM is not limited by them but by its extents: it must lie in
them, ascending, so that no more of it can come than they have. Whether they are RAM is for the reader's caller to check
before it feeds more.

Format version 1 has all of RAM in records of content, once. Version 2 has it in pages, which may come again while the
guest runs; their bytes follow their record and are not part of it, so that they can go straight from and to the guest's
memory. docs/stream.md has all of it.

Both classes are pure: others move the bytes.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final, final
from zlib import crc32

from vmm.errors import StateRejected, StreamCorrupt
from vmm.migration.ram_file_records import RamInPlace, RamMapped
from vmm.migration.ram_records import RamContent, RamExtents, RamPages, RamPass, Switchover
from vmm.migration.section_payload import Misshapen
from vmm.migration.stream_order import RECIPE_NUMBER, SECTIONS_LIMIT, UNLIMITED, Misplaced, RecordOrder
from vmm.migration.stream_records import FORMAT_VERSION, KINDS, PAGES_VERSION, End, Header, Home, Recipe, Section, noun

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from vmm.migration.ram_file_records import RamMappedSums
    from vmm.migration.ram_records import RamAbsent
    from vmm.migration.section_payload import StateValue
    from vmm.migration.stream_records import Record
    from vmm.migration.terms import Terms

MAGIC: Final = b"\x89TVMM\r\n\x1a"
STREAM_LIMIT: Final = 256 << 20  # bytes of a whole stream but RAM content, unless a reader is told otherwise
UNKNOWN_LIMIT: Final = 16 << 20  # bytes of payload in a record that is skipped

SKIPPABLE: Final = 0x0001
"""Flag of a record that a reader which does not know its type may leave out."""

_PREAMBLE: Final = struct.Struct("<8sHH")
_HEAD: Final = struct.Struct("<HHIII")
_CRC: Final = struct.Struct("<I")
HEAD_SIZE: Final = _HEAD.size + _CRC.size


def encode_record(kind: int, number: int, payload: bytes, flags: int = 0) -> tuple[bytes, bytes]:
    """Return a record's header and its payload."""
    return _encode_head(kind, number, len(payload), crc32(payload), flags), payload


def _encode_head(kind: int, number: int, size: int, checksum: int, flags: int = 0) -> bytes:
    head = _HEAD.pack(kind, flags, number, size, checksum)
    return head + _CRC.pack(crc32(head))


@final
class StreamWriter:
    """Builds a state stream in memory.

    The buffers that `take` and `finish` return are, one after the other, the stream. Nothing here blocks; the time
    for a whole machine's 20 KiB is part of the guest's pause.
    """

    def __init__(self, machine: str, recipe_digest: bytes = b"", *, version: int = FORMAT_VERSION) -> None:
        preamble = _PREAMBLE.pack(MAGIC, version, 0)
        self._buffers: list[bytes | memoryview] = [preamble]
        self._checksum = crc32(preamble)
        self._number = 0
        self._names: Final[set[str]] = set()
        self._finished = False
        self._add(Header(machine, recipe_digest))

    def recipe(self, commands: Iterable[Mapping[str, Any]]) -> None:
        """Add the recipe, before anything else. Raises `MigrationRefused` where it does not fit."""
        if self._number != RECIPE_NUMBER:
            raise ValueError("the recipe comes before all sections and RAM extents, and once")
        self._add(Recipe(tuple(commands)))

    def section(self, name: str, version: int, state: Mapping[str, StateValue]) -> None:
        """Add one section. Raises `StateRejected` where it does not fit, or its name is taken."""
        if name in self._names:
            raise StateRejected(section=name, faults=("it is in the stream already",))
        if len(self._names) == SECTIONS_LIMIT:
            raise StateRejected(section=name, faults=(f"{SECTIONS_LIMIT} sections are in the stream already",))
        self._add(Section(name, version, state))
        self._names.add(name)

    def ram_extents(self, extents: Iterable[tuple[int, int]], *, in_stream: bool = False) -> None:
        """Add (guest-physical address, bytes) of RAM whose content belongs to this state, and where that is."""
        self._add(RamExtents(tuple(extents), in_stream))

    def ram_in_place(self, name: str, size: int, identity: bytes) -> None:
        """Say that all of RAM, `size` bytes, has been left in the file of back end `name`, which is marked so."""
        self._add(RamInPlace(name, size, identity))

    def ram_absent(self, record: RamAbsent) -> None:
        """Say which pages come only once the guest runs there."""
        self._add(record)

    def ram_mapped(self, record: RamMapped) -> None:
        """Say where in this file the pages of RAM are. What is added next goes where it says."""
        self._add(record)

    def ram_mapped_sums(self, record: RamMappedSums) -> None:
        """Add what was written there."""
        self._add(record)

    def home(self, commands: Iterable[Mapping[str, Any]]) -> None:
        """Add what a reader in another place leaves out. Raises `MigrationRefused` where it does not fit."""
        self._add(Home(tuple(commands)), SKIPPABLE)

    def terms(self, terms: Terms) -> None:
        """Add the terms, after the section PROCESSOR."""
        self._add(terms)

    def ram_pass(self, number: int) -> None:
        """Begin a pass over RAM."""
        self._add(RamPass(number))

    def switchover(self) -> None:
        """Say that the guest is about to stand, and that little is left of it. Sections may come once more then."""
        self._add(Switchover())
        self._names.clear()

    def ram_pages(self, table: bytes | memoryview) -> bytes:
        """Add pages whose table this is; return the head that goes before it. Both are the caller's to send, and the
        content after them; what was added before must have been taken."""
        assert not self._buffers, "what comes before the pages has been sent"
        head = _encode_head(RamPages.TYPE, self._number, len(table), crc32(table))
        self._count(head)
        return head

    def ram_content(self, content: RamContent) -> None:
        """Add content of RAM that lies in the extents before it and after all content before it.

        Its data are not copied: they must stay as they are until what `take` returns has been sent.
        """
        table = content.table()
        checksum = crc32(table)
        for piece in content.data:
            checksum = crc32(piece, checksum)
        size = len(table) + sum(map(len, content.data))
        head = _encode_head(RamContent.TYPE, self._number, size, checksum)
        self._buffers += head, table, *content.data
        self._count(head)

    def take(self) -> list[bytes | memoryview]:
        """Return the buffers since the last call, to be sent while more is added."""
        buffers, self._buffers = self._buffers, []
        return buffers

    def finish(self) -> list[bytes | memoryview]:
        """Add the end record and return the buffers since the last call. Nothing can be added afterwards."""
        self._add(End(self._number, self._checksum))
        self._finished = True
        return self.take()

    def _add(self, record: Record, flags: int = 0) -> None:
        if self._finished:
            raise ValueError("the stream has its end record already")
        head, payload = encode_record(record.TYPE, self._number, record.payload(), flags)
        self._buffers += head, payload
        self._count(head)

    def _count(self, head: bytes) -> None:
        self._checksum = crc32(head, self._checksum)
        self._number += 1


@final
class StreamReader:
    """Parses a state stream as its bytes come in, in pieces of any size.

    After a `StreamCorrupt` the reader is of no further use, and raises the same error again.
    """

    def __init__(self, *, limit: int = STREAM_LIMIT, seekable: bool = False) -> None:
        """With `seekable`, the stream may go on at another place of its file: see `jump`."""
        self._limit: Final = limit
        self.jump: int | None = None
        """Where the stream goes on, in bytes from its beginning; None where it goes on where it is. See `jumped`."""
        self._buffer = bytearray()
        self._offset = 0  # of the buffer's first byte in the stream
        self._checksum = 0
        self._version = FORMAT_VERSION
        self._number = -1  # of the record that comes next; -1 before the preamble
        self._head: tuple[int, int, int] | None = None  # type, payload bytes, CRC of the record that is coming in
        self._order: Final = RecordOrder(seekable=seekable)
        self._content = 0  # bytes of records with RAM content so far, which the limit does not count
        self._pending = 0  # bytes that follow the last record and are not part of one
        self._ended = False
        self._failure: StreamCorrupt | None = None

    @property
    def ended(self) -> bool:
        """Whether the end record was read."""
        return self._ended

    @property
    def version(self) -> int:
        """Format version, once the preamble was read."""
        return self._version

    @property
    def content(self) -> int:
        """Bytes of pages that come next, before another record: those of the last record that `feed` returned."""
        return self._pending

    @property
    def offset(self) -> int:
        """Of the first byte that belongs to nothing yet."""
        return self._offset

    def take_content(self) -> bytes:
        """Return what `feed` has got of the pages that come next."""
        data = bytes(self._buffer[: self._pending])
        del self._buffer[: len(data)]
        self.pass_content(len(data))
        return data

    def pass_content(self, size: int) -> None:
        """Note that `size` bytes of them went elsewhere."""
        assert size <= self._pending
        self._pending -= size
        self._offset += size
        self._content += size

    def feed(self, data: bytes | bytearray | memoryview) -> list[Record]:
        """Take in the next bytes; return the records that they complete, the end record included.

        After a `RamPages` with content it returns no more until that has been taken, or passed by.

        Raises:
            StreamCorrupt: the bytes are no such stream. It names the record, its offset, and what was expected.
        """
        if self._failure is not None:
            raise self._failure
        try:
            return self._feed(data)
        except StreamCorrupt as failure:
            self._failure = failure
            raise

    def jumped(self) -> None:
        """Say that what is fed next is from where `jump` says. What was fed from elsewhere is forgotten."""
        assert self.jump is not None
        self._content += self.jump - self._offset
        self._offset, self.jump = self.jump, None
        self._buffer.clear()

    def close(self) -> None:
        """Say that no more bytes come. Raises `StreamCorrupt` unless the stream was complete."""
        if self._failure is not None:
            raise self._failure
        if self._ended:
            return
        length = self._offset + len(self._buffer)
        if self._number < 0:
            expected = f"the preamble of {_PREAMBLE.size} bytes"
        elif self._pending:
            expected = f"{self._pending} bytes of pages at offset {self._offset}, after record {self._number - 1}"
        elif self._head is None:
            expected = f"record {self._number} at offset {self._offset}, after which an end record"
        else:
            kind, size, _ = self._head
            expected = f"record {self._number} at offset {self._offset}: {noun(kind)} of {size} bytes"
        self._failure = StreamCorrupt(reason=f"it ends after {length} bytes; expected {expected}")
        raise self._failure

    def _feed(self, data: bytes | bytearray | memoryview) -> list[Record]:
        self._buffer += data
        records: list[Record] = []
        at = 0
        try:
            while not self._pending and (size := self._next(at, records)) is not None:
                at += size
        finally:
            self._offset += at
            del self._buffer[:at]
        if self.jump is not None:
            return records
        ram = self._pending or (self._head is not None and self._head[0] == RamContent.TYPE)
        under_way = 0 if ram else len(self._buffer)
        if self._offset + under_way - self._content > self._limit:
            raise StreamCorrupt(reason=f"it has more than {self._limit} bytes, the most that is read here")
        if self._ended and self._buffer:
            raise StreamCorrupt(reason=f"it goes on after its end record, which ends at offset {self._offset}")
        return records

    def _next(self, at: int, records: list[Record]) -> int | None:
        """Read what is complete at `at` of the buffer; return its size, or None where more has to come in."""
        available = len(self._buffer) - at
        if self._ended or self.jump is not None:
            return None
        if self._number < 0:
            if available < _PREAMBLE.size:
                return None
            self._read_preamble()
            return _PREAMBLE.size
        if self._head is None:
            if available < HEAD_SIZE:
                return None
            self._head = self._read_head(at)
        kind, size, checksum = self._head
        if available < HEAD_SIZE + size:
            return None
        start = at + HEAD_SIZE
        with memoryview(self._buffer) as view:
            payload = bytes(view[start : start + size])
            if (found := crc32(payload)) != checksum:
                raise self._corrupt(at, f"a damaged {noun(kind)}: {_differ(found, checksum)}")
            record = self._decode(at, kind, payload)
            self._checksum = crc32(view[at:start], self._checksum)
        if record is not None:
            records.append(record)
        if isinstance(record, UNLIMITED):
            self._content += HEAD_SIZE + size
        if isinstance(record, RamPages):
            self._pending = record.content
        self._head = None
        self._number += 1
        return HEAD_SIZE + size

    def _read_preamble(self) -> None:
        magic, version, zero = _PREAMBLE.unpack_from(self._buffer)
        if magic != MAGIC:
            raise StreamCorrupt(reason=f"it begins with {magic.hex()}, expected {MAGIC.hex()}")
        if not FORMAT_VERSION <= version <= PAGES_VERSION:
            raise StreamCorrupt(
                reason=f"it has format version {version}; versions {FORMAT_VERSION} to {PAGES_VERSION} are read here"
            )
        self._version = version
        if zero:
            raise StreamCorrupt(reason=f"its bytes 10 and 11 are {zero:#06x}, expected 0")
        self._checksum = crc32(self._buffer[: _PREAMBLE.size])
        self._number = 0

    def _read_head(self, at: int) -> tuple[int, int, int]:
        """Check a record's header, all but what depends on the payload."""
        head = self._buffer[at : at + _HEAD.size]
        (checksum,) = _CRC.unpack_from(self._buffer, at + _HEAD.size)
        if (found := crc32(head)) != checksum:
            raise self._corrupt(at, f"a damaged record header: {_differ(found, checksum)}")
        kind, flags, number, size, payload_checksum = _HEAD.unpack(head)
        if number != self._number:
            raise self._corrupt(at, f"its number is {number}; a record is missing, repeated or out of order")
        if flags & ~SKIPPABLE:
            raise self._corrupt(at, f"unknown flags {flags:#06x}, expected 0 or {SKIPPABLE:#06x}")
        if kind not in KINDS and not flags & SKIPPABLE:
            raise self._corrupt(at, f"unknown type {kind}, not marked as one that can be skipped")
        try:
            self._order.check_kind(kind, number, self._version)
        except Misplaced as error:
            raise self._corrupt(at, str(error)) from error
        limit = KINDS[kind].LIMIT if kind in KINDS else UNKNOWN_LIMIT
        if size > limit:
            raise self._corrupt(at, f"{noun(kind)} of {size} bytes, at most {limit} are read")
        return kind, size, payload_checksum

    def _decode(self, at: int, kind: int, payload: bytes) -> Record | None:
        """Return the record, or None for one that is skipped."""
        if kind not in KINDS:
            return None
        try:
            record = KINDS[kind].decode(payload)
        except Misshapen as error:
            raise self._corrupt(at, f"a malformed {noun(kind)}: {error}") from error
        try:
            self._order.take(record, self._offset + at + HEAD_SIZE + len(payload))
        except Misplaced as error:
            raise self._corrupt(at, str(error)) from error
        if isinstance(record, RamMapped):
            self.jump = record.onward
        elif isinstance(record, End):
            if record != (expected := End(self._number, self._checksum)):
                raise self._corrupt(at, f"the end of {_summary(record)}, expected {_summary(expected)}")
            self._ended = True
        return record

    def _corrupt(self, at: int, what: str) -> StreamCorrupt:
        return StreamCorrupt(reason=f"record {self._number} at offset {self._offset + at}: {what}")


def _differ(found: int, expected: int) -> str:
    return f"its checksum is {found:#010x}, expected {expected:#010x}"


def _summary(end: End) -> str:
    return f"{end.records} records with checksum {end.checksum:#010x}"
