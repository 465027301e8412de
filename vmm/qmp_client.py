"""A small QMP client on trio, for this package's own commands and tests. Programs of others have `qemu.qmp`."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Final, final

import trio

from vmm import host_sockets
from vmm.errors import HostFileRefused, OptionInvalid, VmmError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

GREETING: Final = 10.0
"""Seconds for a monitor to greet."""

_UCRED: Final = struct.Struct("iII")


@final
class CommandFailed(VmmError):
    """The machine answered a command with an error."""

    text: ClassVar[str] = "{command}: {desc}"
    command: str
    error_class: str
    desc: str


@final
class MonitorGone(VmmError):
    """The machine closed its monitor."""

    text: ClassVar[str] = "The machine at {path} closed its monitor"
    path: str


@final
class NoMonitor(VmmError):
    """What answers is no QMP monitor."""

    text: ClassVar[str] = "What answers at {path} is no QMP monitor: {reason}"
    path: str
    reason: str


@final
class QmpClient:
    """One negotiated session. `execute` may be called by one task at a time."""

    def __init__(self, sock: trio.socket.SocketType, path: str) -> None:
        self._sock: Final = sock
        self._path: Final = path
        self._data = bytearray()
        self._sent = 0
        self.peer_pid = 0
        """The process that sent what was received last. (SO_PEERCRED would name the one that made the socket listen,
        which need not be the one that answers.)"""
        self.events: Final[deque[dict[str, Any]]] = deque()
        """Events that came and were not taken yet, oldest first."""

    async def read(self) -> dict[str, Any]:
        """Return the next message. Raises `MonitorGone` at the end, `NoMonitor` at what is no message."""
        while (end := self._data.find(b"\n")) < 0:
            try:
                data, ancillary, _, _ = await self._sock.recvmsg(65536, socket.CMSG_SPACE(_UCRED.size))
            except OSError:
                data, ancillary = b"", []
            if not data:
                raise MonitorGone(path=self._path)
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                    self.peer_pid = _UCRED.unpack(content)[0]
            self._data += data
        line = bytes(self._data[: end + 1])
        del self._data[: end + 1]
        try:
            message = json.loads(line)
        except ValueError as error:
            raise NoMonitor(path=self._path, reason=f"it says {line[:60]!r}") from error
        if not isinstance(message, dict):
            raise NoMonitor(path=self._path, reason=f"it says {line[:60]!r}")
        return message

    async def negotiate(self, within: float) -> None:
        """Await the greeting for at most `within` seconds, and enter command mode."""
        with trio.move_on_after(within) as patience:
            greeting = await self.read()
            if "QMP" not in greeting:
                raise NoMonitor(path=self._path, reason=f"it does not greet, but says {str(greeting)[:60]!r}")
        if patience.cancelled_caught:
            raise NoMonitor(path=self._path, reason=f"no greeting came within {within:g} s")
        await self.execute("qmp_capabilities")

    async def send(self, command: str, /, **arguments: Any) -> None:
        """Send `command`, and leave its reply unread: the next `execute` passes over it.

        Raises:
            OptionInvalid: an argument is no Unicode, as what was no UTF-8 on a command line. Nothing was sent.
            MonitorGone: there is nobody to send it to.
        """
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        for name, value in named.items():
            if (text := _undecodable(value)) is not None:
                raise OptionInvalid(option=f"{command}: {name}", value=text, wanted="UTF-8, as all of QMP is")
        self._sent += 1
        request: dict[str, Any] = {"execute": command, "id": self._sent}
        if named:
            request["arguments"] = named
        data = memoryview(json.dumps(request).encode())
        try:
            while data:
                data = data[await self._sock.send(data) :]
        except OSError as error:
            raise MonitorGone(path=self._path) from error

    async def execute(self, command: str, /, **arguments: Any) -> Any:
        """Execute `command` and return what it replied; `_` in an argument's name stands for `-`.

        Raises:
            OptionInvalid: as `send`.
            CommandFailed: it replied with an error.
            MonitorGone: it did not reply.
        """
        await self.send(command, **arguments)
        return await self.reply(command)

    async def reply(self, command: str) -> Any:
        """Return what was replied to `command`, which was sent last. Raises as `execute`."""
        # A reply with another number is to a command whose caller was cancelled. What the machine could not read at all
        # is answered without one.
        while (message := await self.read()).get("id") != self._sent:
            if "event" in message:
                self.events.append(message)
            elif "error" in message and "id" not in message:
                break
        if "error" in message:
            answer = message["error"]
            raise CommandFailed(command=command, error_class=answer["class"], desc=answer["desc"])
        return message["return"]

    async def wait_event(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Take events until one is `wanted`, and return it; the ones before it are dropped."""
        while True:
            event = self.events.popleft() if self.events else await self.read()
            if wanted(event):
                return event


def _undecodable(value: object) -> str | None:
    """Return the first string in `value`, anything that JSON has, that is no Unicode; None if there is none."""
    if isinstance(value, str):
        return value if any("\ud800" <= sign <= "\udfff" for sign in value) else None
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if not isinstance(value, (list, tuple)):
        return None
    return next((text for text in map(_undecodable, value) if text is not None), None)


@asynccontextmanager
async def qmp_session(path: str, *, within: float = GREETING) -> AsyncGenerator[QmpClient, None]:
    """Connect to the monitor at unix socket `path` and negotiate.

    Raises:
        HostFileRefused: nobody listens there.
        NoMonitor: what listens there is something else, or does not answer within `within` seconds.
    """
    sock = trio.socket.from_stdlib_socket(host_sockets.unconnected_unix())
    # Before there is anything to receive: what is sent earlier comes without its sender.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    with sock:
        try:
            await sock.connect(path)
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else str(error)
            reason = f"{why}; is a machine running with -qmp unix:{path}?"
            raise HostFileRefused(action="connect to", path=path, reason=reason) from error
        client = QmpClient(sock, path)
        await client.negotiate(within)
        yield client


@asynccontextmanager
async def qmp_over(sock: socket.socket, name: str, *, within: float = GREETING) -> AsyncGenerator[QmpClient, None]:
    """Negotiate over a connected socket, which is the session's from here on. `name` is what error texts call it."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    with trio.socket.from_stdlib_socket(sock) as connected:
        client = QmpClient(connected, name)
        await client.negotiate(within)
        yield client
