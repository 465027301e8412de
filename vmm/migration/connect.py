"""Sockets of migration channels: connected by the source, bound by the destination."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, final

import attrs
import trio

from vmm import hostio
from vmm.errors import HostFileRefused
from vmm.migration.address import DescriptorAddress, InetAddress, UnixAddress

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmm.migration.address import ChannelAddress, SocketAddress


def _name(address: SocketAddress) -> str:
    match address:
        case UnixAddress():
            return address.path
        case InetAddress():
            return f"{address.host}:{address.port}"
        case DescriptorAddress():
            return f"descriptor {address.name}"


def _refused(action: str, address: SocketAddress, error: OSError) -> HostFileRefused:
    reason = os.strerror(error.errno) if error.errno else str(error)
    return HostFileRefused(action=action, path=_name(address), reason=reason)


def _no_name(action: str, address: SocketAddress, error: UnicodeError) -> HostFileRefused:
    # A name is encoded for the DNS (IDNA), and some cannot be: a label is 1 to 63 characters, and no symbols.
    return HostFileRefused(action=action, path=_name(address), reason=f"it has no host's name ({error})")


async def connect(address: SocketAddress, *, within: float) -> trio.socket.SocketType:
    """Connect to `address`. For a descriptor: duplicate the connected socket; the descriptor stays the caller's.

    Raises:
        HostFileRefused: nobody listens there, or not within `within` seconds.
    """
    try:
        with trio.fail_after(within):
            match address:
                case UnixAddress():
                    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                    try:
                        await sock.connect(address.socket_name())
                    except BaseException:
                        sock.close()
                        raise
                    return sock
                case InetAddress():
                    stream = await trio.open_tcp_stream(address.host or "localhost", int(address.port))
                    return stream.socket
                case DescriptorAddress():
                    return trio.socket.from_stdlib_socket(_copy(address))
    except trio.TooSlowError as error:
        late = OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        raise _refused("connect to", address, late) from error
    except OSError as error:
        raise _refused("connect to", address, error) from error
    except UnicodeError as error:
        raise _no_name("connect to", address, error) from error


async def connect_stream(address: SocketAddress, *, within: float) -> trio.SocketStream:
    """Connect to `address` and return it as a stream. Raises as `connect` does."""
    return trio.SocketStream(await connect(address, within=within))


def _number(address: DescriptorAddress) -> int:
    fd = address.number
    assert fd is not None, "names of descriptors are resolved by the command"
    return fd


def _copy(address: DescriptorAddress) -> socket.socket:
    copy = hostio.dup(_number(address))
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise


def _listens(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def copy_connected(address: DescriptorAddress) -> trio.socket.SocketType | None:
    """Duplicate a socket that is connected; None if it listens. The descriptor stays the caller's.

    Raises:
        HostFileRefused: no descriptor is left.
    """
    sock = _copy(address)
    if _listens(sock):
        sock.close()
        return None
    return trio.socket.from_stdlib_socket(sock)


def close_descriptors(addresses: Iterable[ChannelAddress | None]) -> None:
    """Close the descriptors among `addresses`. For their owner; what uses them has duplicated them. Never raises."""
    for address in addresses:
        if isinstance(address, DescriptorAddress) and address.number is not None:
            with suppress(OSError):
                os.close(address.number)


@final
@attrs.define(eq=False)
class Listener:
    """A bound channel of the destination. Removes its path when it is closed."""

    sock: trio.socket.SocketType
    address: SocketAddress
    """With the real port."""
    _bound: socket.socket | None = None
    """The same socket, where it has a path to remove."""

    async def accept(self) -> trio.socket.SocketType:
        """Wait for the next connection."""
        sock, _ = await self.sock.accept()
        return sock

    def close(self) -> None:
        """Stop listening. Idempotent."""
        if self._bound is not None and isinstance(self.address, UnixAddress):
            hostio.unlink_own(self.address.path, self._bound)
            self._bound = None
        self.sock.close()


async def listen(address: SocketAddress) -> Listener:
    """Bind `address`. For a descriptor: duplicate the listening socket; the descriptor stays the caller's.

    Raises:
        HostFileRefused: it cannot be bound, or is a descriptor that does not listen.
        SocketInUse: somebody listens there.
    """
    try:
        match address:
            case UnixAddress(abstract=False):
                bound = hostio.listen_unix(address.path)
                return Listener(trio.socket.from_stdlib_socket(bound), address, bound)
            case UnixAddress():
                sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                await sock.bind(address.socket_name())
                sock.listen(1)
                return Listener(sock, address)
            case InetAddress():
                (first, *others) = await trio.open_tcp_listeners(int(address.port), host=address.host or None)
                for other in others:
                    await other.aclose()
                host, port = first.socket.getsockname()[:2]
                return Listener(first.socket, InetAddress(host, str(port)))
            case DescriptorAddress():
                copy = _copy(address)
                if not _listens(copy):
                    copy.close()
                    reason = "it is no listening socket"
                    raise HostFileRefused(action="listen on", path=_name(address), reason=reason)
                return Listener(trio.socket.from_stdlib_socket(copy), address)
    except OSError as error:
        raise _refused("listen on", address, error) from error
    except UnicodeError as error:
        raise _no_name("listen on", address, error) from error
