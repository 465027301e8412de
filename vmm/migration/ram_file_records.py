"""Records of RAM that is in a file, and not in the stream: the machine's own, or this one, at fixed places.

As in `vmm.migration.stream_records`, a payload is hostile.
"""

from __future__ import annotations

import struct
from typing import ClassVar, Final, final

import attrs

from vmm.migration.ram_records import EXTENTS_LIMIT
from vmm.migration.record_fields import (
    EXTENT_SIZE,
    NAME_LIMIT,
    PAGE_SIZE,
    extent_table,
    pack_extents,
    pack_name,
    unpack_extents,
    unpack_fixed,
    unpack_name,
)
from vmm.migration.section_payload import Misshapen

IDENTITY_SIZE: Final = 16  # bytes

MAPPED_ALIGNMENT: Final = 1 << 20  # bytes: where pages begin that have fixed places in a file

_IN_PLACE: Final = struct.Struct("<Q16s")  # bytes, identity
_MAPPED: Final = struct.Struct("<IIQQQQ")  # bytes of a page, zero, bitmap, checksums, pages, what follows
_MAPPED_SUMS: Final = struct.Struct("<QII")  # pages that are there, CRC-32C of bitmap and of checksums


@final
@attrs.frozen
class RamInPlace:
    """All of the guest's RAM is in a file of its host, where it was left."""

    TYPE: ClassVar[int] = 6
    NOUN: ClassVar[str] = "notice of RAM in place"
    LIMIT: ClassVar[int] = 1 + NAME_LIMIT + _IN_PLACE.size

    name: str
    """What its back end is called."""
    size: int
    """Bytes."""
    identity: bytes
    """With which the file is marked, `IDENTITY_SIZE` bytes: of this save and no other."""

    def payload(self) -> bytes:
        """Encode. Raises `ValueError` for an identity that is none."""
        if len(self.identity) != IDENTITY_SIZE:
            raise ValueError(f"an identity has {IDENTITY_SIZE} bytes, not {len(self.identity)}")
        return pack_name(self.name) + _IN_PLACE.pack(self.size, self.identity)

    @classmethod
    def decode(cls, payload: bytes) -> RamInPlace:
        """Undo `payload`, or raise `Misshapen`."""
        name, at = unpack_name(payload)
        if len(payload) != at + _IN_PLACE.size:
            raise Misshapen(f"{len(payload) - at} bytes after the name, expected {_IN_PLACE.size}")
        return cls(name, *_IN_PLACE.unpack_from(payload, at))


@final
@attrs.frozen
class RamMapped:
    """All of the guest's RAM is in this file, each page at its fixed place; here is where.

    Places are bytes from the beginning of the stream. The pages of all extents are in one row, without gaps.
    """

    TYPE: ClassVar[int] = 11
    NOUN: ClassVar[str] = "map of RAM in the file"
    LIMIT: ClassVar[int] = _MAPPED.size + EXTENTS_LIMIT

    extents: tuple[tuple[int, int], ...]
    """As in `RamExtents`."""
    bitmap: int
    """One bit for each page that is not zero, in little-endian words of 64."""
    sums: int
    """The CRC-32C of each page, 4 bytes; of one that is zero, 0."""
    area: int
    """Page 0."""
    onward: int
    """The record that follows this one."""

    @property
    def pages(self) -> int:
        """How many pages there are."""
        return sum(size for _, size in self.extents) // PAGE_SIZE

    @property
    def bitmap_size(self) -> int:
        """Bytes."""
        return -(-self.pages // 64) * 8

    @classmethod
    def after(cls, at: int, extents: tuple[tuple[int, int], ...], start: int) -> RamMapped:
        """Lay the pages out behind this record.

        Args:
            at: where this record's payload begins in the stream.
            start: where the stream begins in the file, in which `area` is a multiple of `MAPPED_ALIGNMENT`.
        """
        plan = cls(extents, 0, 0, 0, 0)
        bitmap = _round_up(at + _MAPPED.size + len(extents) * EXTENT_SIZE, PAGE_SIZE)
        sums = _round_up(bitmap + plan.bitmap_size, PAGE_SIZE)
        area = _round_up(start + sums + 4 * plan.pages, MAPPED_ALIGNMENT) - start
        return cls(extents, bitmap, sums, area, area + plan.pages * PAGE_SIZE)

    def payload(self) -> bytes:
        """Encode. Raises `ValueError` for places that cannot be."""
        payload = _MAPPED.pack(PAGE_SIZE, 0, self.bitmap, self.sums, self.area, self.onward)
        payload += pack_extents(self.extents)
        self.decode(payload)
        return payload

    @classmethod
    def decode(cls, payload: bytes) -> RamMapped:
        """Undo `payload`, or raise `Misshapen`."""
        table = extent_table(payload, _MAPPED.size, least=1)
        page_size, zero, *places = _MAPPED.unpack_from(payload)
        if (page_size, zero) != (PAGE_SIZE, 0):
            raise Misshapen(f"pages of {page_size} bytes and {zero}, expected {PAGE_SIZE} and 0")
        found = cls(unpack_extents(table), *places)
        ends = (found.bitmap + found.bitmap_size, found.sums + 4 * found.pages, found.area + found.pages * PAGE_SIZE)
        if any(end > begin for end, begin in zip(ends, places[1:], strict=True)) or found.onward >= 1 << 62:
            raise Misshapen(f"bitmap, checksums, pages and what follows at {places}, which are too near to each other")
        return found


@final
@attrs.frozen
class RamMappedSums:
    """What was written where `RamMapped` says, once all of it is there."""

    TYPE: ClassVar[int] = 12
    NOUN: ClassVar[str] = "checksums of the map of RAM"
    LIMIT: ClassVar[int] = _MAPPED_SUMS.size

    present: int
    """How many pages are in the file."""
    bitmap: int
    """CRC-32C of the bitmap."""
    sums: int
    """CRC-32C of the table of checksums."""

    def payload(self) -> bytes:
        """Encode."""
        return _MAPPED_SUMS.pack(self.present, self.bitmap, self.sums)

    @classmethod
    def decode(cls, payload: bytes) -> RamMappedSums:
        """Undo `payload`, or raise `Misshapen`."""
        return cls(*unpack_fixed(_MAPPED_SUMS, payload))


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
