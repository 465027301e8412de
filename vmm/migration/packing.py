"""How the content of a chunk of pages is packed: by zlib, or by zstd. Each chunk by itself.

What comes is hostile: nothing is made larger than the pages that it is said to be.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias, final

from vmm.errors import StreamCorrupt, Unsupported
from vmm.migration.ram_records import ZLIB, ZSTD

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

Buffer: TypeAlias = "bytes | bytearray | memoryview"

_WINDOW: Final = 1 << 21
"""Bytes that an unpacker of zstd may be told to remember: more than a chunk has."""


class Packing(Protocol):
    """One method. Made for one thread."""

    method: int
    """Of the record RamPages."""

    def pack(self, content: Buffer) -> bytes:
        """Return `content` packed."""

    def unpack(self, packed: Buffer, size: int) -> bytes:
        """Return the `size` bytes that were packed. Raises `StreamCorrupt`."""


def packing(name: str, parameters: Mapping[str, Any] | None = None) -> Packing | None:
    """Return the method of that name, of parameter `multifd-compression`; None for `none`.

    Args:
        parameters: for the level, where it is to pack.

    Raises:
        Unsupported: this host has no library for it.
    """
    values = parameters or {}
    if name == "zlib":
        return _Zlib(int(values.get("multifd-zlib-level", 1)))
    if name == "zstd":
        return _Zstd(_zstandard(), int(values.get("multifd-zstd-level", 1)))
    return None


def _zstandard() -> ModuleType:
    try:
        import zstandard
    except ImportError as error:
        instead = "install the Python package zstandard, or use zlib"
        raise Unsupported(what="Migration parameter multifd-compression", name="zstd", instead=instead) from error
    return zstandard


def _wrong(what: str, size: int) -> StreamCorrupt:
    return StreamCorrupt(reason=f"pages that are packed with {what} are not {size} bytes, or damaged")


@final
class _Zlib:
    method = ZLIB

    def __init__(self, level: int) -> None:
        self._level = level

    def pack(self, content: Buffer) -> bytes:
        return zlib.compress(content, self._level)

    def unpack(self, packed: Buffer, size: int) -> bytes:
        unpacker = zlib.decompressobj()
        try:
            found = unpacker.decompress(packed, size + 1)
        except zlib.error as error:
            raise _wrong("zlib", size) from error
        if len(found) != size or not unpacker.eof or unpacker.unused_data:
            raise _wrong("zlib", size)
        return found


@final
class _Zstd:
    method = ZSTD

    def __init__(self, library: ModuleType, level: int) -> None:
        self._library = library
        self._packer = library.ZstdCompressor(level=level)
        self._unpacker = library.ZstdDecompressor(max_window_size=_WINDOW)

    def pack(self, content: Buffer) -> bytes:
        return bytes(self._packer.compress(content))

    def unpack(self, packed: Buffer, size: int) -> bytes:
        # One byte more than there should be, to see that there is no more.
        found = memoryview(bytearray(size + 1))
        at = 0
        try:
            with self._unpacker.stream_reader(packed) as reader:
                while count := reader.readinto(found[at:]):
                    at += count
        except self._library.ZstdError as error:
            raise _wrong("zstd", size) from error
        if at != size:
            raise _wrong("zstd", size)
        return bytes(found[:size])
