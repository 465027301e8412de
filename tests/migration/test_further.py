"""How a further channel begins, and what is made of bytes that are none."""

from __future__ import annotations

import struct
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.errors import StreamCorrupt
from vmm.migration.further import SIZE, Preamble, new_id

IDENTITY = "0123456789abcdef" * 2


def test_a_channel_begins_with_these_bytes() -> None:
    data = Preamble("multifd", 15, IDENTITY).encode()
    assert data[:-4] == b"\x89TVMC\r\n\x1a" + bytes.fromhex("0100 01 00 0f00 0000") + bytes.fromhex(IDENTITY)
    assert data[-4:] == struct.pack("<I", crc32(data[:-4]))
    assert len(data) == SIZE == 36


@pytest.mark.parametrize("kind", ["multifd", "preempt"])
def test_what_was_written_is_read(kind: str) -> None:
    preamble = Preamble(kind, 0xFFFF, new_id())  # type: ignore[arg-type]
    assert Preamble.decode(preamble.encode()) == preamble


def with_sum(body: bytes) -> bytes:
    return body + struct.pack("<I", crc32(body))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (bytes(SIZE), f"a further channel begins with {bytes(8)!r}, expected b'\\x89TVMC\\r\\n\\x1a'"),
        (
            with_sum(b"\x89TVMC\r\n\x1a\2\0\1\0" + bytes(20)),
            "a further channel of version 2 and kind 1; version 1 and kinds 1 to 2 are known here",
        ),
        (
            with_sum(b"\x89TVMC\r\n\x1a\1\0\0\0" + bytes(20)),
            "a further channel of version 1 and kind 0; version 1 and kinds 1 to 2 are known here",
        ),
        (
            with_sum(b"\x89TVMC\r\n\x1a\1\0\3\0" + bytes(20)),
            "a further channel of version 1 and kind 3; version 1 and kinds 1 to 2 are known here",
        ),
        (
            b"\x89TVMC\r\n\x1a" + bytes(28),
            "a further channel's beginning has CRC-32 0x00000000, not 0xd1a66ee3",
        ),
    ],
)
def test_what_is_none_is_named(data: bytes, reason: str) -> None:
    with pytest.raises(StreamCorrupt) as caught:
        Preamble.decode(data)
    if "CRC-32" in reason:
        found = crc32(data[:-4])
        reason = f"a further channel's beginning has CRC-32 {found:#010x}, not 0x00000000"
    assert str(caught.value) == f"State stream: {reason}"


@given(st.integers(0, SIZE * 8 - 1))
def test_whatever_bit_is_flipped_it_is_none(bit: int) -> None:
    data = bytearray(Preamble("preempt", 0, IDENTITY).encode())
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(StreamCorrupt):
        Preamble.decode(bytes(data))


@given(st.binary(min_size=SIZE, max_size=SIZE))
def test_any_bytes_are_one_or_are_refused(data: bytes) -> None:
    try:
        preamble = Preamble.decode(data)
    except StreamCorrupt:
        return
    assert len(preamble.id) == 32
