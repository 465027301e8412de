"""Clients of a monitor keep their connection through a live update, and all that hangs on it."""

from __future__ import annotations

import json
import os
import socket
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.monitor.fakes import Client
from tests.phases.machine import Running, connected
from tests.phases.test_live_update_strangers import stranger
from tests.phases.update_kit import due
from tests.phases.update_pair import Pair, add_fd, concluded, hand_over, pair
from vmm import host_sockets
from vmm.capabilities import ADMIN, MayRunVcpus
from vmm.errors import CprRefused
from vmm.phases.running import Run
from vmm.qmp_client import CommandFailed

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from pathlib import Path

    from vmm.monitor.ports import Caller
    from vmm.qmp_client import QmpClient

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]


async def go_over(made: Pair, client: QmpClient, new: Running) -> None:
    """Update the machine with its clients, at the wish of one of them."""
    await hand_over(made, client, made.machines.index(new), migrate_sessions=True)
    assert (await concluded(new))["status"] == "completed"


@asynccontextmanager
async def raw(made: Pair, *, oob: bool = False) -> AsyncGenerator[Client, None]:
    """Connect a client that says what it likes."""
    with trio.socket.from_stdlib_socket(host_sockets.unconnected_unix()) as sock:
        await sock.connect(str(made.qmp))
        client = Client(sock)
        await client.negotiate(oob=oob)
        yield client


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something in the machines, which are in the same loop: each look is a turn of it."""
    with trio.fail_after(20):
        while not condition():
            await trio.lowlevel.checkpoint()


def run_of(running: Running) -> Run:
    """Return a machine's run control."""
    token, _ = running.tree.find("cont", (MayRunVcpus,), None, ADMIN, "a test")
    run = token._cell.facet("")
    assert isinstance(run, Run)
    return run


async def replies(client: Client, count: int) -> list[dict[str, Any]]:
    """Read so many replies; what happens between them is left out."""
    found: list[dict[str, Any]] = []
    with trio.fail_after(20):
        while len(found) < count:
            message = await client.receive()
            assert message is not None, f"the machine hung up after {found}"
            if "event" not in message:
                found.append(message)
    return found


def names(events: Any) -> list[str]:
    """Return which of some events tell of the guest."""
    return [event["event"] for event in events if event["event"] in ("STOP", "RESUME", "RESET", "SHUTDOWN")]


async def test_a_client_keeps_its_connection_and_sees_the_change_and_the_source_ends(tmp_path: Path) -> None:
    async with pair(tmp_path) as made, made.destination() as new, connected(made.qmp) as client:
        old = made.machines[0]
        await go_over(made, client, new)
        async with due("the end of the source"):
            await old.ended.wait()
        assert old.status == 0
        assert (await client.execute("query-status"))["running"]
        info = await client.execute("query-migrate")
        assert (info["status"], "x-pause" in info) == ("completed", True)
        # Of the source up to the pause, and of the destination from then on; not that the source has ended.
        assert names(client.events) == ["STOP", "RESUME"]
        assert made.qmp.exists()
        async with connected(made.qmp) as later:
            assert len(await later.execute("query-monitors")) == 2
        await client.execute("quit")


async def test_without_being_asked_for_clients_stay(tmp_path: Path) -> None:
    async with pair(tmp_path) as made, made.destination() as new, connected(made.qmp) as client:
        await hand_over(made, client, 1)
        assert (await concluded(new))["status"] == "completed"
        assert (await client.execute("query-status"))["status"] == "postmigrate"
        await client.execute("quit")
        await made.machines[0].ended.wait()


async def test_the_parameter_can_be_set_for_good_and_goes_over_too(tmp_path: Path) -> None:
    async with pair(tmp_path) as made, connected(made.qmp) as client, AsyncExitStack() as stack:
        await client.execute("migrate-set-parameters", migrate_sessions=True, mode="cpr-transfer")
        for number in (1, 2):
            new = await stack.enter_async_context(made.destination())
            await client.execute("migrate", channels=made.where(number))
            assert (await concluded(new))["status"] == "completed"
        assert (await client.execute("query-migrate-parameters"))["migrate-sessions"]


async def test_every_request_is_carried_out_once_and_answered_in_order_through_several_updates(tmp_path: Path) -> None:
    """Some only look, some wait for their turn, and some for the guest; they come before, in and after each change."""
    words = ("query-status", "stop", "query-fdsets", "cont", "query-migrate-parameters", "query-name")
    async with pair(tmp_path) as made, connected(made.qmp) as mover, raw(made) as client, AsyncExitStack() as stack:
        carried_out = [counted(made.machines[0])]
        first = 0
        for _ in range(4):
            requests = [{"execute": words[n % len(words)], "id": n} for n in range(first, first + 250)]
            await client.send(b"".join(json.dumps(request).encode() for request in requests[:200]))
            if first:
                new = await stack.enter_async_context(made.destination())
                carried_out.append(counted(new))
                await go_over(made, mover, new)
            await client.send(b"".join(json.dumps(request).encode() for request in requests[200:]))
            found = await replies(client, 250)
            assert [reply["id"] for reply in found] == list(range(first, first + 250))
            assert all("return" in reply for reply in found)
            first += 250
        assert [len(done) >= 50 for done in carried_out] == [True] * 4
        assert sum(len(done) for done in carried_out) == 1000


def counted(running: Running) -> list[str]:
    """Return the list of the commands that a machine carries out from now on for the client that says what it likes."""
    execute, done = running.host.table.execute, list[str]()

    async def noted(caller: Caller, name: str, arguments: Any) -> object:
        result = await execute(caller, name, arguments)
        if caller.name.endswith("/3"):
            done.append(name)
        return result

    running.host.table.execute = noted  # type: ignore[method-assign]
    return done


async def test_out_of_band_requests_and_those_that_wait_for_them_are_all_answered(tmp_path: Path) -> None:
    async with pair(tmp_path) as made, made.destination() as new, raw(made, oob=True) as client:  # noqa: SIM117
        async with connected(made.qmp) as mover:
            old = made.machines[0]
            run = run_of(old)
            async with run.control:
                await hand_over(made, mover, 1, migrate_sessions=True)
                await until(lambda: run.control.statistics().tasks_waiting == 1)
                requests = [{"execute": "stop", "id": 0}] + [{"execute": "query-status", "id": n} for n in range(1, 20)]
                await client.send(b"".join(json.dumps(request).encode() for request in requests))
                await until(lambda: run.control.statistics().tasks_waiting == 2)
            assert (await concluded(new))["status"] == "completed"
            found = await replies(client, 20)
            assert [reply["id"] for reply in found] == list(range(20))
            assert found[1]["return"] == {"running": False, "status": "paused"}


async def test_what_waits_for_the_guest_is_carried_out_once_and_by_the_successor(tmp_path: Path) -> None:
    async with pair(tmp_path) as made, made.destination() as new, raw(made) as one, raw(made) as other:
        async with connected(made.qmp) as mover:
            old = made.machines[0]
            run = run_of(old)
            async with run.control:
                await hand_over(made, mover, 1, migrate_sessions=True)
                await until(lambda: run.control.statistics().tasks_waiting == 1)
                # One waits for the run control, with its turn; the other for its turn.
                await one.send(b'{"execute":"stop","id":1}{"execute":"query-status","id":2}{"execute":"cont","id":3}')
                await until(lambda: run.control.statistics().tasks_waiting == 2)
                await other.send({"execute": "system_reset", "id": 9})
                await until(lambda: old.tree._turnstile.statistics().tasks_waiting == 1)
            assert (await concluded(new))["status"] == "completed"
            first = await replies(one, 3)
            assert [reply["id"] for reply in first] == [1, 2, 3]
            assert first[1]["return"] == {"running": False, "status": "paused"}
            assert await replies(other, 1) == [{"return": {}, "id": 9}]
            assert (await mover.execute("query-status"))["running"]
        async with due("the end of the source"):
            await old.ended.wait()
        assert [name for name, _ in old.events() if name in ("STOP", "RESET", "RESUME")] == ["RESUME", "STOP"]
        told = [name for name, _ in new.events() if name in ("STOP", "RESET", "RESUME")]
        assert sorted(told) == ["RESET", "RESUME", "RESUME", "STOP"]


async def test_half_a_request_and_half_a_reply_are_completed(tmp_path: Path) -> None:
    async with pair(tmp_path) as made, made.destination() as new, raw(made) as client, connected(made.qmp) as mover:
        session = made.machines[0].host.stores.moving[0]._monitor.sessions["qmp_compat_monitor0/2"]
        schema = {"execute": "query-qmp-schema"}
        await client.send(b"".join(json.dumps(schema | {"id": n}).encode() for n in range(20)))
        await until(lambda: not session._output.has_room)
        await client.send(b'{"execute": "query-st')
        await go_over(made, mover, new)
        await client.send(b'atus", "id": "last"}')
        found = await replies(client, 21)
        assert [reply["id"] for reply in found] == [*range(20), "last"]
        assert len({json.dumps(reply["return"]) for reply in found[:20]}) == 1
        assert found[-1]["return"]["running"]


async def test_what_a_client_has_not_been_told_of_it_is_told_in_order(tmp_path: Path) -> None:
    async with pair(tmp_path) as made, raw(made) as client, connected(made.qmp) as mover, AsyncExitStack() as stack:
        for _ in range(2):
            await go_over(made, mover, await stack.enter_async_context(made.destination()))
        await client.send({"execute": "query-status", "id": 1})
        seen = []
        while "id" not in (message := await client.receive()):
            seen.append(message)
        assert names(seen) == ["STOP", "RESUME", "STOP", "RESUME"]
        times = [(event["timestamp"]["seconds"], event["timestamp"]["microseconds"]) for event in seen]
        assert times == sorted(times)


async def test_descriptors_of_a_client_go_with_it(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    async with pair(tmp_path) as made, made.destination() as new, connected(made.qmp) as client:
        await send_fd(client, reading)
        await client.execute("getfd", fdname="r")
        await send_fd(client, writing)
        await client.execute("query-status")
        session = made.machines[0].host.stores.moving[0]._monitor.sessions["qmp_compat_monitor0/2"]
        await go_over(made, client, new)
        await made.machines[0].ended.wait()
        moved = new.host.stores.moving[1]._monitor.sessions["qmp_compat_monitor0/2"]
        assert moved is not session
        assert os.fstat(moved.descriptors["r"]).st_ino == os.fstat(reading).st_ino
        await client.execute("add-fd", fdset_id=4)
        assert os.fstat(new.host.stores._fdsets.sets[4][0].fd).st_ino == os.fstat(writing).st_ino
        os.close(writing)
        os.close(reading)
        await client.execute("closefd", fdname="r")
        with pytest.raises(CommandFailed, match="no descriptor 'r'"):
            await client.execute("closefd", fdname="r")


async def send_fd(client: QmpClient, fd: int) -> None:
    """Send a descriptor with nothing but white space."""
    await trio.lowlevel.wait_writable(client._sock)
    with socket.fromfd(client._sock.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as copy:
        socket.send_fds(copy, [b"\n"], [fd])


async def test_an_update_that_fails_leaves_the_clients_as_if_nothing_had_been(tmp_path: Path) -> None:
    async with pair(tmp_path) as made, connected(made.qmp) as mover, raw(made) as client:
        old = made.machines[0]
        await mover.execute("migrate-set-parameters", mode="cpr-transfer", migrate_sessions=True)
        await add_fd(mover, 0, fdset_id=1)
        async with stranger(made, mover) as it:  # type: ignore[arg-type]
            await it.reach("paused")
            await client.send({"execute": "stop", "id": 1})
            await client.send(b'{"execute": "query-status", ')
            await it.channel.refuse("no")
            assert (await concluded(old))["status"] == "failed"
        await client.send(b'"id": 2}')
        found = await replies(client, 2)
        assert found == [
            {"return": {}, "id": 1},
            {"return": {"running": False, "status": "paused"}, "id": 2},
        ]
        assert [fdset["fdset-id"] for fdset in await mover.execute("query-fdsets")] == [1]
        assert not old.ended.is_set()
        async with made.destination() as new:
            # And the next one takes them along.
            await go_over(made, mover, new)
            await client.send({"execute": "query-name", "id": 3})
            assert [reply["id"] for reply in await replies(client, 1)] == [3]


async def test_a_client_that_is_too_far_behind_to_go_along_is_told_of_before_the_pause(tmp_path: Path) -> None:
    async with pair(tmp_path) as made, connected(made.qmp) as mover:
        old = made.machines[0]
        await mover.execute("migrate-set-parameters", mode="cpr-transfer", migrate_sessions=True)
        async with raw(made) as client:
            await client.send(b'{"execute": "' + b"x" * (9 << 20))
            async with stranger(made, mover) as it:  # type: ignore[arg-type]
                await it.reach("machine")
                await it.channel.send("ready", {})
                with pytest.raises(CprRefused) as caught:
                    await it.channel.receive("paused")
        reason = (
            "migrate: monitor qmp_compat_monitor0 has 9437201 bytes that were not read, by it or by its clients, of "
            "which 8388608 go along; leave migrate-sessions out, or let them leave"
        )
        assert str(caught.value) == f"Live update refused by the source at step 'building': {reason}"
        assert (await concluded(old))["error-desc"] == reason
        assert [name for name, _ in old.events() if name == "STOP"] == []
        async with made.destination() as new:
            await go_over(made, mover, new)


async def test_a_monitor_over_one_connection_goes_along_with_its_client(tmp_path: Path) -> None:
    with host_sockets.listen_unix(str(tmp_path / "other")) as listener:
        options = ("-chardev", f"socket,id=one,path={tmp_path}/other,server=off", "-mon", "chardev=one")
        async with pair(tmp_path, *options) as made, connected(made.qmp) as mover, AsyncExitStack() as stack:
            sock = stack.enter_context(trio.socket.from_stdlib_socket(listener.accept()[0]))
            client = Client(sock)
            await client.negotiate()
            before = await mover.execute("query-monitors")
            for _ in range(2):
                await client.send(b'{"execute": "query-st')
                new = await stack.enter_async_context(made.destination())
                await go_over(made, mover, new)
                await client.send(b'atus", "id": 1}')
                assert (await replies(client, 1))[0]["return"]["running"]
            after = [it for it in await mover.execute("query-monitors") if it["chardev"] in ("one", "compat_monitor0")]
            assert sorted(after, key=str) == sorted(before, key=str)
            # Once it has left, there is nothing to go along, and it is no part of the machine.
            sock.close()
            await until(lambda: new.host.stores.single_monitors() == set())
            await go_over(made, mover, last := await stack.enter_async_context(made.destination()))
            assert "mon0" not in last.host.stores.monitors


async def test_without_being_asked_for_a_monitor_over_one_connection_stays(tmp_path: Path) -> None:
    with host_sockets.listen_unix(str(tmp_path / "other")) as listener:
        options = ("-chardev", f"socket,id=one,path={tmp_path}/other,server=off", "-mon", "chardev=one")
        async with pair(tmp_path, *options) as made, made.destination() as new, connected(made.qmp) as mover:
            with trio.socket.from_stdlib_socket(listener.accept()[0]) as sock:
                client = Client(sock)
                await client.negotiate()
                await hand_over(made, mover, 1)
                assert (await concluded(new))["status"] == "completed"
                await client.send({"execute": "query-status", "id": 1})
                assert (await replies(client, 1))[0]["return"]["status"] == "postmigrate"
                assert "mon0" not in new.host.stores.monitors
                await mover.execute("quit")


async def test_clients_of_a_tcp_port_go_along_as_well(tmp_path: Path) -> None:
    async with (
        pair(tmp_path, "-qmp", "tcp:127.0.0.1:0,server=on,wait=off") as made,
        made.destination() as new,
        connected(made.qmp) as mover,
    ):
        (where,) = [it["filename"] for it in await mover.execute("query-chardev") if it["label"] == "compat_monitor1"]
        port = int(where.partition(",")[0].rpartition(":")[2])
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            client = Client(stream.socket)
            await client.negotiate()
            await client.send(b'{"execute": "query-st')
            await go_over(made, mover, new)
            await client.send(b'atus", "id": 1}')
            assert (await replies(client, 1))[0]["return"]["running"]
