"""What the tests of chardevs share: where descriptors come from, the device's side, and a reader of the host's."""

from __future__ import annotations

import os
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import attrs
import trio

from vmm.backends.chardev_open import open_chardev
from vmm.backends.chardev_options import (
    ChardevSocket,
    ChardevSocketWrapper,
    InetSocketAddress,
    InetSocketAddressWrapper,
    UnixSocketAddress,
    UnixSocketAddressWrapper,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from vmm.backends.chardev import Chardev, Complain
    from vmm.backends.chardev_options import ChardevBackend
    from vmm.backends.chardev_state import ChardevState

PATIENCE = 60
"""Seconds until a test that hangs fails."""


@attrs.define
class Host:
    """Opens what is asked for."""

    inherits: bool = False

    def obtain(self, name: str, opener: Callable[[], int]) -> int:
        return opener()

    def names(self, prefix: str) -> None:
        return None


@attrs.define
class Heritage:
    """What a predecessor sent."""

    sent: dict[str, int]
    inherits: bool = True

    def obtain(self, name: str, opener: Callable[[], int]) -> int:
        return self.sent.pop(name)

    def names(self, prefix: str) -> tuple[str, ...]:
        return tuple(sorted(name for name in self.sent if name.startswith(prefix)))


def from_descriptors(
    label: str,
    backend: ChardevBackend,
    descriptors: dict[str, int],
    pending: ChardevState | None,
    complain: Complain,
    on_escape: Callable[[], None] = print,
) -> Chardev:
    """Make a successor's chardev, at rest, from the `descriptors` of its predecessor, where `pending` was, if known."""
    sent = {f"chardev/{label}/{name}": fd for name, fd in descriptors.items()}
    chardev = open_chardev(label, backend, Heritage(sent), complain, on_escape)
    if pending is not None:
        chardev.take_over(pending)
    return chardev


@attrs.define(eq=False)
class Frontend:
    """A device that takes `space` bytes, and remembers them."""

    space: int = 1 << 30
    received: bytearray = attrs.Factory(bytearray)
    largest: int = 0
    times_drained: int = 0
    _changed: trio.Event = attrs.Factory(trio.Event)

    def room(self) -> int:
        return self.space

    def receive(self, data: bytes) -> None:
        assert 0 < len(data) <= self.space
        self.space -= len(data)
        self.largest = max(self.largest, len(data))
        self.received += data
        self._change()

    def drained(self) -> None:
        self.times_drained += 1
        self._change()

    def _change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def wait_received(self, count: int) -> bytes:
        """Wait until `count` bytes have come in all; return them."""
        while len(self.received) < count:
            await self._changed.wait()
        assert len(self.received) == count
        return bytes(self.received)

    async def wait_drained(self, times: int = 1) -> None:
        while self.times_drained < times:
            await self._changed.wait()


@attrs.define
class Complaints:
    """What the operator was told."""

    texts: list[str] = attrs.Factory(list)

    def __call__(self, text: str) -> None:
        self.texts.append(text)


def socket_at(path: str, *, server: bool = True, wait: bool = False) -> ChardevSocketWrapper:
    return ChardevSocketWrapper(
        ChardevSocket(UnixSocketAddressWrapper(UnixSocketAddress(path)), server=server, wait=wait)
    )


def tcp_at(
    host: str = "127.0.0.1", port: int | str = 0, *, server: bool = True, nodelay: bool = False, **more: Any
) -> ChardevSocketWrapper:
    address = InetSocketAddress(host, str(port), **more)
    return ChardevSocketWrapper(ChardevSocket(InetSocketAddressWrapper(address), server=server, nodelay=nodelay))


def named_pipe(path: str) -> int:
    """Make a named pipe and open it for both directions, as if for its other end."""
    os.mkfifo(path)
    return os.open(path, os.O_RDWR | os.O_NONBLOCK)


def port_of(chardev: Chardev) -> int:
    """The port on which a TCP chardev listens."""
    with socket.socket(fileno=os.dup(chardev.descriptors()["listener"])) as listener:
        return int(listener.getsockname()[1])


async def connect_tcp(chardev: Chardev) -> trio.SocketStream:
    """Connect to a TCP chardev."""
    return await trio.open_tcp_stream("127.0.0.1", port_of(chardev))


@asynccontextmanager
async def served(chardev: Chardev) -> AsyncGenerator[Chardev, None]:
    """Serve `chardev` in the block; cancel it at the end."""
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            await nursery.start(chardev.serve)
            yield chardev
            nursery.cancel_scope.cancel()


async def connect(path: str) -> trio.SocketStream:
    stream = await trio.open_unix_socket(path)
    return trio.SocketStream(stream.socket)


async def read_exactly(stream: trio.abc.ReceiveStream, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        more = await stream.receive_some(count - len(data))
        assert more, f"the stream ended after {len(data)} of {count} bytes"
        data += more
    return bytes(data)


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    return b"".join([data async for data in stream])
