from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
import trio

from tests.migration.sample_stream import COMMANDS, EXTENTS, MACHINE, SAMPLE_SECTIONS, build
from vmm.errors import StreamCorrupt
from vmm.migration.ram_records import RamExtents
from vmm.migration.stream_io import StreamIntake
from vmm.migration.stream_records import Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator


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
    assert stream.header.machine == MACHINE
    assert stream.recipe == Recipe(COMMANDS)
    assert stream.sections == SAMPLE_SECTIONS
    assert stream.ram == (RamExtents(EXTENTS),)


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
