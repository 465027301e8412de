"""Records of RAM whose content is in the stream.

Where the guest stands, all of it is in records of content, once. Where it may run, it is in pages, which may come
again, in passes. As in `vmm.migration.stream_records`, a payload is hostile. What a page's place is in the guest's RAM,
the helpers in C find out (`vmm/kvm/pages.c`, tv_chunk_parse): here is what can be said without a machine.
"""

from __future__ import annotations

import struct
from typing import ClassVar, Final, final

import attrs

from vmm.migration.record_fields import (
    EXTENT_SIZE,
    PAGE_SIZE,
    extent_table,
    pack_extents,
    unpack_extents,
    unpack_fixed,
)
from vmm.migration.section_payload import Misshapen

EXTENTS_LIMIT: Final = 1 << 20  # bytes of payload
CONTENT_SIZE: Final = 1 << 20  # bytes of RAM in one record of content, at most
CONTENT_RUNS: Final = CONTENT_SIZE // PAGE_SIZE  # runs in one record, at most: each a page at least

CHUNK_PAGES: Final = 256  # with data, in one record of pages
CHUNK_RUNS: Final = 512
TABLE: Final = struct.Struct("<IIQ")  # runs, method, bytes of content
RUN: Final = struct.Struct("<QII")  # guest-physical address, pages, kind
CHECKSUM: Final = struct.Struct("<I")
DATA, ZERO = 0, 1
"""Kinds of runs: pages that are among the content, and pages of zeros."""
RAW, ZLIB, ZSTD = 0, 1, 2
"""Methods: how the content is packed."""

_WHERE: Final = struct.Struct("<I")
_COUNT: Final = struct.Struct("<I")
_PASS: Final = struct.Struct("<I")

_IN_SHARED_MEMORY: Final = 0
_IN_STREAM: Final = 1


@final
@attrs.frozen
class RamExtents:
    """Parts of the guest's RAM whose content belongs to this state."""

    TYPE: ClassVar[int] = 4
    NOUN: ClassVar[str] = "list of RAM extents"
    LIMIT: ClassVar[int] = EXTENTS_LIMIT

    extents: tuple[tuple[int, int], ...]
    """Guest-physical address and bytes of each: whole pages, ascending, apart from each other."""
    in_stream: bool = False
    """Whether the content is in the records of content that follow, zeros left out; else it is in the memory object
    whose descriptor was handed over."""

    def payload(self) -> bytes:
        """Encode. Raises `ValueError` for extents that are none."""
        where = _IN_STREAM if self.in_stream else _IN_SHARED_MEMORY
        payload = _WHERE.pack(where) + pack_extents(self.extents)
        if len(payload) > EXTENTS_LIMIT:
            raise ValueError(f"{len(self.extents)} extents do not fit into one record; write several")
        self.decode(payload)
        return payload

    @classmethod
    def decode(cls, payload: bytes) -> RamExtents:
        """Undo `payload`, or raise `Misshapen`."""
        table = extent_table(payload, _WHERE.size)
        (where,) = _WHERE.unpack_from(payload)
        if where not in (_IN_SHARED_MEMORY, _IN_STREAM):
            raise Misshapen(
                f"content of kind {where}, only {_IN_SHARED_MEMORY} (in shared memory) and {_IN_STREAM} (in this "
                "stream) are read here"
            )
        return cls(unpack_extents(table), where == _IN_STREAM)


@final
@attrs.frozen
class RamContent:
    """What is in some pages of RAM: at most `CONTENT_SIZE` bytes, in runs of pages that lie together.

    The record is a table (number of runs; of each its guest-physical address and bytes) and then the bytes. What no
    record of a stream has is zero.
    """

    TYPE: ClassVar[int] = 5
    NOUN: ClassVar[str] = "content of RAM"
    LIMIT: ClassVar[int] = _COUNT.size + CONTENT_RUNS * EXTENT_SIZE + CONTENT_SIZE

    runs: tuple[tuple[int, int], ...]
    """As `RamExtents.extents`; at least one."""
    data: tuple[bytes | memoryview, ...]
    """Of each run."""

    def table(self) -> bytes:
        """Return what comes before the bytes."""
        return _COUNT.pack(len(self.runs)) + pack_extents(self.runs)

    def payload(self) -> bytes:
        """Encode. Raises `ValueError` for runs that are none."""
        payload = b"".join((self.table(), *self.data))
        self.decode(payload)
        return payload

    @classmethod
    def decode(cls, payload: bytes) -> RamContent:
        """Undo `payload`, or raise `Misshapen`. The data are views of it."""
        view = memoryview(payload)
        count = _COUNT.unpack_from(payload)[0] if len(payload) >= _COUNT.size else 0
        at = _COUNT.size + count * EXTENT_SIZE
        if not 1 <= count <= CONTENT_RUNS or at > len(payload):
            raise Misshapen(f"no table of 1 to {CONTENT_RUNS} runs at its beginning")
        runs = unpack_extents(view[_COUNT.size : at])
        if (size := sum(size for _, size in runs)) != len(payload) - at:
            raise Misshapen(f"{len(payload) - at} bytes of content, its table says {size}")
        data: list[memoryview] = []
        for _, size in runs:
            data.append(view[at : at + size])
            at += size
        return cls(runs, tuple(data))


@final
@attrs.frozen
class RamPages:
    """Pages of RAM. The record is a table; their content, up to 1 MiB, follows it and is not part of it.

    A page may come again in a later record: the last one counts. What never came is zero.
    """

    TYPE: ClassVar[int] = 9
    NOUN: ClassVar[str] = "list of RAM pages"
    LIMIT: ClassVar[int] = TABLE.size + CHUNK_RUNS * RUN.size + CHUNK_PAGES * CHECKSUM.size

    table: bytes
    """Number of runs, method, and bytes of the content; the runs; the CRC-32C of each page with data, unpacked."""

    @property
    def content(self) -> int:
        """Bytes that follow the record."""
        return int(TABLE.unpack_from(self.table)[2])

    @property
    def method(self) -> int:
        """How they are packed."""
        return int(TABLE.unpack_from(self.table)[1])

    def runs(self) -> list[tuple[int, int, int]]:
        """Return guest-physical address, pages and kind of each run."""
        count = TABLE.unpack_from(self.table)[0]
        return list(RUN.iter_unpack(self.table[TABLE.size : TABLE.size + count * RUN.size]))

    def checksums(self) -> list[int]:
        """Return the CRC-32C of each page with data, in the order of the runs."""
        count = TABLE.unpack_from(self.table)[0]
        return [found for (found,) in CHECKSUM.iter_unpack(self.table[TABLE.size + count * RUN.size :])]

    def payload(self) -> bytes:
        """Encode."""
        return self.table

    @classmethod
    def decode(cls, payload: bytes) -> RamPages:
        """Undo `payload`, or raise `Misshapen`."""
        if len(payload) < TABLE.size:
            raise Misshapen("it ends before its numbers")
        count, method, content = TABLE.unpack_from(payload)
        if not 1 <= count <= CHUNK_RUNS or len(payload) < TABLE.size + count * RUN.size:
            raise Misshapen(f"{count} runs of pages, expected 1 to {CHUNK_RUNS}, all of them in it")
        record = cls(payload)
        pages = 0
        for address, size, kind in record.runs():
            if address % PAGE_SIZE or not size or kind not in (DATA, ZERO):
                raise Misshapen(f"{size} pages of kind {kind} at {address:#x} are none")
            pages += size if kind == DATA else 0
        if len(payload) != TABLE.size + count * RUN.size + pages * CHECKSUM.size or pages > CHUNK_PAGES:
            raise Misshapen(f"{pages} pages with data do not go with its {len(payload)} bytes")
        room = pages * PAGE_SIZE
        if method not in (RAW, ZLIB, ZSTD) or (content != room if method == RAW else content > room + PAGE_SIZE):
            raise Misshapen(f"{content} bytes of content, packed by method {method}, do not go with {pages} pages")
        return record


@final
@attrs.frozen
class RamPass:
    """A pass over the guest's RAM begins; the first sends all of it, each further one what was written meanwhile."""

    TYPE: ClassVar[int] = 10
    NOUN: ClassVar[str] = "beginning of a pass"
    LIMIT: ClassVar[int] = _PASS.size

    number: int
    """From 1."""

    def payload(self) -> bytes:
        """Encode."""
        return _PASS.pack(self.number)

    @classmethod
    def decode(cls, payload: bytes) -> RamPass:
        """Undo `payload`, or raise `Misshapen`."""
        return cls(*unpack_fixed(_PASS, payload))


@final
@attrs.frozen
class RamAbsent:
    """The pages that the destination has not got, or not as they are, while the guest begins to run there."""

    TYPE: ClassVar[int] = 13
    NOUN: ClassVar[str] = "list of absent pages"
    LIMIT: ClassVar[int] = 64 << 20  # that of 2 TiB

    words: bytes
    """One bit for each page of all extents in a row, in little-endian words of 64."""

    def payload(self) -> bytes:
        """Encode."""
        return self.words

    @classmethod
    def decode(cls, payload: bytes) -> RamAbsent:
        """Undo `payload`, or raise `Misshapen`."""
        if not payload or len(payload) % 8:
            raise Misshapen(f"{len(payload)} bytes, expected words of 8")
        return cls(payload)


@final
@attrs.frozen
class Switchover:
    """The guest is about to stand, and little of it is left: the source waits until the destination is ready."""

    TYPE: ClassVar[int] = 14
    NOUN: ClassVar[str] = "notice of the switchover"
    LIMIT: ClassVar[int] = 0

    def payload(self) -> bytes:
        """Encode."""
        return b""

    @classmethod
    def decode(cls, payload: bytes) -> Switchover:
        """Undo `payload`, whose length the limit has checked."""
        return cls()
