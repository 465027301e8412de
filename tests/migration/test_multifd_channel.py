"""The records of one further channel, and what is said of those that are none."""

from __future__ import annotations

import os
import socket
import struct
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Final
from zlib import crc32

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm import hostio
from vmm.errors import StreamCorrupt
from vmm.hw.doorbell import Doorbell
from vmm.kvm.memory import PAGE_SIZE, GuestMemory
from vmm.migration.connection import Connection
from vmm.migration.multifd import ChannelWriter
from vmm.migration.multifd_intake import ChannelReader, MultifdIntake
from vmm.migration.pump import Bulk
from vmm.migration.ram_records import DATA, RAW, RUN, TABLE, ZERO, RamPages, RamPass
from vmm.migration.stream_records import End

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from vmm.migration.stream_records import Record

pytestmark = pytest.mark.usefixtures("no_leaks")

HANGS: Final = 30.0
"""Seconds after which a test says that what it waits for does not come. No outcome depends on it."""

ZEROS = TABLE.pack(1, RAW, 0) + RUN.pack(0x1000, 3, ZERO)


def written() -> bytes:
    """Return a channel with pages of zeros, two passes and an end."""
    writer = ChannelWriter()
    parts = [writer.ram_pages(ZEROS), ZEROS, *writer.ram_pass(1), *writer.ram_pass(2), *writer.end()]
    return b"".join(parts)


def read(data: bytes) -> list[Record]:
    """Return what a reader makes of `data` and no more."""
    ours, theirs = socket.socketpair()
    with ours, theirs, open(os.eventfd(0), "rb", buffering=0) as quiet:
        ours.setblocking(False)
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        bulk = Bulk(ours.fileno(), peer=True).heed(Doorbell(quiet.fileno()))
        reader = ChannelReader(3)
        found: list[Record] = []
        while not found or not isinstance(found[-1], End):
            found.append(reader.next(bulk))
        return found


def test_what_was_written_is_read() -> None:
    pages, first, second, end = read(written())
    assert pages == RamPages(ZEROS)
    assert (first, second) == (RamPass(1), RamPass(2))
    assert isinstance(end, End)
    assert end.records == 3


def record(kind: int, number: int, payload: bytes, flags: int = 0) -> bytes:
    head = struct.pack("<HHIII", kind, flags, number, len(payload), crc32(payload))
    return head + struct.pack("<I", crc32(head)) + payload


HUGE = struct.pack("<HHIII", 10, 0, 0, 1 << 30, 0)
DATA_PAGES = TABLE.pack(1, RAW, 4096) + RUN.pack(0x1000, 2, DATA) + bytes(8)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "it ends there, before its end record"),
        (record(10, 0, bytes(4))[:-1], "it ends there, before its end record"),
        (b"x" * 20, "a damaged record header"),
        (record(10, 1, bytes(4)), "its number is 1; a record is missing, repeated or out of order"),
        (record(3, 0, b""), "a record of type 3 and flags 0x0000 has no place on it"),
        (record(10, 0, bytes(4), 1), "a record of type 10 and flags 0x0001 has no place on it"),
        (HUGE + struct.pack("<I", crc32(HUGE)), "beginning of a pass of 1073741824 bytes, at most 4 are read"),
        (record(10, 0, bytes(4))[:-1] + b"x", "a damaged beginning of a pass"),
        (record(10, 0, b""), "a malformed beginning of a pass: 0 bytes, expected 4"),
        (record(9, 0, DATA_PAGES), "a malformed list of RAM pages: "),
        (record(0xFFFF, 0, struct.pack("<II", 0, 1)), "its end is not that of what came before"),
    ],
)
def test_what_is_none_is_named(data: bytes, what: str) -> None:
    with pytest.raises(StreamCorrupt) as caught:
        read(data)
    assert str(caught.value).startswith("State stream: multifd channel 3, record 0, before offset ")
    assert f": {what}" in str(caught.value)


@settings(deadline=None)  # of a loaded machine nothing is known
@given(st.integers(0, len(written()) * 8 - 1))
def test_whatever_bit_is_flipped_it_is_noticed(bit: int) -> None:
    data = bytearray(written())
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(StreamCorrupt):
        read(bytes(data))


@settings(deadline=None)  # of a loaded machine nothing is known
@given(st.integers(0, len(written()) - 1))
def test_wherever_it_ends_it_is_noticed(size: int) -> None:
    with pytest.raises(StreamCorrupt):
        read(written()[:size])


@asynccontextmanager
async def intake(said: bytes) -> AsyncGenerator[MultifdIntake]:
    """Yield a destination's channels, of which there is one, on which `said` comes and nothing more for now."""
    near, far = socket.socketpair()
    with far, closing(GuestMemory.from_memfd(hostio.create_ram(PAGE_SIZE, "test"), PAGE_SIZE)) as memory:
        connection = Connection(trio.socket.from_stdlib_socket(near))
        far.sendall(said)
        with closing(MultifdIntake(memory, [connection], store=True, packings=[None])) as channels:
            yield channels


async def test_a_pass_that_does_not_come_next_is_not_waited_for() -> None:
    async with intake(b"") as channels:
        with trio.fail_after(HANGS), pytest.raises(StreamCorrupt) as caught:
            await channels.beside(lambda: trio.to_thread.run_sync(channels.begins, 7))
    assert str(caught.value) == "State stream: it begins pass 7 over RAM, expected pass 1"


async def test_a_channel_that_has_ended_is_not_waited_for() -> None:
    def stream() -> None:
        for number in (1, 2, 3):
            channels.begins(number)

    async with intake(b"".join(ChannelWriter().end())) as channels:
        with trio.fail_after(HANGS):
            await channels.beside(lambda: trio.to_thread.run_sync(stream))
