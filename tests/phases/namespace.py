"""A process in a network namespace of its own, which is told what to do by lines.

It has a socket as its standard input: over that it sends its descriptors, with a first line; then each line that comes
is answered by one.
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
    from collections.abc import AsyncGenerator, Callable

REQUEST: Final = struct.Struct("16sH22x")
"""An interface's name and flags, in a struct ifreq. Source: netdevice(7)."""

_SET_FLAGS: Final = 0x8914  # SIOCSIFFLAGS
_GET_FLAGS: Final = 0x8913  # SIOCGIFFLAGS
_PATIENCE: Final = 20
"""Seconds for an answer."""


# --- inside ----------------------------------------------------------------------------------------------------


def set_flags(interface: str, flags: int) -> None:
    """Set an interface's flags: IFF_UP and the like, linux/if.h."""
    _request(_SET_FLAGS, interface, flags)


def get_flags(interface: str) -> int:
    """Return an interface's flags."""
    return int(REQUEST.unpack(_request(_GET_FLAGS, interface, 0))[1])


def _request(code: int, interface: str, flags: int) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        return fcntl.ioctl(control.fileno(), code, REQUEST.pack(interface.encode(), flags))


def begin(*descriptors: int) -> socket.socket:
    """Send `descriptors` to who has started this process; return the socket to it."""
    asked = socket.socket(fileno=0)
    asked.sendmsg([b"here\n"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))])
    return asked


def answer_lines(asked: socket.socket, answer: Callable[[str], str]) -> None:
    """Answer each line that comes, until no more do."""
    with asked.makefile("r") as lines:
        for line in lines:
            asked.sendall(f"{answer(line.strip())}\n".encode())


# --- outside ---------------------------------------------------------------------------------------------------


@final
@attrs.frozen(eq=False)
class Namespace:
    """The process, from outside."""

    stream: trio.SocketStream
    descriptors: tuple[int, ...]
    """What it sent: whoever asked for it closes them."""

    async def ask(self, line: str) -> str:
        """Have something done; return the answer."""
        await self.stream.send_all(f"{line}\n".encode())
        with trio.fail_after(_PATIENCE):
            return (await self.stream.receive_some(100)).decode().strip()

    def ask_now(self, line: str) -> str:
        """The same without letting anybody else run."""
        with socket.socket(fileno=os.dup(self.stream.socket.fileno())) as sock:
            sock.settimeout(_PATIENCE)
            sock.sendall(f"{line}\n".encode())
            return sock.recv(100).decode().strip()


@asynccontextmanager
async def namespace(module: str) -> AsyncGenerator[Namespace, None]:
    """Run `module` as a process in a namespace of its own; skip the test where this host does not let us have that."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(  # noqa: ASYNC220 - it does not wait
            ["unshare", "-n", sys.executable, "-m", module],
            stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
    assert process.stderr is not None
    try:
        ours.setblocking(False)
        with trio.fail_after(_PATIENCE):
            await trio.lowlevel.wait_readable(ours)
        greeting, ancillary, _, _ = ours.recvmsg(100, socket.CMSG_SPACE(8), socket.MSG_CMSG_CLOEXEC)
        if not greeting:
            pytest.skip(f"no such network namespace here: {process.stderr.read().decode().strip()[-200:]}")
        async with trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as stream:
            yield Namespace(stream, tuple(array.array("i", ancillary[0][2])))
    finally:
        ours.close()
        process.kill()
        process.stderr.close()
        process.wait()
