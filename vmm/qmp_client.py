"""A small QMP client on trio, for this package's own commands and tests. Programs of others have `qemu.qmp`."""

from __future__ import annotations

import json
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, final

import attrs
import trio

from vmm.errors import HostFileRefused, VmmError

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncGenerator, Callable


@final
@attrs.frozen(kw_only=True)
class CommandFailed(VmmError):
    """The machine answered a command with an error."""

    text = "{command}: {desc}"
    command: str
    error_class: str
    desc: str


@final
@attrs.frozen(kw_only=True)
class MonitorGone(VmmError):
    """The machine closed its monitor."""

    text = "The machine at {path} closed its monitor"
    path: str


@final
class QmpClient:
    """One negotiated session. `execute` may be called by one task at a time."""

    def __init__(self, stream: trio.SocketStream, path: str) -> None:
        self._stream: Final = stream
        self._path: Final = path
        self._data = bytearray()
        self.events: Final[deque[dict[str, Any]]] = deque()
        """Events that came and were not taken yet, oldest first."""

    async def read(self) -> dict[str, Any]:
        """Return the next message. Raises `MonitorGone` at the end."""
        while (end := self._data.find(b"\n")) < 0:
            try:
                data = await self._stream.receive_some(65536)
            except trio.BrokenResourceError:
                data = b""
            if not data:
                raise MonitorGone(path=self._path)
            self._data += data
        line = bytes(self._data[: end + 1])
        del self._data[: end + 1]
        message: dict[str, Any] = json.loads(line)
        return message

    async def execute(self, command: str, /, **arguments: Any) -> Any:
        """Execute `command` and return what it replied; `_` in an argument's name stands for `-`.

        Raises:
            CommandFailed: it replied with an error.
            MonitorGone: it did not reply.
        """
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            await self._stream.send_all(json.dumps(request).encode())
        except trio.BrokenResourceError as error:
            raise MonitorGone(path=self._path) from error
        while "event" in (message := await self.read()):
            self.events.append(message)
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


@asynccontextmanager
async def qmp_session(path: str) -> AsyncGenerator[QmpClient, None]:
    """Connect to the monitor at unix socket `path` and negotiate. Raises `HostFileRefused` where nobody listens."""
    try:
        stream = await trio.open_unix_socket(path)
    except OSError as error:
        reason = f"{error.strerror}; is a machine running with -qmp unix:{path}?"
        raise HostFileRefused(action="connect to", path=path, reason=reason) from error
    async with _negotiated(stream, path) as client:
        yield client


@asynccontextmanager
async def qmp_over(sock: socket.socket, name: str) -> AsyncGenerator[QmpClient, None]:
    """Negotiate over a connected socket, which is the session's from here on."""
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
    async with _negotiated(stream, name) as client:
        yield client


@asynccontextmanager
async def _negotiated(stream: trio.SocketStream, name: str) -> AsyncGenerator[QmpClient, None]:
    async with stream:
        client = QmpClient(stream, name)
        await client.read()
        await client.execute("qmp_capabilities")
        yield client
