"""State streams taken apart, and put together again with every checksum right."""

from __future__ import annotations

import struct
from typing import Any, Final

import attrs

from vmm.kvm._pages import ffi, lib
from vmm.migration.ram_records import RamPages
from vmm.migration.stream import HEAD_SIZE, StreamReader, StreamWriter
from vmm.migration.stream_records import PAGES_VERSION, End, Header, Home
from vmm.migration.terms import Terms

PREAMBLE: Final = 12
"""Bytes before the first record of a stream."""


@attrs.frozen
class Pages:
    """A record `RamPages`, and what follows it."""

    record: RamPages
    content: bytes

    @classmethod
    def of(cls, *runs: tuple[int, bytes], checksum: int | None = None) -> Pages:
        """Return pages with these contents at these guest-physical addresses."""
        content = b"".join(data for _, data in runs)
        checksums = ffi.new("uint32_t[]", len(content) // 4096)
        address = int(ffi.cast("uintptr_t", ffi.from_buffer("uint8_t[]", content)))  # type: ignore[call-overload]
        lib.tv_checksum_pages(address, len(content) // 4096, checksums, ffi.NULL)
        if checksum is not None:
            checksums[0] = checksum
        table = struct.pack("<IIQ", len(runs), 0, len(content))
        table += b"".join(struct.pack("<QII", at, len(data) // 4096, 0) for at, data in runs)
        return cls(RamPages(table + bytes(ffi.buffer(checksums)[:])), content)


def records_of(data: bytes) -> list[Any]:
    """Return what a stream holds: records, and `Pages`. Of RAM at fixed places the records alone."""
    reader = StreamReader(seekable=True)
    found: list[Any] = []
    rest = data
    while not reader.ended:
        found += reader.feed(rest)
        rest = b""
        if reader.jump is not None:
            rest = data[reader.jump :]
            reader.jumped()
        if found and isinstance(found[-1], RamPages):
            found[-1] = Pages(found[-1], reader.take_content())
    return found


def stream_of(records: list[Any]) -> bytes:
    """Return a stream of these records, with an end of its own."""
    header, *rest = records
    assert isinstance(header, Header)
    writer = StreamWriter(header.machine, header.recipe_digest, version=PAGES_VERSION)
    data = b""
    for record in rest:
        if isinstance(record, Pages):
            data += b"".join(writer.take())
            data += writer.ram_pages(record.record.table) + record.record.table + record.content
        elif isinstance(record, Home):
            writer.home(record.commands)
        elif not isinstance(record, End):
            writer._add(record)
    return data + b"".join(writer.finish())


def answered(data: bytes) -> bytes:
    """Return a stream that was saved in a file as one whose source hears the destination, and waits for its words."""
    return stream_of([attrs.evolve(it, answers=True) if isinstance(it, Terms) else it for it in records_of(data)])


def head_of(data: bytes) -> int:
    """Return how many bytes of a stream are its preamble, header, recipe, processor and terms."""
    at = PREAMBLE
    for _ in range(4):
        at += HEAD_SIZE + int.from_bytes(data[at + 8 : at + 12], "little")
    return at
