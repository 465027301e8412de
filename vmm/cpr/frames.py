"""Frames of the CPR channel: JSON with descriptors, over a unix stream socket that does not block.

A frame is 4 bytes magic, 4 bytes length (big-endian), then that many bytes of JSON,
``{"kind": ..., "body": {...}, "descriptors": [names]}``. The descriptors ride on its first byte by SCM_RIGHTS, in the
order of their names.

Facts about unix sockets that this module rests on (unix(7), Linux net/unix/af_unix.c):

- Descriptors arrive with the first byte of their sendmsg. One recvmsg can return the end of a frame and the beginning
  of the next, with descriptors that belong to either; so no more is asked for than the frame that is due still lacks.
- SCM_MAX_FD is 253 descriptors a sendmsg.
- A user without CAP_SYS_RESOURCE may have as many descriptors in flight as the sender's RLIMIT_NOFILE says; then
  sendmsg fails with ETOOMANYREFS until a receiver, this one or another, has taken some. Nothing tells when.
- SO_PEERCRED names who called connect or listen, not who holds the socket now: an inherited listener names the wrong
  process. SCM_CREDENTIALS is filled in (or checked) by the kernel for the process that sends.
"""

from __future__ import annotations

import array
import errno
import json
import os
import socket
import struct
from collections import deque
from typing import TYPE_CHECKING, Any, Final, final

import trio

from vmm.monitor.json_text import nests_within

if TYPE_CHECKING:
    from collections.abc import Mapping

MAGIC: Final = b"TVCP"
MAX_FRAME: Final = 8 << 20
"""Bytes of JSON in one frame; a recipe is at most half of it."""

MAX_DEPTH: Final = 64
"""How deep arrays and objects nest in one frame. Whoever takes its values apart may recurse."""

FDS_PER_FRAME: Final = 64

TAKING: Final = 1.5
"""Seconds for a receiver to take one of the descriptors that are in flight."""

_RETRY: Final = 0.001
"""Seconds between two attempts to send a descriptor more than may be in flight."""

_UCRED: Final = struct.Struct("iII")
_HEADER: Final = struct.Struct(">4sI")


class FrameBroken(Exception):
    """What came is no frame. Caught by the channel, which knows what was being done; the text is a reason."""


class FramesEnded(Exception):
    """The other side has closed the socket, or it broke. Caught likewise."""


@final
class FrameSocket:
    """One end. Owns the socket, and the descriptors that came and were not taken."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.sock: Final = sock
        self.hurries = False
        """Whether no turn of the loop is given away where there is nothing to wait for: in the guest's pause."""
        self.descriptors: Final[deque[int]] = deque()
        """Those that have come, in order."""
        self.sender: tuple[int, int, int] | None = None
        """Pid, uid and gid of who has sent what came last."""
        self._data = bytearray()

    async def send(self, kind: str, body: Mapping[str, Any], items: list[tuple[str, int]]) -> None:
        """Send one frame with `items`, names and descriptors, at most `FDS_PER_FRAME`. Raises `OSError`."""
        content = json.dumps({"kind": kind, "body": body, "descriptors": [name for name, _ in items]}).encode()
        data = memoryview(_HEADER.pack(MAGIC, len(content)) + content)
        ancillary: list[tuple[int, int, Any]] = [
            (socket.SOL_SOCKET, socket.SCM_CREDENTIALS, _UCRED.pack(os.getpid(), os.getuid(), os.getgid()))
        ]
        if items:
            ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd for _, fd in items])))
        sent = await self._write(data, ancillary)
        while sent < len(data):
            sent += await self._write(data[sent:], [])

    async def _write(self, data: memoryview, ancillary: list[tuple[int, int, Any]]) -> int:
        """Send some of `data`, and all that is `ancillary` on its first byte; return how much, as soon as it goes."""
        await trio.lowlevel.checkpoint_if_cancelled()
        limit = trio.current_time() + TAKING
        while True:
            try:
                sent = self.sock.sendmsg([data], ancillary)
                await self._give_way()
                return sent
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self.sock)
            except OSError as error:
                if error.errno != errno.ETOOMANYREFS or trio.current_time() > limit:
                    raise
                await trio.sleep(_RETRY)

    async def _give_way(self) -> None:
        """Let others have a turn after what is done, which a cancel does not undo."""
        if not self.hurries:
            await trio.lowlevel.cancel_shielded_checkpoint()

    async def wait_for_any(self) -> None:
        """Wait until there is something to `receive`, be it the end."""
        if self._data:
            await trio.lowlevel.checkpoint()
        else:
            await trio.lowlevel.wait_readable(self.sock)

    async def receive(self) -> tuple[str, dict[str, Any], list[str]]:
        """Wait for the next frame; return its kind, body and names. Its descriptors are the last of `descriptors`.

        Raises:
            FrameBroken: it is none.
            FramesEnded: there is no further one.
        """
        await self._fill(_HEADER.size)
        magic, length = _HEADER.unpack_from(self._data)
        if magic != MAGIC:
            raise FrameBroken(f"a frame begins with {bytes(magic)!r}, not with {MAGIC!r}")
        if length > MAX_FRAME:
            raise FrameBroken(f"a frame of {length} bytes is larger than the {MAX_FRAME} admitted")
        await self._fill(_HEADER.size + length)
        content = bytes(self._data[_HEADER.size : _HEADER.size + length])
        del self._data[: _HEADER.size + length]
        try:
            frame = json.loads(content)
            if not nests_within(frame, MAX_DEPTH):
                raise FrameBroken(f"a frame nests deeper than the {MAX_DEPTH} arrays and objects admitted")
            kind, body, names = frame["kind"], frame["body"], frame["descriptors"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise FrameBroken("a frame does not hold a message") from error
        well_formed = isinstance(kind, str) and isinstance(body, dict) and isinstance(names, list)
        if not well_formed or not all(isinstance(name, str) for name in names):
            raise FrameBroken("a frame does not hold a message")
        return kind, body, names

    async def _fill(self, size: int) -> None:
        space = socket.CMSG_SPACE(_UCRED.size) + socket.CMSG_SPACE(FDS_PER_FRAME * 4)
        while len(self._data) < size:
            await trio.lowlevel.checkpoint_if_cancelled()
            try:
                lacking = min(size - len(self._data), 1 << 16)
                data, ancillary, flags, _ = self.sock.recvmsg(lacking, space, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self.sock)
                continue
            except OSError as error:
                raise FramesEnded from error
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    received = array.array("i")
                    received.frombytes(content[: len(content) - len(content) % received.itemsize])
                    self.descriptors.extend(received)
                elif (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                    self.sender = _UCRED.unpack(content[: _UCRED.size])
            if flags & socket.MSG_CTRUNC:
                raise FrameBroken("descriptors were lost: more were sent than this process may open")
            if not data:
                raise FramesEnded
            self._data += data
            await self._give_way()

    def close(self) -> None:
        """Close the socket, and the descriptors that were not taken. Idempotent."""
        if self.sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self.sock)
            self.sock.close()
        while self.descriptors:
            os.close(self.descriptors.popleft())
