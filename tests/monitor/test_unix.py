from __future__ import annotations

import json
import os
import socket
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.monitor.fakes import VERSION, Client, FakeExecutor
from vmm.errors import PeerRefused
from vmm.host_sockets import admit_peer, listen_unix
from vmm.monitor.events import EventHub
from vmm.monitor.session import SessionOptions
from vmm.monitor.unix import qmp_monitor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vmm.monitor.session import Session
    from vmm.monitor.unix import SocketMonitor


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with listen_unix(str(tmp_path / "qmp")) as sock:
        yield sock


def admit(sock: socket.socket) -> None:
    admit_peer(sock, "/run/qmp")


def monitor(log: list[str] | None = None) -> SocketMonitor[Session]:
    sink = [] if log is None else log
    return qmp_monitor("qmp0", FakeExecutor(), EventHub([]), SessionOptions(VERSION), sink.append)


async def connect(listener: socket.socket) -> Client:
    sock = trio.socket.socket(socket.AF_UNIX)
    await sock.connect(listener.getsockname())
    return Client(sock)


async def test_several_clients_are_served_at_the_same_time(listener: socket.socket) -> None:
    it = monitor()
    async with trio.open_nursery() as nursery:
        await nursery.start(it.serve_listener, listener, admit)
        clients = [await connect(listener) for _ in range(3)]
        for client in clients:
            await client.negotiate()
        assert sorted(it.sessions) == ["qmp0/1", "qmp0/2", "qmp0/3"]
        for n, client in enumerate(clients):
            assert await client.ask({"execute": "echo", "arguments": {"n": n}}) == {"return": {"n": n}}
            client.sock.close()
        nursery.cancel_scope.cancel()


async def test_a_stranger_is_hung_up_on_with_a_line_of_log(listener: socket.socket) -> None:
    log: list[str] = []

    def admit_nobody(sock: socket.socket) -> None:
        raise PeerRefused(path="/run/qmp", uid=1001, wanted=1000)

    async with trio.open_nursery() as nursery:
        await nursery.start(monitor(log).serve_listener, listener, admit_nobody)
        client = await connect(listener)
        assert await client.receive() is None
        assert log == ["qmp0: Peer of /run/qmp has uid 1001; only uid 1000 and root are admitted"]
        client.sock.close()
        nursery.cancel_scope.cancel()


async def test_after_quiesce_nothing_is_accepted_nor_read_until_resume(listener: socket.socket) -> None:
    it = monitor()
    async with trio.open_nursery() as nursery:
        await nursery.start(it.serve_listener, listener, admit)
        old = await connect(listener)
        await old.negotiate()
        it.quiesce()
        new = await connect(listener)
        await old.send({"execute": "echo"})
        await wait_all_tasks_blocked()
        assert len(it.sessions) == 1
        # What a successor with the same descriptors would find: the connection and the bytes are still there.
        taken, _ = listener.accept()
        taken.close()
        assert await new.receive() is None
        newer = await connect(listener)
        it.resume()
        assert await old.receive() == {"return": {}}
        assert "QMP" in await newer.receive()
        for client in (old, new, newer):
            client.sock.close()
        nursery.cancel_scope.cancel()


async def test_after_stop_listening_nobody_is_accepted_and_sessions_stay(listener: socket.socket) -> None:
    it = monitor()
    async with trio.open_nursery() as nursery:
        await nursery.start(it.serve_listener, listener, admit)
        old = await connect(listener)
        await old.negotiate()
        it.stop_listening()
        late = await connect(listener)
        assert await old.ask({"execute": "echo"}) == {"return": {}}
        await wait_all_tasks_blocked()
        assert list(it.sessions) == ["qmp0/1"]
        old.sock.close()
        late.sock.close()


async def test_accepting_can_be_held_by_itself(listener: socket.socket) -> None:
    it = monitor()
    async with trio.open_nursery() as nursery:
        await nursery.start(it.serve_listener, listener, admit)
        old = await connect(listener)
        await old.negotiate()
        it.quiesce(sessions=False)
        late = await connect(listener)
        assert await old.ask({"execute": "echo"}) == {"return": {}}
        await wait_all_tasks_blocked()
        assert len(it.sessions) == 1
        it.resume()
        await late.negotiate()
        for client in (old, late):
            client.sock.close()
        nursery.cancel_scope.cancel()


async def test_a_monitor_speaks_over_plain_descriptors_and_leaves_them_as_they_were() -> None:
    to_us, from_us = os.pipe(), os.pipe()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(monitor().serve_descriptors, to_us[0], from_us[1])
        reader = trio.lowlevel.FdStream(from_us[0])
        writer = trio.lowlevel.FdStream(to_us[1])
        assert b"QMP" in await reader.receive_some()
        await writer.send_all(b'{"execute":"qmp_capabilities"}{"execute":"echo","id":1}')
        lines = b""
        while lines.count(b"\n") < 2:
            lines += await reader.receive_some()
        assert [json.loads(line) for line in lines.splitlines()] == [{"return": {}}, {"return": {}, "id": 1}]
        await writer.aclose()
    await reader.aclose()
    assert os.get_blocking(to_us[0])
    assert os.get_blocking(from_us[1])
    os.close(to_us[0])
    os.close(from_us[1])


async def test_input_may_come_from_a_file_and_output_go_to_one(tmp_path: Path) -> None:
    (tmp_path / "in").write_text('{"execute":"qmp_capabilities"}\n{"execute":"echo","arguments":{"n":1}}\n')
    with (tmp_path / "in").open() as source, (tmp_path / "out").open("w") as sink:
        await monitor().serve_descriptors(source.fileno(), sink.fileno())
    assert [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()][1:] == [
        {"return": {}},
        {"return": {"n": 1}},
    ]


async def test_a_client_that_resets_the_connection_ends_its_session_only(listener: socket.socket) -> None:
    it = monitor()
    async with trio.open_nursery() as nursery:
        await nursery.start(it.serve_listener, listener, admit)
        client = await connect(listener)
        await client.receive()
        await client.send(b'{"execute":"qmp_capabilities"}' * 3)
        client.sock.close()  # with replies unread, which resets a unix socket
        other = await connect(listener)
        await other.negotiate()
        while len(it.sessions) > 1:
            await trio.lowlevel.checkpoint()
        other.sock.close()
        nursery.cancel_scope.cancel()
