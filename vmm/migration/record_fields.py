"""What the payloads of several records have in common: names, tables of extents, and a fixed shape.

As in `vmm.migration.stream_records`, a payload is hostile: who undoes it raises `Misshapen`.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final

from vmm.migration.section_payload import Misshapen

if TYPE_CHECKING:
    from collections.abc import Iterable

NAME_LIMIT: Final = 255  # bytes of UTF-8
PAGE_SIZE: Final = 4096  # bytes

_EXTENT: Final = struct.Struct("<QQ")  # guest-physical address, bytes
EXTENT_SIZE: Final = _EXTENT.size


def pack_name(name: str) -> bytes:
    """Return the length of `name` and it. Raises `Misshapen` where it does not fit."""
    try:
        text = name.encode()
    except UnicodeEncodeError as error:
        raise Misshapen("its name is not Unicode") from error
    if not 1 <= len(text) <= NAME_LIMIT:
        raise Misshapen(f"its name has {len(text)} bytes, 1 to {NAME_LIMIT} fit")
    return bytes([len(text)]) + text


def unpack_name(payload: bytes) -> tuple[str, int]:
    """Return the name that `payload` begins with, and where it ends."""
    end = 1 + payload[0] if payload else 0
    if not 2 <= end <= len(payload):
        raise Misshapen(f"no name of 1 to {NAME_LIMIT} bytes at its beginning")
    try:
        return payload[1:end].decode(), end
    except UnicodeDecodeError as error:
        raise Misshapen("a name that is not UTF-8") from error


def pack_extents(extents: Iterable[tuple[int, int]]) -> bytes:
    """Return the table of `extents`: guest-physical address and bytes of each."""
    return b"".join(_EXTENT.pack(*extent) for extent in extents)


def extent_table(payload: bytes, at: int, *, least: int = 0) -> memoryview:
    """Return `payload` from `at` on. Raises `Misshapen` unless its size is that of `least` extents or more."""
    size = len(payload) - at
    if size < least * EXTENT_SIZE or size % EXTENT_SIZE:
        raise Misshapen(f"{len(payload)} bytes, expected {at} and {EXTENT_SIZE} for each extent")
    return memoryview(payload)[at:]


def unpack_extents(table: memoryview) -> tuple[tuple[int, int], ...]:
    """Undo `pack_extents`. Raises `Misshapen` unless they are whole pages, ascending, apart from each other."""
    extents = tuple(_EXTENT.iter_unpack(table))
    end = 0
    for address, size in extents:
        if address < end or not size or (address | size) % PAGE_SIZE or address + size > 1 << 64:
            raise Misshapen(f"extent {address:#x} of {size:#x} bytes is empty, misaligned or out of order")
        end = address + size
    return extents


def unpack_fixed(shape: struct.Struct, payload: bytes) -> tuple[Any, ...]:
    """Undo `shape.pack`. Raises `Misshapen` where the size is another."""
    if len(payload) != shape.size:
        raise Misshapen(f"{len(payload)} bytes, expected {shape.size}")
    return shape.unpack(payload)
