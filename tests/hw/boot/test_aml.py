from __future__ import annotations

import pytest

from vmm.hw.boot import aml


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, b"\x00"),
        (1, b"\x01"),
        (2, b"\x0a\x02"),
        (0x100, b"\x0b\x00\x01"),
        (0x1_0000, b"\x0c\x00\x00\x01\x00"),
        (1 << 32, b"\x0e\x00\x00\x00\x00\x01\x00\x00\x00"),
    ],
)
def test_an_integer_takes_the_shortest_form(value: int, encoded: bytes) -> None:
    assert aml.integer(value) == encoded


def test_an_integer_beyond_64_bits_has_none() -> None:
    with pytest.raises(ValueError, match="64 bits"):
        aml.integer(1 << 64)


def test_an_eisa_identifier_is_compressed() -> None:
    assert aml.eisa_id("PNP0A03") == b"\x0c\x41\xd0\x0a\x03"


@pytest.mark.parametrize(
    ("size", "length"),
    [(58, b"\x3f"), (59, b"\x41\x04"), (4089, b"\x4f\xff"), (4090, b"\x81\x00\x01"), (1 << 20, b"\xc8\x00\x00\x01")],
)
def test_a_length_counts_itself(size: int, length: bytes) -> None:
    # A device of this content: its name of four bytes is part of it.
    encoded = aml.device("DEV", bytes(size))
    assert encoded[:2] == b"\x5b\x82"
    assert encoded[2 : 2 + len(length)] == length
    assert encoded[2 + len(length) :] == b"DEV_" + bytes(size)
