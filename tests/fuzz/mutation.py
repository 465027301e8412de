"""Changes to an input, as hypothesis draws and shrinks them."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, TypeAlias
from zlib import crc32

import attrs
from hypothesis import strategies as st

from vmm.kvm.page_file import checksum as crc32c
from vmm.migration.stream import HEAD_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PREAMBLE: Final = 12
_HEAD: Final = struct.Struct("<HHIII")
_END: Final = 0xFFFF
_PAGES: Final = 9
_CONTENT: Final = struct.Struct("<Q")
_MAPPED, _MAPPED_SUMS = 11, 12
_PLACES: Final = struct.Struct("<8xQQQQ")  # bitmap, checksums, pages, what follows
_TOTALS: Final = struct.Struct("<QII")

Edit: TypeAlias = "Flip | Put | Cut | Repeat | Number | Splice"


@attrs.frozen
class Flip:
    """Turn one bit over."""

    bit: int

    def apply(self, data: bytearray, _others: Sequence[bytes]) -> None:
        """Change `data`, which is not empty."""
        at = self.bit // 8 % len(data)
        data[at] ^= 1 << self.bit % 8


@attrs.frozen
class Put:
    """Put bytes over those that are there, or between them."""

    at: int
    new: bytes
    between: bool

    def apply(self, data: bytearray, _others: Sequence[bytes]) -> None:
        """Change `data`."""
        at = self.at % (len(data) + 1)
        data[at : at if self.between else at + len(self.new)] = self.new


@attrs.frozen
class Cut:
    """Take some bytes out, or all from there on."""

    at: int
    size: int

    def apply(self, data: bytearray, _others: Sequence[bytes]) -> None:
        """Change `data`."""
        at = self.at % len(data)
        del data[at : at + self.size]


@attrs.frozen
class Repeat:
    """Have some bytes again, behind themselves."""

    at: int
    size: int

    def apply(self, data: bytearray, _others: Sequence[bytes]) -> None:
        """Change `data`."""
        at = self.at % len(data)
        data[at:at] = data[at : at + self.size]


@attrs.frozen
class Number:
    """Put a number over what is there, of a size and an alignment that formats like."""

    at: int
    value: int
    size: int

    def apply(self, data: bytearray, _others: Sequence[bytes]) -> None:
        """Change `data`."""
        at = self.at % len(data) // 4 * 4
        data[at : at + self.size] = (self.value & (1 << 8 * self.size) - 1).to_bytes(self.size, "little")


@attrs.frozen
class Splice:
    """Go on with another input of the corpus."""

    at: int
    other: int
    begin: int

    def apply(self, data: bytearray, others: Sequence[bytes]) -> None:
        """Change `data`."""
        other = others[self.other % len(others)]
        data[self.at % len(data) :] = other[self.begin % (len(other) + 1) :]


@attrs.frozen
class Case:
    """One input, as it is made."""

    seed: int
    """Which of the corpus."""
    edits: list[Edit]
    repair: bool
    """Whether checksums and numbers of records are made right again, so that what is behind them is reached."""
    pieces: list[int]
    """Sizes of the pieces in which it comes; the last one goes on to the end."""

    def build(self, corpus: Sequence[bytes], repair: Callable[[bytes], bytes]) -> bytes:
        """Return it."""
        data = bytearray(corpus[self.seed % len(corpus)])
        for edit in self.edits:
            if data:
                edit.apply(data, corpus)
        return repair(bytes(data)) if self.repair else bytes(data)

    def cut(self, data: bytes) -> list[bytes]:
        """Return `data` in the pieces in which it comes."""
        found, at = [], 0
        for size in self.pieces:
            found.append(data[at : at + size])
            at += size
        return [piece for piece in (*found, data[at:]) if piece]


_AT: Final = st.integers(0, 1 << 20)
_SIZES: Final = st.one_of(st.integers(1, 16), st.integers(1, 5000))
_VALUES: Final = st.one_of(
    st.sampled_from([0, 1, 0x7F, 0xFF, 0xFFF, 0x1000, 0x7FFF_FFFF, 0xFFFF_FFFF, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]),
    st.integers(0, (1 << 64) - 1),
)
_EDITS: Final = st.one_of(
    st.builds(Flip, st.integers(0, 1 << 23)),
    st.builds(Number, _AT, _VALUES, st.sampled_from([1, 2, 4, 8])),
    st.builds(Put, _AT, st.binary(min_size=1, max_size=24), st.booleans()),
    st.builds(Cut, _AT, _SIZES),
    st.builds(Repeat, _AT, _SIZES),
    st.builds(Splice, _AT, st.integers(0, 63), _AT),
)

CASES: Final = st.builds(
    Case,
    st.integers(0, 63),
    st.lists(_EDITS, max_size=6),
    st.booleans(),
    st.lists(st.one_of(st.integers(1, 64), st.integers(1, 1 << 16)), max_size=4),
)
"""Inputs."""


def repaired(data: bytes, preamble: int = PREAMBLE) -> bytes:
    """Make the checksums and the numbers of records right, as far as there are records in `data` behind a preamble."""
    if len(data) < preamble:
        return data
    out = bytearray(data[:preamble])
    checksum = crc32(out)
    at, number = preamble, 0
    mapped: tuple[int, ...] | None = None
    while at + HEAD_SIZE <= len(data):
        kind, flags, _, size, _ = _HEAD.unpack_from(data, at)
        payload = data[at + HEAD_SIZE : at + HEAD_SIZE + size]
        if kind == _END and size == 8:
            payload = struct.pack("<II", number, checksum)
        elif kind == _MAPPED_SUMS and size == _TOTALS.size and mapped is not None:
            payload = _totals(data, mapped)
        head = _HEAD.pack(kind, flags, number, size, crc32(payload))
        head += struct.pack("<I", crc32(head))
        out += head + payload
        checksum = crc32(head, checksum)
        number += 1
        at += HEAD_SIZE + size
        if kind == _PAGES and len(payload) >= 16:  # their content follows, and is not part of the record
            (content,) = _CONTENT.unpack_from(payload, 8)
            out += data[at : at + content]
            at += content
        elif kind == _MAPPED and len(payload) >= _PLACES.size:  # what its places are of lies in between
            mapped = _PLACES.unpack_from(payload)
            onward = max(at, mapped[-1])
            out += data[at:onward]
            at = onward
    out += data[at:]
    return bytes(out)


def _totals(data: bytes, places: tuple[int, ...]) -> bytes:
    """Return what the record of checksums of a map of RAM should be, if nothing lies between its tables."""
    bitmap, sums, area, _ = places
    listed, table = data[bitmap:sums], data[sums:area]
    return _TOTALS.pack(int.from_bytes(listed, "little").bit_count(), crc32c(listed), crc32c(table))
