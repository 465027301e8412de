"""Records of pages that come out of one piece that was read, together with a part of the content of the last."""

from __future__ import annotations

import socket
import tempfile
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from vmm import hostio
from vmm.errors import StreamCorrupt
from vmm.hw.doorbell import open_doorbell
from vmm.kvm.memory import PAGE_SIZE, GuestMemory
from vmm.kvm.page_map import PageMap
from vmm.migration import inflow
from vmm.migration.connection import Connection
from vmm.migration.inflow import Inflow
from vmm.migration.page_chunks import ChannelSink
from vmm.migration.pump import Bulk
from vmm.migration.ram import RamWriter
from vmm.migration.stream import StreamWriter
from vmm.migration.stream_file import read_stream_file
from vmm.migration.stream_records import PAGES_VERSION

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("no_leaks")

SIZE = 64 * PAGE_SIZE


def ram() -> closing[GuestMemory]:
    """Return memory of which nothing was used."""
    return closing(GuestMemory.from_memfd(hostio.create_ram(SIZE, "test"), SIZE))


async def test_pages_of_zeros_leave_the_content_of_those_after_them_alone(tmp_path: Path) -> None:
    path, content = tmp_path / "stream", bytes(range(1, 41)) * PAGE_SIZE
    with ram() as source, ram() as target:
        source.write(8 * PAGE_SIZE, content)
        (region,) = source.regions
        with path.open("wb") as file, open_doorbell() as bell:
            bulk = Bulk(file.fileno(), peer=False).heed(bell)
            writer = StreamWriter("test", version=PAGES_VERSION)
            sink = ChannelSink(source, writer, bulk)
            writer.ram_extents([(region.address, region.size)], in_stream=True)
            bulk.write(writer.take())
            todo = PageMap(SIZE // PAGE_SIZE)
            todo.add(3)
            sink.send(todo, region, 0, 8)
            todo.add(8, 40)
            sink.send(todo, region, 8, 48)
            bulk.write(writer.finish())
        with path.open("rb") as found:
            assert read_stream_file(found.fileno()).sent == 40
        target.write(3 * PAGE_SIZE, b"old")
        with path.open("rb") as found, closing(Inflow(Connection(hostio.dup(found.fileno())))) as flow:
            writer_of_ram = RamWriter(target, target)  # type: ignore[arg-type]  # a token would lead to just this
            await flow.read(lambda record: False, writer_of_ram)
        assert target.read(8 * PAGE_SIZE, 40 * PAGE_SIZE) == content


@pytest.mark.parametrize(("pieces", "passes", "late"), [(200, 200, False), (200, 1, True), (300, 300, True)])
async def test_short_passes_are_read_on_the_loop_but_none_that_is_long_nor_too_many(
    *, pieces: int, passes: int, late: bool
) -> None:
    writer = StreamWriter("test", version=PAGES_VERSION)
    writer.ram_extents([(0, SIZE)], in_stream=True)
    sent = [b"".join(writer.take())]
    for number in range(1, pieces + 1):
        if number <= passes:
            writer.ram_pass(number)
        else:
            writer.section(f"device{number}", 1, {})
        sent.append(b"".join(writer.take()))
    sent.append(b"".join(writer.finish()))
    calls: list[bool] = []
    ours, theirs = trio.socket.socketpair()
    with ram() as target, theirs, closing(Inflow(Connection(ours))) as flow:
        writer_of_ram = RamWriter(target, target)  # type: ignore[arg-type]  # as above
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                await flow.read_rest(lambda record: False, writer_of_ram, lambda: calls.append(True))

            nursery.start_soon(read)
            for piece in sent:
                await trio.testing.wait_all_tasks_blocked()
                await theirs.send(piece)
    assert calls == [True] * late


PIECE = 5000
"""Bytes that come at a time: not those of a page, nor of any record."""


def forty_pages() -> tuple[bytes, bytes]:
    """Return a stream of a pass with forty pages, and what is in them."""
    content = bytes(range(1, 41)) * PAGE_SIZE
    stream = bytearray()
    with ram() as source, tempfile.TemporaryFile() as file, open_doorbell() as bell:
        source.write(8 * PAGE_SIZE, content)
        (region,) = source.regions
        bulk = Bulk(file.fileno(), peer=False).heed(bell)
        writer = StreamWriter("test", version=PAGES_VERSION)
        writer.ram_extents([(region.address, region.size)], in_stream=True)
        writer.ram_pass(1)
        bulk.write(writer.take())
        todo = PageMap(SIZE // PAGE_SIZE)
        todo.add(8, 40)
        ChannelSink(source, writer, bulk).send(todo, region, 0, 64)
        bulk.write(writer.finish())
        file.seek(0)
        stream += file.read()
    return bytes(stream), content


@asynccontextmanager
async def in_pieces(stream: bytes, calls: list[str]) -> AsyncGenerator[GuestMemory, None]:
    """Have `stream` come in pieces to where it is read on the loop; yield its RAM once all has been read."""
    ours, theirs = trio.socket.socketpair()
    with ram() as target, closing(Inflow(Connection(ours))) as flow:
        writer_of_ram = RamWriter(target, target)  # type: ignore[arg-type]  # as above

        async def read() -> None:
            await flow.read_rest(lambda record: False, writer_of_ram, lambda: calls.append("late"))

        with theirs:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                for at in range(0, len(stream), PIECE):
                    if not calls:
                        await trio.testing.wait_all_tasks_blocked()
                    await theirs.send(stream[at : at + PIECE])
                theirs.shutdown(trio.socket.SHUT_WR)
        yield target


async def test_pages_that_come_in_pieces_are_read_on_the_loop() -> None:
    stream, content = forty_pages()
    calls: list[str] = []
    async with in_pieces(stream, calls) as target:
        assert target.read(8 * PAGE_SIZE, 40 * PAGE_SIZE) == content
    assert not calls


@pytest.mark.parametrize(("limit", "value"), [("_REST_BYTES", 16 * PAGE_SIZE), ("_REST_TURNS", 20), ("_MOMENT", 0.0)])
async def test_a_thread_goes_on_in_the_midst_of_pages(
    limit: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inflow, limit, value)
    stream, content = forty_pages()
    calls: list[str] = []
    async with in_pieces(stream, calls) as target:
        assert target.read(8 * PAGE_SIZE, 40 * PAGE_SIZE) == content
    assert calls == ["late"]


async def test_what_comes_between_two_looks_at_pages_belongs_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, content = forty_pages()
    pieces = [stream[at : at + PIECE] for at in range(0, len(stream), PIECE)]
    take_pages = RamWriter.take_pages
    ours, theirs = socket.socketpair()

    def taking(writer: RamWriter, *arguments: Any, **more: Any) -> bool:
        if not (whole := take_pages(writer, *arguments, **more)):
            theirs.sendall(pieces.pop(0))
        return whole

    monkeypatch.setattr(RamWriter, "take_pages", taking)
    with ram() as target, theirs, closing(Inflow(Connection(trio.socket.from_stdlib_socket(ours)))) as flow:
        theirs.sendall(pieces.pop(0))
        writer_of_ram = RamWriter(target, target)  # type: ignore[arg-type]  # as above
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flow.read_rest, lambda record: False, writer_of_ram, lambda: None)
            await trio.testing.wait_all_tasks_blocked()
            for piece in pieces:  # which come after the pages
                theirs.sendall(piece)
        assert target.read(8 * PAGE_SIZE, 40 * PAGE_SIZE) == content


async def test_a_stream_that_ends_in_the_midst_of_pages_is_cut_off_where_it_is() -> None:
    stream, _ = forty_pages()
    cut = len(stream) // 2
    with pytest.RaisesGroup(
        pytest.RaisesExc(StreamCorrupt, match=f"it ends after {cut} bytes; expected .* bytes of pages at offset {cut}")
    ):
        async with in_pieces(stream[:cut], []):
            pass


async def test_who_is_reset_in_the_midst_of_pages_is_told_what_broke() -> None:
    stream, _ = forty_pages()
    ours, theirs = trio.socket.socketpair()
    with ram() as target, closing(Inflow(Connection(ours))) as flow:
        writer_of_ram = RamWriter(target, target)  # type: ignore[arg-type]  # as above
        with pytest.RaisesGroup(pytest.RaisesExc(StreamCorrupt, match="the connection broke before its end record")):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(flow.read_rest, lambda record: False, writer_of_ram, lambda: None)
                await theirs.send(stream[: len(stream) // 2])
                await trio.testing.wait_all_tasks_blocked()
                await ours.send(b"something that the other side never reads")
                theirs.close()
