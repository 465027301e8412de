"""Guests copied between processes, of which one is killed; and the options that a destination is started with."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.phases.copy_kit import listening
from tests.phases.update_kit import Ram, due, open_bench, outcome, ready

if TYPE_CHECKING:
    from tests.phases.update_kit import Bench, Process
    from vmm.qmp_client import QmpClient

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

GUEST = ("-kernel", "builtin:heartbeat", "-append", "region=4M", "-m", "16", "-nodefaults")


async def ticked(process: Process, count: int) -> None:
    """Wait until the guest in a process has ticked so many times, with nothing lost."""
    with closing(Ram(process.pid)) as ram:
        async with due(f"{count} ticks"):
            while (report := ram._reader.look()) is None or report.ticks < count:  # noqa: ASYNC110 - it does not tell
                await trio.sleep(0.01)
        assert report.intact, str(report)


async def status(client: QmpClient, command: str, wanted: str) -> dict[str, Any]:
    """Wait until what a query replies has this status."""
    async with due(f"{command} {wanted}"):
        while (found := await client.execute(command)).get("status") != wanted:  # noqa: ASYNC110 - nor does every change
            await trio.sleep(0.01)
    return dict(found)


async def running(client: QmpClient) -> None:
    """Wait until the guest runs."""
    await status(client, "query-status", "running")


async def address_of(client: QmpClient) -> str:
    """Wait until a destination listens; return its URI."""
    (address,) = (await status(client, "query-migrate", "setup"))["socket-address"]
    return f"tcp:{address['host']}:{address['port']}"


async def events(client: QmpClient) -> None:
    """Have the migration's changes told."""
    await client.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])


def machine(bench: Bench) -> Process:
    """Start a machine whose guest keeps its heartbeat."""
    return bench.start(*GUEST, qmp=bench.qmp)


@pytest.mark.parametrize("own", [(), GUEST])
async def test_incoming_on_a_dynamic_port_takes_the_guest(own: tuple[str, ...]) -> None:
    async with open_bench() as bench:
        source, destination = machine(bench), bench.start("-incoming", "tcp:127.0.0.1:0", *own)
        async with bench.session(bench.qmp) as client, bench.session(destination.qmp) as there:
            await ready(client)
            await events(client)
            await ticked(source, 20)
            await client.execute("migrate", uri=await address_of(there))
            assert (await outcome(client))["status"] == "completed"
            await running(there)
            await ticked(destination, 100)
            await client.execute("quit")
        assert await source.ended() == 0
        assert destination.said() == []


async def test_a_destination_started_with_s_waits_for_cont() -> None:
    async with open_bench() as bench:
        source, destination = machine(bench), bench.start("-incoming", "tcp:127.0.0.1:0", "-S")
        async with bench.session(bench.qmp) as client, bench.session(destination.qmp) as there:
            await ready(client)
            await events(client)
            await ticked(source, 20)
            await client.execute("migrate", uri=await address_of(there))
            assert (await outcome(client))["status"] == "completed"
            await status(there, "query-status", "paused")
            await there.execute("cont")
            await running(there)


@pytest.mark.parametrize("forwarded", [12, 600, 20_000, 100_000])
async def test_a_destination_that_is_killed_leaves_the_guest_where_it_was(forwarded: int) -> None:
    """It has had so many bytes of the stream, through the test."""
    async with open_bench() as bench, listening(bench.folder) as (uri, listener):
        source = machine(bench)
        destination = bench.start("-incoming", f"unix:{bench.folder}/there")
        async with bench.session(bench.qmp) as client, bench.session(destination.qmp) as there:
            await ready(client)
            await events(client)
            await ticked(source, 20)
            await status(there, "query-migrate", "setup")
        async with bench.session(bench.qmp) as client:
            await events(client)
            async with trio.open_nursery() as nursery:
                await client.execute("migrate", uri=uri)
                front = await listener.accept()
                back = await trio.open_unix_socket(f"{bench.folder}/there")
                nursery.start_soon(copy_words, back, front)
                await forward(front, back, forwarded)
                destination.kill()
                await destination.ended()
                await front.aclose()
                await back.aclose()
            assert (await outcome(client))["status"] == "failed"
            await running(client)
            with closing(Ram(source.pid)) as ram:
                before = ram.look().ticks
            await ticked(source, before + 20)


async def copy_words(back: trio.SocketStream, front: trio.SocketStream) -> None:
    """Pass what the destination says on to the source."""
    try:
        while data := await back.receive_some(65536):
            await front.send_all(data)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return


async def forward(front: trio.SocketStream, back: trio.SocketStream, count: int) -> None:
    """Pass so many bytes on, or all there are."""
    while count:
        async with due("more of the stream"):
            data = await front.receive_some(min(count, 65536))
        if not data:
            return
        count -= len(data)
        await back.send_all(data)


async def test_a_source_that_is_killed_ends_a_destination_with_the_reason() -> None:
    async with open_bench() as bench, listening(bench.folder) as (uri, listener):
        source = machine(bench)
        destination = bench.start("-incoming", f"unix:{bench.folder}/there")
        async with bench.session(destination.qmp) as there:
            await status(there, "query-migrate", "setup")
        async with bench.session(bench.qmp) as client:
            await ready(client)
            await ticked(source, 20)
            await client.execute("migrate", uri=uri)
            front = await listener.accept()
            back = await trio.open_unix_socket(f"{bench.folder}/there")
            async with front, back, trio.open_nursery() as nursery:
                nursery.start_soon(copy_words, back, front)
                await forward(front, back, 100_000)
                source.kill()
                await source.ended()
                await back.send_eof()
                assert await destination.ended() == 1
                nursery.cancel_scope.cancel()
        (said,) = destination.said()
        assert said.startswith("trio-vmm: State stream: it ends after 100000 bytes; expected ")


async def test_a_file_that_is_no_state_ends_a_start_with_one_reason() -> None:
    async with open_bench() as bench:
        (bench.folder / "state").write_bytes(b"this is not what it should be")
        for options in (GUEST, ("-nodefaults",)):
            process = bench.start(*options, "-loadvm", f"{bench.folder}/state")
            assert await process.ended() == 1
            (said,) = process.said()
            assert said.endswith("State stream: it begins with 7468697320697320, expected 8954564d4d0d0a1a")


async def test_a_destination_s_reason_is_on_its_standard_error_and_with_the_source() -> None:
    async with open_bench() as bench:
        source = machine(bench)
        destination = bench.start("-incoming", "tcp:127.0.0.1:0", *GUEST[:4], "-m", "32", "-nodefaults")
        async with bench.session(bench.qmp) as client, bench.session(destination.qmp) as there:
            await ready(client)
            await events(client)
            await ticked(source, 20)
            await client.execute("migrate", uri=await address_of(there))
            info = await outcome(client)
        assert info["status"] == "failed"
        assert await destination.ended() == 1
        (said,) = destination.said()
        assert "machine-set.memory ({'size': 16777216} there, {'size': 33554432} here)" in said
        assert info["error-desc"] == f"Refused by the destination: {said.removeprefix('trio-vmm: ')}"
