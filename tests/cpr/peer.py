"""The other end of a CPR channel, byte by byte."""

from __future__ import annotations

import array
import json
import os
import resource
import socket
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, final

import trio

from vmm.cpr.channel import CprChannel
from vmm.cpr.frames import MAGIC

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

HEADER: Final = struct.Struct(">4sI")


def frame(kind: str, body: Mapping[str, Any] | None = None, names: Sequence[str] = ()) -> bytes:
    """Return a frame as it travels."""
    return packed(json.dumps({"kind": kind, "body": body or {}, "descriptors": list(names)}).encode())


def packed(content: bytes) -> bytes:
    """Return `content` with a header."""
    return HEADER.pack(MAGIC, len(content)) + content


@final
class Peer:
    """Sends what a test says. Its process is the test's own."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock: Final = sock

    def send(self, data: bytes, *fds: int) -> None:
        """Send bytes, with descriptors on the first of them."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        assert self.sock.sendmsg([data], ancillary) == len(data)

    def hello(self, side: str = "source", **changes: Any) -> None:
        """Send a `hello`, with members of its body changed."""
        pidfd = os.pidfd_open(os.getpid())
        body = {"version": 1, "program": "a test", "side": side, **changes}
        self.send(frame("hello", body, ["pidfd"]), pidfd)
        os.close(pidfd)

    def received(self) -> list[dict[str, Any]]:
        """Return the messages that have come."""
        data = b""
        self.sock.setblocking(False)
        try:
            while some := self.sock.recv(1 << 20):
                data += some
        except (BlockingIOError, ConnectionResetError):
            pass
        found = []
        while data:
            _, length = HEADER.unpack_from(data)
            found.append(json.loads(data[HEADER.size : HEADER.size + length]))
            data = data[HEADER.size + length :]
        return found


def channel_and_peer(side: str = "destination") -> tuple[CprChannel, Peer]:
    """Return a channel, as `side` of an update, and who is at its other end."""
    ours, theirs = socket.socketpair()
    other = {"source": "destination", "destination": "source"}[side]
    return CprChannel(trio.socket.from_stdlib_socket(ours), side=side, peer=other), Peer(theirs)


@contextmanager
def no_descriptor_left() -> Generator[None, None, None]:
    """Have this process open nothing any more: the limit is the lowest number that is free."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    probe = os.open("/", os.O_PATH)
    os.close(probe)
    resource.setrlimit(resource.RLIMIT_NOFILE, (probe, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
