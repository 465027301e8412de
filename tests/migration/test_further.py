"""How a further channel begins, and what is made of bytes that are none."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING
from zlib import crc32

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.errors import MigrationPeerGone, StreamCorrupt
from vmm.migration.connection import Connection
from vmm.migration.further import SIZE, Gathering, Preamble, new_id, open_channels

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

pytestmark = pytest.mark.usefixtures("no_leaks")

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


@settings(deadline=None)  # of a loaded machine nothing is known
@given(st.integers(0, SIZE * 8 - 1))
def test_whatever_bit_is_flipped_it_is_none(bit: int) -> None:
    data = bytearray(Preamble("preempt", 0, IDENTITY).encode())
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(StreamCorrupt):
        Preamble.decode(bytes(data))


@settings(deadline=None)  # of a loaded machine nothing is known
@given(st.binary(min_size=SIZE, max_size=SIZE))
def test_any_bytes_are_one_or_are_refused(data: bytes) -> None:
    try:
        preamble = Preamble.decode(data)
    except StreamCorrupt:
        return
    assert len(preamble.id) == 32


# --- opened, and gathered -----------------------------------------------------------------------------------------


def pair() -> tuple[Connection, trio.socket.SocketType]:
    """Return a connection, and the socket at its other end."""
    ours, theirs = trio.socket.socketpair()
    return Connection(ours), theirs


async def nobody() -> None:
    """Never see the source go."""
    await trio.sleep_forever()


async def plain(connection: Connection) -> Connection:
    """Leave it as it is."""
    await trio.lowlevel.checkpoint()
    return connection


def gathering(
    connections: list[Connection], complaints: list[str], gone: Callable[[], Awaitable[None]] = nobody
) -> Gathering:
    """Return one to which these connect, and then nobody."""

    async def accept() -> Connection:
        if not connections:
            await trio.sleep_forever()
        return connections.pop(0)

    return Gathering(accept, plain, complaints.append, identity=IDENTITY, each=10, gone=gone)


async def test_channels_are_found_whatever_their_order() -> None:
    (a, far_a), (b, far_b) = pair(), pair()
    with far_a, far_b:
        await far_a.send(Preamble("multifd", 1, IDENTITY).encode())
        await far_b.send(Preamble("multifd", 0, IDENTITY).encode())
        assert await gathering([a, b], []).gather("multifd", 2, within=60) == [b, a]
        a.close()
        b.close()


async def test_whoever_says_nothing_has_a_limit_and_so_have_all(autojump_clock: trio.abc.Clock) -> None:
    silent, far = pair()
    complaints: list[str] = []
    with far:
        with pytest.raises(MigrationPeerGone) as caught:
            await gathering([silent], complaints).gather("multifd", 1, within=60)
        assert await far.recv(1) == b""
    assert complaints == ["Whoever connected did not say within 10 s which channel it is"]
    assert str(caught.value) == ("The source opened 0 of 1 channels of kind multifd within 60 s; the guest stays there")


async def test_nobody_is_waited_for_once_the_source_has_gone() -> None:
    with pytest.raises(MigrationPeerGone) as caught:
        await gathering([], [], trio.lowlevel.checkpoint).gather("preempt", 1, within=60)
    assert str(caught.value) == (
        "The source closed the connection, and opened 0 of 1 channels of kind preempt; the guest stays there"
    )


async def test_a_wait_that_is_called_off_leaves_nothing_open() -> None:
    (good, far_good), (silent, far_silent) = pair(), pair()
    with far_good, far_silent:
        await far_good.send(Preamble("multifd", 0, IDENTITY).encode())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: gathering([good, silent], []).gather("multifd", 2, within=60))
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        for far in (far_good, far_silent):
            assert await far.recv(1) == b""


async def test_a_destination_that_takes_no_further_channel_is_named() -> None:
    first, far = pair()
    refused, nobody_there = pair()
    nobody_there.close()
    connections = [first, refused]

    async def dial() -> Connection:
        await trio.lowlevel.checkpoint()
        return connections.pop(0)

    with far:
        with pytest.raises(MigrationPeerGone) as caught:
            await open_channels(dial, "multifd", 2, IDENTITY)
        assert str(caught.value) == (
            "The destination closed channel 1 of kind multifd at once; the guest goes on in the source"
        )
        assert Preamble.decode(await far.recv(SIZE)) == Preamble("multifd", 0, IDENTITY)
        assert await far.recv(1) == b""
