"""The corpora of further channels and of the frames of a postcopy."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Final

from tests.fuzz.channel_targets import IDENTITY, PAGES
from tests.phases.streams import Pages
from vmm.kvm.page_file import checksum
from vmm.kvm.page_map import PageMap
from vmm.migration.further import Preamble
from vmm.migration.multifd import ChannelWriter
from vmm.migration.page_frames import Frame, FrameKind
from vmm.migration.ram_records import RAW, RUN, TABLE, ZERO, ZLIB

if TYPE_CHECKING:
    from collections.abc import Callable

_PAGE: Final = 4096


def _preambles() -> dict[str, bytes]:
    return {
        "multifd": Preamble("multifd", 0, IDENTITY.hex()).encode(),
        "number": Preamble("multifd", 1, IDENTITY.hex()).encode(),
        "preempt": Preamble("preempt", 0, IDENTITY.hex()).encode(),
        "other": Preamble("multifd", 0, "ab" * 16).encode(),
    }


def _channels() -> dict[str, bytes]:
    zeros = TABLE.pack(1, RAW, 0) + RUN.pack(_PAGE, 3, ZERO)
    raw = Pages.of((0, b"a" * _PAGE), (4 * _PAGE, b"b" * 2 * _PAGE))
    packed = zlib.compress(raw.content)
    table = TABLE.pack(2, ZLIB, len(packed)) + raw.record.table[TABLE.size :]
    return {
        "raw": _channel(zeros, raw.record.table + raw.content, size=len(raw.record.table)),
        "packed": _channel(zeros, table + packed, size=len(table)),
        "empty": b"".join(ChannelWriter().end()),
    }


def _channel(zeros: bytes, pages: bytes, *, size: int) -> bytes:
    writer = ChannelWriter()
    parts = [writer.ram_pages(zeros), zeros, *writer.ram_pass(1), writer.ram_pages(pages[:size]), pages]
    return b"".join([*parts, *writer.ram_pass(2), *writer.end()])


def _said_by_destination() -> dict[str, bytes]:
    begin, loaded, got = (Frame(kind).encode() for kind in (FrameKind.BEGIN, FrameKind.LOADED, FrameKind.GOT))
    needs = b"".join(Frame(FrameKind.NEED, page, 1).encode() for page in (9, 2, 9))
    why = b"it is not to its taste"
    return {
        "loaded": begin + needs + loaded,
        "got": begin * 2 * PAGES + got,
        "all": begin + Frame(FrameKind.NEED, 0, PAGES).encode() + loaded + needs,
        "refused": begin + Frame(FrameKind.REFUSED, 0, len(why)).encode() + why,
    }


def _pages(first: int, *content: bytes) -> bytes:
    sums = b"".join(struct.pack("<I", checksum(each)) for each in content)
    return Frame(FrameKind.PAGES, first, len(content), checksum(sums)).encode() + sums + b"".join(content)


def _said_by_source() -> dict[str, bytes]:
    yours, sent = Frame(FrameKind.YOURS).encode(), Frame(FrameKind.SENT).encode()
    zeros = Frame(FrameKind.ZEROS, 3, PAGES - 3).encode()
    pages = _pages(1, b"a" * _PAGE, b"b" * _PAGE)
    return {
        "all": yours + pages + zeros + sent,
        "twice": zeros + _pages(9, b"c" * _PAGE) + Frame(FrameKind.ZEROS, 0, PAGES).encode() + sent,
        "damaged": yours + pages[:-1] + b"x" + zeros + sent,
        "lacking": pages + sent,
    }


def _greetings() -> dict[str, bytes]:
    here = PageMap(PAGES)
    here.add(2, 5)
    words = here.dump()
    why = b"it awaits the source of another migration"
    return {
        "resume": Frame(FrameKind.RESUME, 0, PAGES).encode() + IDENTITY,
        "other": Frame(FrameKind.RESUME, 0, PAGES).encode() + IDENTITY[::-1],
        "have": Frame(FrameKind.HAVE, 0, PAGES, checksum(words)).encode() + words,
        "refused": Frame(FrameKind.REFUSED, 0, len(why)).encode() + why,
    }


CHANNEL_SEEDS: Final[dict[str, Callable[[], dict[str, bytes]]]] = {
    "channel-preamble": _preambles,
    "multifd-channel": _channels,
    "postcopy-source": _said_by_destination,
    "postcopy-destination": _said_by_source,
    "postcopy-greeting": _greetings,
}
