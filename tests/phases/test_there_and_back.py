"""A guest that writes its memory all the time goes back and forth between processes, over tcp, and nothing is lost."""

from __future__ import annotations

import mmap
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Final

import pytest
import trio

from tests.phases.update_kit import descriptors_in, due, open_bench, outcome, ready
from tests.phases.zygote import open_zygote
from vmm.guests.dirtier import DirtierReader

if TYPE_CHECKING:
    from vmm.qmp_client import QmpClient

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

GUEST: Final = ("-kernel", "builtin:dirtier", "-append", "region=1M pages=4 hz=100", "-m", "16", "-nodefaults")
MOVES: Final = 10


async def test_ten_times_there_and_back_while_it_writes() -> None:
    with open_zygote() as zygote:
        async with open_bench(zygote.fork) as bench:
            here = bench.start(*GUEST)
            async with bench.session(here.qmp) as client:
                await ready(client)
            reader, written = DirtierReader(lambda _address, _size: b""), 0
            for _ in range(MOVES):
                there = bench.start("-incoming", "tcp:127.0.0.1:0")
                async with bench.session(here.qmp) as client, bench.session(there.qmp) as destination:
                    await bench.listening(there)
                    (address,) = (await destination.execute("query-migrate"))["socket-address"]
                    events = [{"capability": "events", "state": True}]
                    uri = f"tcp:{address['host']}:{address['port']}"
                    await client.execute("migrate", uri=uri, capabilities=events)
                    info = await outcome(client)
                    assert info["status"] == "completed", info
                    assert info["ram"]["dirty-sync-count"] >= 2
                    await runs(destination)
                    await client.execute("quit")
                assert await here.ended() == 0
                here = there
                with closing(memory_of(here.pid)) as memory:
                    reader.follow(partial(read, memory))
                    async with due("the guest to write on"):
                        while (reader.written() or 0) <= written + 16:  # noqa: ASYNC110 - a guest does not tell
                            await trio.sleep(0.005)
                    report = reader.look()
                    assert report is not None
                    assert report.intact, str(report)
                    written = report.dirtier.written


async def runs(client: QmpClient) -> None:
    """Wait until the guest runs."""
    async with due("the guest to run"):
        while (await client.execute("query-status"))["status"] != "running":
            await client.wait_event(lambda event: event["event"] == "RESUME")


def read(memory: mmap.mmap, address: int, size: int) -> bytes:
    """Read from RAM that begins at address 0."""
    return memory[address : address + size]


def memory_of(pid: int) -> mmap.mmap:
    """Map the guest's RAM in a process."""
    path = next(path for path, target in descriptors_in(pid) if target.startswith("/memfd:ram"))
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
