"""QMP over websockets, one message a frame, for programs and web pages of this machine.

The session is that of every monitor; this is its wire, and the way to it. `vmm.monitor.upgrade` decides who gets a
websocket; the protocol itself is trio-websocket's.

A client that does not read is bounded three times: by the kernel's buffers, by one message that waits here, and by the
session's `Bounds`; then it is dropped. Nothing that a client sends or leaves undone ends more than its own connection.

This module and what it imports take longer to import than a monitor takes to start: import it where one is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

import trio
from trio_websocket import ConnectionClosed, wrap_server_stream
from wsproto.utilities import ProtocolError

from vmm.errors import leaves
from vmm.monitor.session import Session
from vmm.monitor.unix import Gate, accepted
from vmm.monitor.upgrade import UpgradeRefused, read_upgrade

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping

    from trio_websocket import WebSocketConnection

    from vmm.monitor.events import EventHub
    from vmm.monitor.ports import Executor
    from vmm.monitor.session import SessionOptions
    from vmm.monitor.upgrade import Door, Upgrade

MAX_SESSIONS: Final = 32
"""Clients served at the same time. As many again may be about to ask."""

OPENING: Final = 10.0
"""Seconds for a client to ask for a websocket."""

CLOSING: Final = 1.0
"""Seconds for a client to take its last message and to agree to the end."""

COMPLAINTS: Final = 10.0
"""Seconds between two lines about clients that were refused. Anybody on this machine can cause them."""

_CHUNK: Final = 64 << 10

NORMAL: Final = 1000
GOING_AWAY: Final = 1001
NO_BINARY: Final = 1003
POLICY: Final = 1008
TOO_BIG: Final = 1009
RESTART: Final = 1012
"""Codes with which connections are closed. Source: RFC 6455 section 7.4.1, and IANA's registry for 1012."""


@final
class WebSocketTransport:
    """A websocket as a `Transport`. `run` is its one task; `farewell` says how it ends, once that is settled."""

    def __init__(self, connection: WebSocketConnection, stream: trio.abc.Stream) -> None:
        self._connection: Final = connection
        self._stream: Final = stream
        self._message: str | None = None
        self._filled = trio.lowlevel.ParkingLot()
        self._taken = trio.lowlevel.ParkingLot()
        self._sending: Final = trio.CancelScope()
        self._closed = False
        self._gone = False
        self._refusal: tuple[int, str] | None = None
        self.farewell: Callable[[], tuple[int, str]] = lambda: (NORMAL, "")

    async def receive(self) -> bytes:
        """See `Transport`. The bytes are those of one frame (or of one message that was sent in several)."""
        self._check_open()
        try:
            message = await self._connection.get_message()
        except ConnectionClosed:
            return b""
        self._check_open()
        if isinstance(message, bytes):
            self._refusal = NO_BINARY, "QMP is text; send text frames"
            return b""
        return message.encode() or b"\n"

    def take_descriptors(self) -> list[int]:
        """See `Transport`: there are none."""
        return []

    def send_nowait(self, data: bytes) -> int:
        """See `Transport`. One line is taken while none waits for `run`."""
        self._check_open()
        if self._gone:
            raise trio.BrokenResourceError
        if self._message is not None:
            return 0
        self._message = data.decode().rstrip("\r\n")
        self._filled.unpark_all()
        return len(data)

    async def wait_sendable(self) -> None:
        """See `Transport`."""
        self._check_open()
        await trio.lowlevel.checkpoint()
        while self._message is not None and not self._gone:
            await self._taken.park()

    def close(self) -> None:
        """See `Transport`. `run` ends it in form, which wakes `receive`; the client has `CLOSING` seconds for it."""
        if not self._closed:
            self._closed = True
            self._sending.deadline = trio.current_time() + CLOSING
            self._filled.unpark_all()
            self._taken.unpark_all()

    async def run(self) -> None:
        """Send what is to be sent, until `close`; then close the websocket. Hangs up on a client that won't have it."""
        try:
            with self._sending:
                while self._message is not None or not self._closed:
                    if self._message is None:
                        await self._filled.park()
                        continue
                    await self._connection.send_message(self._message)
                    self._message = None
                    self._taken.unpark_all()
                await self._connection.aclose(*(self._refusal or self.farewell()))
            if self._sending.cancelled_caught:
                await trio.aclose_forcefully(self._stream)
        except ConnectionClosed:
            pass
        finally:
            self._gone = True
            self._message = None
            self._taken.unpark_all()

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError


@final
class _Behind(trio.abc.Stream):
    """A stream that begins with `head`, and goes on with what comes from `stream`."""

    def __init__(self, head: bytes, stream: trio.SocketStream) -> None:
        self._head = head
        self._stream: Final = stream

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if self._head:
            await trio.lowlevel.checkpoint()
            head, self._head = self._head, b""
            return head
        return await self._stream.receive_some(max_bytes)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


@final
class WebSocketMonitor:
    """One monitor: any number of clients that come through one door, each with its own session.

    `log` takes one line about a client that was refused or dropped.
    """

    def __init__(
        self,
        name: str,
        executor: Executor,
        hub: EventHub,
        options: SessionOptions,
        door: Door,
        log: Callable[[str], None],
    ) -> None:
        assert options.framed, "a websocket carries a message a frame"
        self.name: Final = name
        self._executor: Final = executor
        self._hub: Final = hub
        self._options: Final = options
        self._door: Final = door
        self._log: Final = log
        self._gate: Final = Gate()
        self._listening: Final = trio.CancelScope()
        self._sessions: Final[dict[str, Session]] = {}
        self._open_wires = 0
        self._numbered = 0
        self._connections = 0
        self._changed = trio.lowlevel.ParkingLot()
        self._end = GOING_AWAY, "the monitor ends"
        self._quiet_until = -float("inf")
        self._unsaid = 0

    @property
    def sessions(self) -> Mapping[str, Session]:
        """The sessions under way, by name."""
        return self._sessions

    # --- for the owner of the listener ----------------------------------------------------------------------

    async def serve_listener(
        self, listener: socket.socket, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Accept clients until `close` or a cancel. The listener stays the caller's, and does not block."""
        async with trio.open_nursery() as nursery:
            task_status.started()
            with self._listening:
                await self._accept(listener, nursery)

    def hold(self) -> None:
        """Accept nobody from now on. Sessions go on."""
        self._gate.shut()

    def go_on(self) -> None:
        """Accept again."""
        self._gate.open()

    async def close(self, flush_seconds: float, code: int, reason: str) -> None:
        """Accept nobody any more, and close all connections with `code`.

        Commands under way are answered first, and what is unsent is sent, for which clients have `flush_seconds`; then
        `CLOSING` seconds to agree to the end.
        """
        self._end = code, reason
        self._listening.cancel()
        async with trio.open_nursery() as nursery:
            for session in tuple(self._sessions.values()):
                nursery.start_soon(session.close, flush_seconds)
        while self._open_wires:
            await self._changed.park()

    # --- one connection ---------------------------------------------------------------------------------------

    async def _accept(self, listener: socket.socket, nursery: trio.Nursery) -> None:
        while True:
            while self._connections >= 2 * MAX_SESSIONS:
                await self._changed.park()
            client = await accepted(listener, self._gate, self._complain)
            if client is None:
                continue
            self._connections += 1
            nursery.start_soon(self._serve, client)

    async def _serve(self, client: socket.socket) -> None:
        try:
            async with trio.SocketStream(trio.socket.from_stdlib_socket(client)) as stream:
                try:
                    upgrade = await self._open(stream)
                    if upgrade is None or await self._serve_websocket(stream, upgrade):
                        return
                except UpgradeRefused as refused:
                    self._complain(f"a client was refused: {refused}")
                    await stream.send_all(refused.response())
                await _let_read(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client is gone
        finally:
            self._connections -= 1
            self._changed.unpark_all()

    async def _open(self, stream: trio.SocketStream) -> Upgrade | None:
        with trio.move_on_after(OPENING) as patience:
            upgrade = await read_upgrade(stream, self._door)
        if patience.cancelled_caught:
            raise UpgradeRefused(status=408, reason=f"No whole request came within {OPENING:g} s")
        if len(self._sessions) >= MAX_SESSIONS:
            raise UpgradeRefused(status=503, reason=f"{MAX_SESSIONS} clients are served already; one must leave first")
        return upgrade

    async def _serve_websocket(self, stream: trio.SocketStream, upgrade: Upgrade) -> bool:
        """Serve a websocket to its end. Return False if its client may still be sending."""
        self._numbered += 1
        name = f"{self.name}/{self._numbered}"
        connection: WebSocketConnection | None = None
        faults: list[BaseException] = []
        try:
            async with trio.open_nursery() as nursery:
                wire = _Behind(upgrade.request, stream)
                request = await wrap_server_stream(
                    nursery,
                    wire,
                    max_message_size=self._options.limits.size,
                    receive_buffer_size=_CHUNK,
                )
                connection = await request.accept(subprotocol=upgrade.subprotocol)
                await self._run_session(name, WebSocketTransport(connection, wire))
                nursery.cancel_scope.cancel()
        except* (ProtocolError, ConnectionClosed) as group:
            # The library does not expect some of what a client can do: a ping, or more that is too big, when the
            # closing has begun already.
            faults += leaves(group)
        too_big = connection is not None and connection.closed is not None and connection.closed.code == TOO_BIG
        if too_big:
            size = self._options.limits.size
            self._log(f"{name}: the client sent a message of more than {size} characters, so it was dropped")
        elif any(isinstance(fault, ProtocolError) for fault in faults):
            self._log(f"{name}: the client broke the websocket protocol ({faults[0]}), so it was dropped")
        return not (too_big or faults)

    async def _run_session(self, name: str, transport: WebSocketTransport) -> None:
        session = Session(name, transport, self._executor, self._hub, self._options)

        def farewell() -> tuple[int, str]:
            return (POLICY, f"the client {session.dropped}") if session.dropped else self._end

        transport.farewell = farewell
        self._sessions[name] = session
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._carry, transport)
                await session.serve()
        finally:
            del self._sessions[name]
            self._changed.unpark_all()
            if session.dropped:
                self._log(f"{name}: the client {session.dropped}, so it was dropped")

    async def _carry(self, transport: WebSocketTransport) -> None:
        self._open_wires += 1
        try:
            await transport.run()
        finally:
            self._open_wires -= 1
            self._changed.unpark_all()

    def _complain(self, text: str) -> None:
        """Log what anybody can cause, one line in a while; what is left out is counted."""
        now = trio.current_time()
        if now < self._quiet_until:
            self._unsaid += 1
            return
        more = f" ({self._unsaid} more since the last line)" if self._unsaid else ""
        self._log(f"{self.name}: {text}{more}")
        self._quiet_until, self._unsaid = now + COMPLAINTS, 0


async def _let_read(stream: trio.SocketStream) -> None:
    """Let a client that may still be sending read our last words: to close now would reset the connection."""
    await stream.send_eof()
    with trio.move_on_after(CLOSING):
        while await stream.receive_some(_CHUNK):
            pass
