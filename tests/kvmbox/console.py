"""Reads a guest's serial console line by line and waits for what it should say: no sleeps, each wait has a limit."""

from __future__ import annotations

import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, final

import attrs
import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

_SHOWN_LINES: Final = 15


class ConsoleSilent(AssertionError):
    """A guest did not say what was expected of it; the text has what it said last."""


@final
@attrs.define
class SerialConsole:
    """The other end of a serial port. `\\r` is dropped, bytes that are not UTF-8 are replaced."""

    _stream: trio.abc.Stream
    transcript: list[str] = attrs.field(factory=list, init=False)
    """All whole lines that were taken by `line` and `expect` so far."""
    _unread: bytearray = attrs.field(factory=bytearray, init=False)

    @classmethod
    @asynccontextmanager
    async def connected(cls, path: Path) -> AsyncIterator[SerialConsole]:
        """The console whose VMM listens on unix socket `path`, which must be there already."""
        async with await trio.open_unix_socket(str(path)) as stream:
            yield cls(stream)

    async def line(self, within: float) -> str:
        """The next whole line, without its end. A part of a line that was read stays if this is cancelled.

        Raises:
            ConsoleSilent: none came within `within` seconds, or the VMM closed the port.
        """
        with trio.move_on_after(within):
            return await self._next_line()
        raise self._silent("a line", f"within {within:g} s")

    async def expect(self, pattern: str, within: float) -> re.Match[str]:
        """Take lines until one has a match for the regular expression `pattern`.

        Raises:
            ConsoleSilent: none had within `within` seconds, or the VMM closed the port first.
        """
        with trio.move_on_after(within):
            while True:
                found = re.search(pattern, await self._next_line(pattern))
                if found:
                    return found
        raise self._silent(repr(pattern), f"within {within:g} s")

    async def send(self, text: str) -> None:
        """Type `text`. Give `\\n` at the end of a line. Blocks while the guest's port takes no more."""
        await self._stream.send_all(text.encode())

    async def go_on_in(self, other: SerialConsole) -> None:
        """Take what is left of this port, whose VMM has ended, and go on with that of `other`."""
        while data := await self._stream.receive_some():
            self._unread += data
        self._stream = other._stream

    async def _next_line(self, wanted: str = "a line") -> str:
        while b"\n" not in self._unread:
            data = await self._stream.receive_some()
            if not data:
                raise self._silent(repr(wanted), "before the port was closed")
            self._unread += data
        raw, _, self._unread = self._unread.partition(b"\n")
        text = raw.replace(b"\r", b"").decode(errors="replace")
        self.transcript.append(text)
        return text

    def _silent(self, wanted: str, when: str) -> ConsoleSilent:
        said = [*self.transcript, *([bytes(self._unread).decode(errors="replace")] if self._unread else [])]
        shown = "".join(f"\n  | {line}" for line in said[-_SHOWN_LINES:])
        return ConsoleSilent(f"the guest did not print {wanted} {when}; its last lines:{shown or ' none'}")


@final
@attrs.define
class ConsoleSocket:
    """A unix socket that a VMM connects its serial port to, made before the VMM starts, so nobody polls for it."""

    path: Path
    _listener: trio.SocketListener

    @classmethod
    @asynccontextmanager
    async def listening(cls, path: Path) -> AsyncIterator[ConsoleSocket]:
        """Listen on `path` for the time of the block."""
        socket = trio.socket.socket(trio.socket.AF_UNIX)
        try:
            await socket.bind(str(path))
            socket.listen()
        except BaseException:
            socket.close()
            raise
        async with trio.SocketListener(socket) as listener:
            yield cls(path, listener)

    @asynccontextmanager
    async def accepted(self, within: float) -> AsyncIterator[SerialConsole]:
        """The console of the next VMM to connect.

        Raises:
            ConsoleSilent: none did within `within` seconds.
        """
        stream: trio.SocketStream | None = None
        with trio.move_on_after(within):
            stream = await self._listener.accept()
        if stream is None:
            raise ConsoleSilent(f"no VMM connected its serial port to {self.path} within {within:g} s")
        async with stream:
            yield SerialConsole(stream)
