"""Every kind of chardev goes over in a live update, with whoever is at its other end, and a TCP monitor's port too."""

from __future__ import annotations

import os
import socket
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.backends.chardev_kit import Frontend, named_pipe, read_exactly
from tests.phases.test_no_byte_lost import MIB, Line
from tests.phases.test_tcp_monitor import session
from tests.phases.update_kit import due

if TYPE_CHECKING:
    from pathlib import Path

    from vmm.embedding import EmbeddedMachine

pytestmark = pytest.mark.usefixtures("no_leaks")

UPDATES = 3


def unix(path: Path, *, server: bool = True) -> dict[str, Any]:
    address = {"type": "unix", "data": {"path": str(path)}}
    return {"type": "socket", "data": {"addr": address, "server": server, "wait": False}}


def tcp(port: int = 0, *, server: bool = True) -> dict[str, Any]:
    address = {"type": "inet", "data": {"host": "127.0.0.1", "port": str(port)}}
    return {"type": "socket", "data": {"addr": address, "server": server, "wait": False, "nodelay": True}}


def recipe(chardevs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    added = [
        {"execute": "chardev-add", "arguments": {"id": label, "backend": it}} for label, it in chardevs.items()
    ]  # fmt: skip
    monitor = {"qom-type": "monitor-qmp", "id": "mon", "chardev": "port"}
    definition = {"memory": {"size": MIB}}
    return [
        *added,
        {"execute": "object-add", "arguments": monitor},
        {"execute": "machine-set", "arguments": definition},
        {"execute": "accel-set", "arguments": {"accel": "qtest"}},
        {"execute": "cpu-model-set"},
        {"execute": "finish-machine-init"},
        {"execute": "cont"},
    ]


async def filenames(machine: EmbeddedMachine) -> dict[str, str]:
    return {item["label"]: item["filename"] for item in await machine.execute("query-chardev")}


def port_in(filename: str) -> int:
    return int(filename.partition(",server=on")[0].rpartition(":")[2])


async def test_every_chardev_goes_over_with_whoever_is_at_its_other_end(tmp_path: Path) -> None:
    typing, reading = (named_pipe(f"{tmp_path}/pipe.{end}") for end in ("in", "out"))
    async with due("the whole of it"), AsyncExitStack() as stack:
        fifo = trio.StapledStream(trio.lowlevel.FdStream(typing), trio.lowlevel.FdStream(reading))
        await stack.enter_async_context(fifo)
        unix_peer = stack.enter_context(socket.socket(socket.AF_UNIX))
        unix_peer.bind(str(tmp_path / "peer"))
        unix_peer.listen()
        tcp_peer = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        nursery = await stack.enter_async_context(trio.open_nursery())
        line = Line(tmp_path, nursery)
        await line.begin(
            recipe(
                {
                    "unix": unix(tmp_path / "unix"),
                    "tcp": tcp(),
                    "unix-peer": unix(tmp_path / "peer", server=False),
                    "tcp-peer": tcp(tcp_peer.getsockname()[1], server=False),
                    "pty": {"type": "pty", "data": {}},
                    "pipe": {"type": "pipe", "data": {"device": str(tmp_path / "pipe")}},
                    "file": {"type": "file", "data": {"out": str(tmp_path / "file")}},
                    "null": {"type": "null", "data": {}},
                    "port": tcp(),
                }
            )
        )
        names = await filenames(line.machine)
        slave = os.open(names["pty"].removeprefix("pty:"), os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        streams: dict[str, Any] = {
            "unix": trio.SocketStream((await trio.open_unix_socket(str(tmp_path / "unix"))).socket),
            "tcp": await trio.open_tcp_stream("127.0.0.1", port_in(names["tcp"])),
            "unix-peer": trio.SocketStream(trio.socket.from_stdlib_socket(unix_peer.accept()[0])),
            "tcp-peer": trio.SocketStream(trio.socket.from_stdlib_socket(tcp_peer.accept()[0])),
            "pty": trio.lowlevel.FdStream(slave),
            "pipe": fifo,
        }
        for stream in streams.values():
            await stack.enter_async_context(stream)
        while any(name.startswith("disconnected:") for label, name in names.items() if label != "port"):
            await trio.lowlevel.checkpoint()
            names = await filenames(line.machine)
        frontends = {label: Frontend() for label in names if label != "port"}
        written = b""
        for number in range(UPDATES + 1):
            said = f"said in the life of machine {number}; ".encode()
            for label, frontend in frontends.items():
                chardev = line.machine._host.stores.chardevs[label].chardev
                chardev.attach(frontend)
                assert chardev.put(said) == len(said)
                if label in streams:
                    assert await read_exactly(streams[label], len(said)) == said
                    await streams[label].send_all(said)
                    assert await frontend.wait_received((number + 1) * len(said))
            written += said
            assert await filenames(line.machine) == names
            # Whoever connects to the monitor's port speaks to the machine that has it.
            with trio.socket.socket() as sock:
                await sock.connect(("127.0.0.1", port_in(names["port"])))
                async with session(sock) as client:
                    assert (await client.execute("query-status"))["status"] == "running"
            if number < UPDATES:
                await line.update()
        line.end()
    assert (tmp_path / "file").read_bytes() == written
