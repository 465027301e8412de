"""Records of pages that come out of one piece that was read, together with a part of the content of the last."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from vmm import hostio
from vmm.hw.doorbell import open_doorbell
from vmm.kvm.memory import PAGE_SIZE, GuestMemory
from vmm.kvm.page_map import PageMap
from vmm.migration.connection import Connection
from vmm.migration.inflow import Inflow
from vmm.migration.page_chunks import ChannelSink
from vmm.migration.pump import Bulk
from vmm.migration.ram import RamWriter
from vmm.migration.stream import StreamWriter
from vmm.migration.stream_file import read_stream_file
from vmm.migration.stream_records import PAGES_VERSION

if TYPE_CHECKING:
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
