"""Records of RAM that is sent while the guest may run: pages, which may come again, in passes.

As in `vmm.migration.stream_records`, a payload is hostile. What a page's place is in the guest's RAM, the helpers in C
find out (`vmm/kvm/pages.c`, tv_chunk_parse): here is what can be said without a machine.
"""

from __future__ import annotations

import struct
from typing import ClassVar, Final, final

import attrs

from vmm.migration.section_payload import Misshapen

PAGE_SIZE: Final = 4096
CHUNK_PAGES: Final = 256  # with data, in one record
CHUNK_RUNS: Final = 512
TABLE: Final = struct.Struct("<IIQ")  # runs, method, bytes of content
RUN: Final = struct.Struct("<QII")  # guest-physical address, pages, kind
CHECKSUM: Final = struct.Struct("<I")
DATA, ZERO = 0, 1
"""Kinds of runs: pages that are among the content, and pages of zeros."""
RAW, ZLIB, ZSTD = 0, 1, 2
"""Methods: how the content is packed."""

_PASS: Final = struct.Struct("<I")


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
        if len(payload) != _PASS.size:
            raise Misshapen(f"{len(payload)} bytes, expected {_PASS.size}")
        return cls(*_PASS.unpack(payload))
