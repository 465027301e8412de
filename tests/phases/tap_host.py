"""A host with one tap, in a network namespace of its own: run as a process there, told what to do by lines.

Beside the interface there is nothing: what is sent into it comes out at the tap, and nowhere else.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
import struct
import subprocess
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, final

import attrs
import pytest
import trio

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

NAME: Final = "tap7"
KIND: Final = 0x88B5
"""EtherType for experiments. Source: IEEE 802."""

_REQUEST: Final = struct.Struct("16sH22x")
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
    """Make the tap, send its descriptor over standard input, a socket; then do what lines say, and answer each."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, 0x400454CA, _REQUEST.pack(NAME.encode(), 0x1002))
    asked = socket.socket(fileno=0)
    # The interface goes up once somebody holds it; every change of it is told from here on.
    changes = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    inject = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control.fileno(), 0x8914, _REQUEST.pack(NAME.encode(), 0x1043))  # SIOCSIFFLAGS: up
    inject.bind((NAME, KIND))
    changes.bind((0, 1))  # RTMGRP_LINK
    changes.setblocking(False)
    asked.sendmsg([b"here\n"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
    os.close(fd)
    with asked.makefile("r") as lines:
        for line in lines:
            word, *rest = line.split()
            answer = "done"
            if word == "send":
                for number in range(int(rest[0]), int(rest[1])):
                    inject.send(frame(number))
            elif word == "changes":
                seen = 0
                try:
                    while changes.recv(65536):
                        seen += 1
                except BlockingIOError:
                    answer = f"{seen}"
            elif word == "state":
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
                    found = fcntl.ioctl(control.fileno(), 0x8913, _REQUEST.pack(NAME.encode(), 0))  # SIOCGIFFLAGS
                flags = _REQUEST.unpack(found)[1]
                answer = "up" if flags & 0x41 == 0x41 else f"{flags:#x}"  # IFF_UP, IFF_RUNNING: it has carrier
            elif word == "dropped":
                with open("/proc/net/dev") as table:
                    row = next(row for row in table if row.strip().startswith(NAME))
                answer = row.partition(":")[2].split()[11]
            asked.sendall(f"{answer}\n".encode())


@final
@attrs.define(eq=False)
class TapHost:
    """The process, from outside."""

    stream: trio.SocketStream
    fd: int
    """The tap."""

    async def ask(self, line: str) -> str:
        """Have something done; return the answer."""
        await self.stream.send_all(f"{line}\n".encode())
        with trio.fail_after(20):
            return (await self.stream.receive_some(100)).decode().strip()

    def close_tap(self) -> None:
        """Leave the tap to others. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def ask_now(self, line: str) -> str:
        """The same without letting anybody else run."""
        sock = socket.socket(fileno=os.dup(self.stream.socket.fileno()))
        with sock:
            sock.settimeout(20)
            sock.sendall(f"{line}\n".encode())
            return sock.recv(100).decode().strip()


def _start() -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair()
    command = ["unshare", "-n", sys.executable, "-m", "tests.phases.tap_host"]
    with theirs:
        return subprocess.Popen(command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE), ours


@asynccontextmanager
async def tap_host() -> AsyncGenerator[TapHost, None]:
    """Run the process; skip the test where this host does not let us have a namespace, or a tap."""
    process, ours = _start()
    host: TapHost | None = None
    try:
        ours.setblocking(False)
        with trio.fail_after(20):
            await trio.lowlevel.wait_readable(ours)
        greeting, ancillary, _, _ = ours.recvmsg(100, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        if not greeting:
            assert process.stderr is not None
            pytest.skip(f"no tap in a namespace here: {process.stderr.read().decode().strip()[-200:]}")
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        host = TapHost(stream, array.array("i", ancillary[0][2])[0])
        async with stream:
            yield host
    finally:
        ours.close()
        if host is not None:
            host.close_tap()
        process.kill()
        assert process.stderr is not None
        process.stderr.close()
        process.wait()


if __name__ == "__main__":
    main()
