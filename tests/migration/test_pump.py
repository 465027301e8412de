from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import trio

from vmm.errors import HostFileRefused
from vmm.migration.pump import Bulk, ChannelBroken, in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from vmm.hw.doorbell import Doorbell

Pair = tuple[trio.socket.SocketType, trio.socket.SocketType]

pytestmark = pytest.mark.usefixtures("no_leaks")

MUCH = 8 << 20
"""More than any socket takes."""


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    left, right = trio.socket.socketpair()
    with left, right:
        yield left, right


async def write(sock: trio.socket.SocketType, data: bytes) -> int:
    def work(bell: Doorbell) -> int:
        bulk = Bulk(sock.fileno(), peer=True).heed(bell)
        bulk.write([data[:5], b"", memoryview(data)[5:]])
        return bulk.bytes

    return await in_thread(work)


async def read_all(sock: trio.socket.SocketType, count: int) -> bytes:
    found = b""
    while len(found) < count:
        found += await sock.recv(1 << 20)
    return found


async def test_more_than_a_socket_takes_goes_through_while_the_loop_runs(pair: Pair) -> None:
    data = os.urandom(MUCH)
    sent: list[int] = []

    async def send() -> None:
        sent.append(await write(pair[0], data))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        assert await read_all(pair[1], MUCH) == data
    assert sent == [MUCH]


async def test_a_cancelled_write_ends_though_nobody_reads(pair: Pair) -> None:
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, pair[0], bytes(MUCH))
            await pair[1].recv(1)
            scope.cancel()
    assert scope.cancelled_caught


async def test_a_cancelled_read_ends_though_nobody_writes(pair: Pair) -> None:
    def work(bell: Doorbell) -> int:
        return Bulk(pair[0].fileno(), peer=True).heed(bell).read_into(memoryview(bytearray(10)))

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_thread, work)
            await trio.lowlevel.checkpoint()
            scope.cancel()
    assert scope.cancelled_caught


async def test_a_peer_that_hangs_up_breaks_a_write(pair: Pair) -> None:
    pair[1].close()
    with pytest.raises(ChannelBroken):
        await write(pair[0], bytes(MUCH))


async def test_a_peer_that_speaks_breaks_a_write_and_what_it_said_is_still_there(pair: Pair) -> None:
    await pair[1].send(b"refused")
    with pytest.raises(ChannelBroken, match="it spoke first"):
        await write(pair[0], b"x")
    assert await pair[0].recv(10) == b"refused"


async def test_the_end_of_a_file_is_no_bytes_and_a_full_disk_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    source = os.open(tmp_path / "file", os.O_RDONLY)
    sink = os.open("/dev/full", os.O_WRONLY)
    try:

        def read(bell: Doorbell) -> list[int]:
            bulk = Bulk(source, peer=False).heed(bell)
            return [bulk.read_into(memoryview(bytearray(10))) for _ in range(2)]

        assert await in_thread(read) == [3, 0]
        with pytest.raises(HostFileRefused) as caught:
            await in_thread(lambda bell: Bulk(sink, peer=False).heed(bell).write([b"x"]))
        assert str(caught.value) == "Cannot write /dev/full: No space left on device"
    finally:
        os.close(source)
        os.close(sink)
