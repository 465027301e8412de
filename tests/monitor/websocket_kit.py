"""A websocket monitor on a port of this machine, and clients for it: a proper one, and a raw one that can misbehave."""

from __future__ import annotations

import base64
import json
import socket
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, final

import attrs
import trio
from trio_websocket import wrap_client_stream
from wsproto import ConnectionType
from wsproto.connection import Connection
from wsproto.events import CloseConnection, Ping, Pong, TextMessage

from tests.monitor.fakes import EVENTS, VERSION, FakeExecutor
from vmm import host_tcp
from vmm.monitor.events import EventHub
from vmm.monitor.session import SessionOptions
from vmm.monitor.upgrade import Door
from vmm.monitor.websocket import WebSocketMonitor

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from trio_websocket import WebSocketConnection
    from wsproto.events import Event

KEY = base64.b64encode(b"0123456789abcdef").decode()
TOKEN = "correct-horse.battery_staple~1"


@final
@attrs.frozen
class Response:
    """What an HTTP server answered."""

    status: int
    fields: dict[str, str]
    body: str


@final
class Raw:
    """A client that writes its own bytes."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._data = bytearray()
        self.frames = Connection(ConnectionType.CLIENT)

    async def response(self) -> Response:
        """Read a response, to the end of the connection unless it is an upgrade."""
        while b"\r\n\r\n" not in self._data:
            data = await self.stream.receive_some()
            assert data, f"no whole response: {bytes(self._data)!r}"
            self._data += data
        head, _, rest = bytes(self._data).partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        status = int(first.split()[1])
        fields = dict(line.lower().split(": ", 1) for line in lines)
        self._data.clear()
        if status == 101:
            self.frames.receive_data(rest)
            return Response(status, fields, "")
        while data := await self.stream.receive_some():
            rest += bytes(data)
        assert len(rest) == int(fields["content-length"])
        return Response(status, fields, rest.decode())

    async def send(self, *events: Event) -> None:
        """Send events in one segment."""
        await self.stream.send_all(b"".join(self.frames.send(event) for event in events))

    async def ask(self, text: str | dict[str, Any]) -> Any:
        """Send one message and return the next."""
        await self.send(TextMessage(text if isinstance(text, str) else json.dumps(text)))
        return await self.message()

    async def event(self) -> Event | None:
        """Return the next event of the websocket; None at the end of the connection."""
        while True:
            for event in self.frames.events():
                return event
            try:
                data = await self.stream.receive_some(65536)
            except trio.BrokenResourceError:
                return None
            if not data:
                return None
            self.frames.receive_data(data)

    async def message(self) -> Any:
        """Return the next message, put together from its parts."""
        text = ""
        while True:
            event = await self.event()
            assert isinstance(event, TextMessage), event
            text += event.data
            if event.message_finished:
                return json.loads(text)

    async def closed(self) -> tuple[int, str | None] | None:
        """Read to the end of the connection, agreeing to it if asked to.

        Return code and reason of the close frame; None if there was none.
        """
        found: tuple[int, str | None] | None = None
        while (event := await self.event()) is not None:
            if isinstance(event, CloseConnection):
                found = event.code, event.reason
                with suppress(trio.BrokenResourceError):
                    await self.send(event.response())
        return found


def request(port: int, *, method: str = "GET", target: str = "/", **changes: str | Sequence[str] | None) -> bytes:
    """Return a good request for a websocket with fields changed, repeated, added, or (None) left out."""
    fields: dict[str, str | Sequence[str] | None] = {
        "host": f"127.0.0.1:{port}", "upgrade": "websocket", "connection": "keep-alive, Upgrade",
        "sec-websocket-key": KEY, "sec-websocket-version": "13",
    }  # fmt: skip
    fields |= {name.replace("_", "-"): value for name, value in changes.items()}
    lines = [f"{method} {target.format(port=port)} HTTP/1.1"]
    for name, value in fields.items():
        for each in [value] if isinstance(value, str) else value or ():
            lines.append(f"{name}: {each.format(port=port)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


@final
@attrs.frozen
class Kit:
    """A monitor under test."""

    monitor: WebSocketMonitor
    executor: FakeExecutor
    hub: EventHub
    log: list[str]
    listener: socket.socket
    host: str
    port: int
    nursery: trio.Nursery

    @property
    def authority(self) -> str:
        """Where it is, as a URL has it."""
        return f"{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    async def connect(self, *, small: bool = False) -> trio.SocketStream:
        """Connect; with `small`, with as little room for what comes as there can be."""
        sock = trio.socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET)
        if small:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        await sock.connect((self.host, self.port))
        return trio.SocketStream(sock)

    @asynccontextmanager
    async def raw(self, *, small: bool = False) -> AsyncGenerator[Raw, None]:
        """Connect and say nothing."""
        async with await self.connect(small=small) as stream:
            yield Raw(stream)

    @asynccontextmanager
    async def upgraded(self, *, small: bool = False, negotiate: bool = True) -> AsyncGenerator[Raw, None]:
        """Open a websocket on which frames are the test's own."""
        async with self.raw(small=small) as raw:
            await raw.stream.send_all(request(self.port))
            assert (await raw.response()).status == 101
            if negotiate:
                assert "QMP" in await raw.message()
                assert await raw.ask({"execute": "qmp_capabilities"}) == {"return": {}}
            yield raw

    async def refusal(self, data: bytes) -> Response:
        """Send `data`, and return what is answered to it."""
        async with self.raw() as raw:
            await raw.stream.send_all(data)
            return await raw.response()

    @asynccontextmanager
    async def client(
        self, *, oob: bool = False, subprotocols: Sequence[str] = (), headers: Sequence[tuple[bytes, bytes]] = ()
    ) -> AsyncGenerator[WebSocketConnection, None]:
        """Open a websocket with trio-websocket, and negotiate."""
        async with await self.connect() as stream, trio.open_nursery() as nursery:
            # On a stream of our own, which the library does not close where the server has closed the websocket.
            client = await wrap_client_stream(
                nursery, stream, self.authority, "/", subprotocols=subprotocols, extra_headers=list(headers),
                max_message_size=1 << 24,
            )  # fmt: skip
            async with client:
                assert "QMP" in json.loads(await client.get_message())
                enable = ["oob"] if oob else []
                question = {"execute": "qmp_capabilities", "arguments": {"enable": enable}}
                assert await ask(client, question) == {"return": {}}
                yield client


async def ask(client: WebSocketConnection, message: str | dict[str, Any]) -> Any:
    """Send one message and return the next."""
    await client.send_message(message if isinstance(message, str) else json.dumps(message))
    return json.loads(await client.get_message())


@asynccontextmanager
async def serving(
    *, host: str = "127.0.0.1", token: str | None = None, options: SessionOptions | None = None
) -> AsyncGenerator[Kit, None]:
    """Serve a monitor over a fake executor; hang up on everybody at the end."""
    log: list[str] = []
    executor = FakeExecutor()
    hub = EventHub(EVENTS)
    with host_tcp.listen_loopback(host, 0) as listener:
        port = listener.getsockname()[1]
        door = Door(host, port, None if token is None else token.encode())
        monitor = WebSocketMonitor(
            "ws0", executor, hub, options or SessionOptions(VERSION, framed=True), door, log.append
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(monitor.serve_listener, listener)
            yield Kit(monitor, executor, hub, log, listener, host, port, nursery)
            executor.release.set()
            nursery.cancel_scope.cancel()


__all__ = ["KEY", "TOKEN", "Kit", "Ping", "Pong", "Raw", "Response", "ask", "request", "serving"]
