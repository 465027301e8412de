"""Stand-ins for the monitor's neighbours, and a client of one's own."""

from __future__ import annotations

import json
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import attrs
import trio

from vmm.errors import DeviceNotFound
from vmm.monitor.events import Event, EventHub
from vmm.monitor.session import SessionOptions, Version
from vmm.monitor.unix import qmp_monitor

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from vmm.monitor.ports import Caller
    from vmm.monitor.session import Session
    from vmm.monitor.unix import SocketMonitor

VERSION = Version(11, 1, 0, "trio-vmm-0.1")
EVENTS = (
    Event("STOP"),
    Event("RESUME"),
    Event("RTC_CHANGE", interval=1.0),
    Event("VSERPORT_CHANGE", interval=1.0, key="id"),
)


@attrs.define(eq=False)
class FakeExecutor:
    """Knows a few commands: echo, fail, slow (waits for `release`), claim, getfd, and yank out of band."""

    release: trio.Event = attrs.Factory(trio.Event)
    begun: trio.Event = attrs.Factory(trio.Event)
    log: list[str] = attrs.Factory(list)
    claimed: list[int] = attrs.Factory(list)
    reply: object = None

    def knows(self, name: str) -> bool:
        return name in ("echo", "fail", "slow", "claim", "getfd", "yank", "bug", "query-version", "query-commands")

    def admits_oob(self, name: str) -> bool:
        return name == "yank"

    async def execute(self, caller: Caller, name: str, arguments: Mapping[str, object]) -> object:
        self.log.append(f"{name} {arguments.get('n', '')}".strip())
        if name == "fail":
            raise DeviceNotFound(what="Device", name="disk0")
        if name == "bug":
            raise ZeroDivisionError
        if name == "slow":
            self.begun.set()
            await self.release.wait()
            self.log.append(f"slow {arguments.get('n', '')} done")
        if name == "claim":
            self.claimed += caller.take_descriptors()
            return len(self.claimed)
        if name == "getfd":
            (caller.descriptors["fd"],) = caller.take_descriptors()
        if name == "echo":
            return dict(arguments)
        return self.reply


@attrs.define(eq=False)
class Client:
    """A raw client: sends bytes, reads lines."""

    sock: trio.socket.SocketType
    _buffer: bytearray = attrs.Factory(bytearray)

    async def send(self, data: bytes | dict[str, Any]) -> None:
        raw = data if isinstance(data, bytes) else json.dumps(data).encode()
        with memoryview(raw) as view:
            sent = 0
            while sent < len(view):
                sent += await self.sock.send(view[sent:])

    async def line(self) -> bytes:
        while b"\n" not in self._buffer:
            data = await self.sock.recv(65536)
            if not data:
                return b""
            self._buffer += data
        end = self._buffer.index(b"\n") + 1
        line = bytes(self._buffer[:end])
        del self._buffer[:end]
        return line

    def peek(self) -> bytes:
        """Look at what has come, without waiting. Raises BlockingIOError if nothing has."""
        with socket.fromfd(self.sock.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as copy:
            return copy.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)

    async def receive(self) -> Any:
        """Read one message; None at the end of the stream."""
        line = await self.line()
        return json.loads(line) if line else None

    async def ask(self, data: bytes | dict[str, Any]) -> Any:
        await self.send(data)
        return await self.receive()

    async def negotiate(self, *, oob: bool = False) -> None:
        await self.receive()
        reply = await self.ask({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"] if oob else []}})
        assert reply == {"return": {}}


@attrs.define(eq=False)
class Bench:
    """A monitor with one client on a socket pair."""

    executor: FakeExecutor
    hub: EventHub
    monitor: SocketMonitor[Session]
    client: Client
    log: list[str]
    nursery: trio.Nursery
    others: list[Client] = attrs.Factory(list)

    def connect(self) -> Client:
        ours, theirs = socket.socketpair()
        self.nursery.start_soon(self.monitor.serve_connection, ours)
        self.others.append(Client(trio.socket.from_stdlib_socket(theirs)))
        return self.others[-1]


@asynccontextmanager
async def bench(
    options: SessionOptions | None = None, now: int = 1_700_000_000_123_456_789
) -> AsyncGenerator[Bench, None]:
    """Serve one client over a socket pair; at the end, hang up on it and wait for the session."""
    log: list[str] = []
    executor = FakeExecutor()
    hub = EventHub(EVENTS, now=lambda: now)
    monitor = qmp_monitor("qmp0", executor, hub, options or SessionOptions(VERSION), log.append)
    ours, theirs = socket.socketpair()
    client = Client(trio.socket.from_stdlib_socket(theirs))
    async with trio.open_nursery() as residents:
        await residents.start(hub.serve)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(monitor.serve_connection, ours)
            it = Bench(executor, hub, monitor, client, log, nursery)
            try:
                yield it
            finally:
                for each in (client, *it.others):
                    each.sock.close()
            executor.release.set()
            nursery.cancel_scope.cancel()
        residents.cancel_scope.cancel()
