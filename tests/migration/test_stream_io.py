from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from tests.migration.sample_stream import COMMANDS, EXTENTS, MACHINE, SAMPLE_SECTIONS, build, writer_of_sample
from vmm.errors import StreamCorrupt
from vmm.migration.ram_records import RamExtents
from vmm.migration.stream_io import StreamIntake, receive_stream, send_stream
from vmm.migration.stream_records import Recipe

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


@pytest.fixture
async def pair() -> AsyncIterator[tuple[trio.SocketStream, trio.SocketStream]]:
    left, right = trio.socket.socketpair()
    with left, right:
        yield trio.SocketStream(left), trio.SocketStream(right)


Pair = tuple[trio.SocketStream, trio.SocketStream]


async def test_a_stream_goes_through_a_socket(pair: Pair) -> None:
    source, target = pair
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_stream, source, writer_of_sample())
        stream = await receive_stream(target)
    assert stream.header.machine == MACHINE
    assert stream.recipe == Recipe(COMMANDS)
    assert stream.sections == SAMPLE_SECTIONS
    assert stream.ram == (RamExtents(EXTENTS),)


async def test_sending_tells_the_number_of_bytes(pair: Pair) -> None:
    assert await send_stream(pair[0], writer_of_sample()) == len(build())


async def test_receiving_ends_with_the_end_record_while_the_channel_stays_open(pair: Pair) -> None:
    source, target = pair
    await source.send_all(build())
    await receive_stream(target)
    await source.send_all(b"more")
    assert await target.receive_some() == b"more"


async def test_a_channel_that_ends_early_is_told(pair: Pair) -> None:
    source, target = pair
    await source.send_all(build()[:40])
    await source.aclose()
    with pytest.raises(StreamCorrupt) as caught:
        await receive_stream(target)
    assert str(caught.value) == (
        "State stream: it ends after 40 bytes; expected record 0 at offset 12: header of 43 bytes"
    )


async def test_a_broken_channel_is_told() -> None:
    async def broken() -> None:
        raise trio.BrokenResourceError

    channel = trio.testing.MemoryReceiveStream(receive_some_hook=broken)
    with pytest.raises(StreamCorrupt) as caught:
        await receive_stream(channel)
    assert str(caught.value) == "State stream: the connection broke before its end record"


async def test_a_limit_holds_for_the_whole_stream(pair: Pair) -> None:
    source, target = pair
    await source.send_all(build())
    with pytest.raises(StreamCorrupt) as caught:
        await receive_stream(target, limit=100)
    assert str(caught.value) == "State stream: it has more than 100 bytes, the most that is read here"


async def test_sending_to_nobody_is_for_the_caller_to_tell(pair: Pair) -> None:
    source, target = pair
    await target.aclose()
    with pytest.raises(trio.BrokenResourceError):
        await send_stream(source, writer_of_sample())


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    right.setblocking(False)
    with left, right:
        yield left, right


async def test_an_intake_returns_a_stream_once_all_of_it_is_there(ends: tuple[socket.socket, socket.socket]) -> None:
    source, target = ends
    intake, data = StreamIntake(target), build()
    assert intake.at_once() is None
    source.sendall(data[:100])
    assert intake.at_once() is None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, lambda: source.sendall(data[100:]))
        stream = await intake.all()
    assert stream.sections == SAMPLE_SECTIONS


@pytest.mark.parametrize("sent", [0, 100])
def test_an_intake_says_where_a_stream_breaks_off(ends: tuple[socket.socket, socket.socket], sent: int) -> None:
    source, target = ends
    source.sendall(build()[:sent])
    source.close()
    with pytest.raises(StreamCorrupt, match=f"it ends after {sent} bytes"):
        StreamIntake(target).at_once()


def test_an_intake_takes_a_broken_connection_for_a_broken_stream(ends: tuple[socket.socket, socket.socket]) -> None:
    source, target = ends
    target.sendall(b"unread: so the close is a reset")
    source.close()
    with pytest.raises(StreamCorrupt, match="the connection broke before its end record"):
        StreamIntake(target).at_once()
