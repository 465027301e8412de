"""ACPI machine language, as much of it as a description of this machine takes.

Source: ACPI Specification 6.5, chapter 20 (grammar and encoding) and 6.4 (resource descriptors).
"""

from __future__ import annotations

import struct


def integer(value: int) -> bytes:
    """ConstObj, ByteConst, WordConst, DWordConst or QWordConst, the shortest that fits."""
    if value in (0, 1):
        return bytes([value])
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if value < 1 << 8 * size:
            return bytes([prefix]) + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} does not fit into 64 bits")


def string(text: str) -> bytes:
    """A String of ASCII characters."""
    return b"\x0d" + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """A DWordConst that is the compressed identifier of a device, such as "PNP0A03"."""
    letters = [ord(letter) - 0x40 for letter in text[:3]]
    number = letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | int(text[3:], 16)
    return b"\x0c" + number.to_bytes(4, "big")


def name(segment: str, value: bytes) -> bytes:
    """DefName: `segment` of up to four characters stands for the object `value`."""
    return b"\x08" + _segment(segment) + value


def package(*elements: bytes) -> bytes:
    """DefPackage of at most 255 elements."""
    return b"\x12" + _with_length(bytes([len(elements)]) + b"".join(elements))


def buffer(content: bytes) -> bytes:
    """DefBuffer that holds `content`."""
    return b"\x11" + _with_length(integer(len(content)) + content)


def scope(segment: str, *objects: bytes) -> bytes:
    """DefScope below the root."""
    return b"\x10" + _with_length(b"\\" + _segment(segment) + b"".join(objects))


def device(segment: str, *objects: bytes) -> bytes:
    """DefDevice."""
    return b"\x5b\x82" + _with_length(_segment(segment) + b"".join(objects))


def resources(*descriptors: bytes) -> bytes:
    """The buffer that _CRS is: descriptors and an end tag without a checksum."""
    return buffer(b"".join(descriptors) + b"\x79\x00")


def io_port(ports: range) -> bytes:
    """Fixed I/O ports, decoded on 16 bits."""
    return struct.pack("<BBHHBB", 0x47, 1, ports.start, ports.start, 1, len(ports))


def memory(addresses: range) -> bytes:
    """Fixed addresses below 4 GiB, read and written."""
    return struct.pack("<BHBII", 0x86, 9, _READ_WRITE, addresses.start, len(addresses))


def interrupt(gsi: int) -> bytes:
    """An interrupt of the device's own, level-triggered and active high."""
    consumer_level_active_high = 0x01
    return struct.pack("<BHBBI", 0x89, 6, consumer_level_active_high, 1, gsi)


_MEMORY, _IO, _BUS = 0, 1, 2
_FIXED_PRODUCER = 0x0C  # minimum and maximum are fixed, decoded by what is below: a window of a bridge
_ENTIRE_RANGE = 0x03
_READ_WRITE = 0x01


def bus_window(numbers: range) -> bytes:
    """Bus numbers that a bridge passes on."""
    return _word_window(_BUS, 0, numbers)


def io_window(ports: range) -> bytes:
    """I/O ports that a bridge passes on."""
    return _word_window(_IO, _ENTIRE_RANGE, ports)


def memory_window(addresses: range) -> bytes:
    """Addresses that a bridge passes on: not prefetchable, not cacheable, read and write."""
    return struct.pack(
        "<BHBBBQQQQQ",
        0x8A,
        43,
        _MEMORY,
        _FIXED_PRODUCER,
        _READ_WRITE,
        *(0, addresses.start, addresses[-1], 0, len(addresses)),
    )


def _word_window(kind: int, flags: int, values: range) -> bytes:
    fields = (0, values.start, values[-1], 0, len(values))
    return struct.pack("<BHBBBHHHHH", 0x88, 13, kind, _FIXED_PRODUCER, flags, *fields)


def _segment(text: str) -> bytes:
    return text.ljust(4, "_").encode()


def _with_length(content: bytes) -> bytes:
    """Put a PkgLength before `content`; it counts its own bytes."""
    if len(content) + 1 < 1 << 6:
        return bytes([len(content) + 1]) + content
    for extra in (1, 2, 3):
        total = len(content) + 1 + extra
        if total < 1 << 4 + 8 * extra:
            return bytes([extra << 6 | total & 0xF]) + (total >> 4).to_bytes(extra, "little") + content
    raise ValueError(f"{len(content)} bytes are too many for one package")
