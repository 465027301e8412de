"""A TCP connection over a network that can be cut: run as a process in a network namespace of its own.

Both ends belong to whoever asked, and stay in that namespace. Cut, the network drops what is sent, and nobody is told.
"""

from __future__ import annotations

import array
import fcntl
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
    from collections.abc import AsyncGenerator

_REQUEST: Final = struct.Struct("16sH22x")
_UP, _DOWN = 0x49, 0x48  # IFF_UP | IFF_LOOPBACK | IFF_RUNNING, linux/if.h


def _set(flags: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control.fileno(), 0x8914, _REQUEST.pack(b"lo", flags))  # SIOCSIFFLAGS


def main() -> None:
    """Make the connection, send both of its ends over standard input, a socket; then do what lines say."""
    _set(_UP)
    asked = socket.socket(fileno=0)
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as one:
        other, _ = listener.accept()
        with other:
            ends = array.array("i", [one.fileno(), other.fileno()])
            asked.sendmsg([b"here\n"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, ends)])
    with asked.makefile("r") as lines:
        for line in lines:
            _set({"cut": _DOWN, "mend": _UP}[line.strip()])
            asked.sendall(b"done\n")


@final
@attrs.frozen(eq=False)
class Link:
    """The connection, and the network that it goes over."""

    ends: tuple[socket.socket, socket.socket]
    _asked: trio.SocketStream

    async def cut(self) -> None:
        """Drop everything from now on."""
        await self._ask("cut")

    async def mend(self) -> None:
        """Let everything through again."""
        await self._ask("mend")

    async def _ask(self, line: str) -> None:
        await self._asked.send_all(f"{line}\n".encode())
        with trio.fail_after(20):
            assert await self._asked.receive_some(100) == b"done\n"


@asynccontextmanager
async def link() -> AsyncGenerator[Link, None]:
    """Run the process; skip the test where this host does not let us have a namespace."""
    ours, theirs = socket.socketpair()
    command = ["unshare", "-n", sys.executable, "-m", "tests.phases.link_host"]
    with theirs:
        process = subprocess.Popen(  # noqa: ASYNC220 - it does not wait
            command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
    ends: list[socket.socket] = []
    try:
        ours.setblocking(False)
        with trio.fail_after(20):
            await trio.lowlevel.wait_readable(ours)
        greeting, ancillary, _, _ = ours.recvmsg(100, socket.CMSG_SPACE(8), socket.MSG_CMSG_CLOEXEC)
        if not greeting:
            assert process.stderr is not None
            pytest.skip(f"no network namespace here: {process.stderr.read().decode().strip()[-200:]}")
        one, other = (socket.socket(fileno=fd) for fd in array.array("i", ancillary[0][2]))
        ends += one, other
        async with trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as asked:
            yield Link((one, other), asked)
    finally:
        ours.close()
        for end in ends:
            end.close()
        process.kill()
        assert process.stderr is not None
        process.stderr.close()
        process.wait()


if __name__ == "__main__":
    main()
