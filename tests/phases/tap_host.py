"""A host with one tap, in a network namespace of its own: run as a process there, told what to do by lines.

Beside the interface there is nothing: what is sent into it comes out at the tap, and nowhere else.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, final

import attrs

from tests.phases.namespace import REQUEST, Namespace, answer_lines, begin, get_flags, namespace, set_flags

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

NAME: Final = "tap7"
KIND: Final = 0x88B5
"""EtherType for experiments. Source: IEEE 802."""

_ETHERNET: Final = struct.Struct("!6s6sH")
_MAC: Final = b"\x02\x00\x00\x00\x00\x07"


def frame(number: int) -> bytes:
    """Return a frame with a number in it."""
    return _ETHERNET.pack(_MAC, b"\x02\x00\x00\x00\x00\x08", KIND) + number.to_bytes(4, "big") + bytes(50)


def numbers(fd: int) -> Iterator[int]:
    """Read what waits at tap `fd`; yield the numbers of our own frames. The kernel sends some too."""
    while True:
        try:
            data = os.read(fd, 2048)
        except BlockingIOError:
            return
        if _ETHERNET.unpack_from(data)[2] == KIND:
            yield int.from_bytes(data[_ETHERNET.size : _ETHERNET.size + 4], "big")


def main() -> None:
    """Make the tap and send its descriptor; then do what lines say, and answer each."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, 0x400454CA, REQUEST.pack(NAME.encode(), 0x1002))
    # The interface goes up once somebody holds it; every change of it is told from here on.
    changes = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    inject = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    set_flags(NAME, 0x1043)  # up
    inject.bind((NAME, KIND))
    changes.bind((0, 1))  # RTMGRP_LINK
    changes.setblocking(False)
    asked = begin(fd)
    os.close(fd)

    def answer(line: str) -> str:
        word, *rest = line.split()
        if word == "send":
            for number in range(int(rest[0]), int(rest[1])):
                inject.send(frame(number))
        elif word == "changes":
            return f"{_count(changes)}"
        elif word == "state":
            flags = get_flags(NAME)
            return "up" if flags & 0x41 == 0x41 else f"{flags:#x}"  # IFF_UP, IFF_RUNNING: it has carrier
        elif word == "dropped":
            with open("/proc/net/dev") as table:
                row = next(row for row in table if row.strip().startswith(NAME))
            return row.partition(":")[2].split()[11]
        return "done"

    answer_lines(asked, answer)


def _count(messages: socket.socket) -> int:
    count = 0
    try:
        while messages.recv(65536):
            count += 1
    except BlockingIOError:
        pass
    return count


@final
@attrs.define(eq=False)
class TapHost:
    """The process, from outside."""

    _host: Namespace
    fd: int
    """The tap."""

    async def ask(self, line: str) -> str:
        """Have something done; return the answer."""
        return await self._host.ask(line)

    def ask_now(self, line: str) -> str:
        """The same without letting anybody else run."""
        return self._host.ask_now(line)

    def close_tap(self) -> None:
        """Leave the tap to others. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@asynccontextmanager
async def tap_host() -> AsyncGenerator[TapHost, None]:
    """Run the process; skip the test where this host does not let us have a namespace, or a tap."""
    async with namespace("tests.phases.tap_host") as process:
        host = TapHost(process, *process.descriptors)
        try:
            yield host
        finally:
            host.close_tap()


if __name__ == "__main__":
    main()
