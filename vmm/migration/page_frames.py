"""The frames in which pages travel once the guest runs at the destination (postcopy): 32 bytes each, both ways.

    u32 magic "TVPC"   u32 kind   u64 page   u32 pages   u32 zero   u32 CRC-32C of the checksums   u32 of all this

The destination's side of them is C (fault_link.h).
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final, final

import attrs

from vmm.errors import StreamCorrupt
from vmm.kvm.page_file import checksum

_FRAME: Final = struct.Struct("<IIQIII")
_CRC: Final = struct.Struct("<I")
_MAGIC: Final = 0x43505654
FRAME_SIZE: Final = _FRAME.size + _CRC.size
MOST_PAGES: Final = 64
"""Pages of content in one frame."""


@final
class FrameKind(IntEnum):
    """What a frame says."""

    PAGES = 1
    """Their checksums follow, u32 each, and their content."""
    ZEROS = 2
    """These pages are zero."""
    SENT = 3
    """All pages were sent."""
    NEED = 4
    """The destination waits for these pages."""
    GOT = 5
    """The destination has all pages."""
    RESUME = 6
    """The source goes on after a break; 16 bytes that name the migration follow."""
    HAVE = 7
    """The pages that the destination has: a bitmap follows, whose CRC-32C is where that of checksums is."""
    BEGIN = 8
    """The destination has read all of the stream, and can take pages in."""
    LOADED = 9
    """The guest's state is in force at the destination."""
    REFUSED = 10
    """The destination does not take the guest: as many bytes of UTF-8 follow as there are `pages`, which say why."""
    YOURS = 11
    """The guest is the destination's."""


@final
@attrs.frozen
class Frame:
    """One frame."""

    kind: FrameKind
    page: int = 0
    pages: int = 0
    sums: int = 0

    def encode(self) -> bytes:
        """Return its bytes."""
        head = _FRAME.pack(_MAGIC, self.kind, self.page, self.pages, 0, self.sums)
        return head + _CRC.pack(checksum(head))

    @classmethod
    def decode(cls, data: bytes, *expected: FrameKind) -> Frame:
        """Undo `encode`. Raises `StreamCorrupt` for what is damaged, or of another kind than these."""
        magic, kind, page, pages, _, sums = _FRAME.unpack_from(data)
        if magic != _MAGIC or checksum(data[: _FRAME.size]) != _CRC.unpack_from(data, _FRAME.size)[0]:
            raise StreamCorrupt(reason=f"a damaged frame of pages: {data.hex()}")
        if kind not in expected:
            wanted = " or ".join(each.name for each in expected)
            raise StreamCorrupt(reason=f"a frame of pages of kind {kind}, expected {wanted}")
        return cls(FrameKind(kind), page, pages, sums)
