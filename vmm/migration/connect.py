"""Channels of a migration that are sockets: connected by the source, bound by the destination."""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Literal, final

import attrs
import trio

from vmm import host_fds, host_sockets, hostio
from vmm.errors import HostFileRefused
from vmm.host_tcp import TcpPlace
from vmm.migration.address import DescriptorAddress, InetAddress, UnixAddress, VsockAddress
from vmm.migration.connection import Connection
from vmm.migration.silence import bound_silence

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmm.migration.address import ChannelAddress, SocketAddress

_BACKLOG: Final = 16
"""Connections that wait for an accept."""

_LACKING: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_AGAIN: Final = 0.1
"""Seconds after which it is tried again where the host lacks what a connection takes."""


def _name(address: UnixAddress | VsockAddress | DescriptorAddress) -> str:
    match address:
        case UnixAddress():
            return address.path
        case VsockAddress():
            return f"vsock:{address.cid}:{address.port}"
        case DescriptorAddress():
            return f"descriptor {address.name}"


def _refused(action: str, address: UnixAddress | VsockAddress | DescriptorAddress, error: OSError) -> HostFileRefused:
    reason = os.strerror(error.errno) if error.errno else str(error)
    return HostFileRefused(action=action, path=_name(address), reason=reason)


def _place(address: InetAddress, last_port: int | None = None) -> TcpPlace:
    return TcpPlace(
        host=address.host,
        port=int(address.port),
        last_port=last_port,
        ipv4=address.ipv4,
        ipv6=address.ipv6,
        numeric=bool(address.numeric),
        keep_alive=bool(address.keep_alive),
        no_delay=True,  # a word, or the last of the state, waits for nothing
    )


def _patient(sock: socket.socket, address: InetAddress) -> socket.socket:
    """Set how long a peer may be silent: as `address` says, and else as every channel has it."""
    bound_silence(sock, ask=address.keep_alive is not False)
    for option, value in (
        (socket.TCP_KEEPCNT, address.keep_alive_count),
        (socket.TCP_KEEPIDLE, address.keep_alive_idle),
        (socket.TCP_KEEPINTVL, address.keep_alive_interval),
    ):
        if value:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
    return sock


async def connect(address: SocketAddress, *, within: float) -> trio.socket.SocketType:
    """Connect to `address`. For a descriptor: duplicate the connected socket; the descriptor stays the caller's.

    Raises:
        HostFileRefused: nobody listens there, or not within `within` seconds.
    """
    if isinstance(address, InetAddress):
        return trio.socket.from_stdlib_socket(_patient(await _place(address).connect(within), address))
    try:
        with trio.fail_after(within):
            match address:
                case UnixAddress():
                    return await _connected(socket.AF_UNIX, address.socket_name())
                case VsockAddress():
                    return await _connected(socket.AF_VSOCK, (int(address.cid), int(address.port)))
                case DescriptorAddress():
                    return trio.socket.from_stdlib_socket(_copy(address))
    except trio.TooSlowError as error:
        late = OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        raise _refused("connect to", address, late) from error
    except OSError as error:
        raise _refused("connect to", address, error) from error


async def _connected(family: socket.AddressFamily, name: str | bytes | tuple[int, int]) -> trio.socket.SocketType:
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        await sock.connect(name)
    except BaseException:
        sock.close()
        raise
    return sock


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
        sock = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise
    bound_silence(sock)
    return sock


def _listens(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def open_descriptor(address: DescriptorAddress) -> Connection | None:
    """Duplicate a socket that is connected, a pipe or a file; None for a socket that listens. The descriptor stays the
    caller's, but blocks no more, unless it is a file.

    Raises:
        HostFileRefused: no descriptor is left.
    """
    fd = hostio.dup(_number(address))
    mode = os.fstat(fd).st_mode
    if not stat.S_ISSOCK(mode):
        if not stat.S_ISREG(mode):
            hostio.set_blocking(fd, False)
        return Connection(fd)
    sock = socket.socket(fileno=fd)
    if _listens(sock):
        sock.close()
        return None
    bound_silence(sock)
    return Connection(trio.socket.from_stdlib_socket(sock))


async def connect_channel(address: SocketAddress, *, within: float) -> Connection:
    """Connect to `address`, or duplicate a descriptor, which may be a pipe or a file. Raises as `connect` does."""
    if not isinstance(address, DescriptorAddress):
        return Connection(await connect(address, within=within))
    connection = open_descriptor(address)
    if connection is None:
        reason = "it is a listening socket, not a connected one"
        raise HostFileRefused(action="connect to", path=_name(address), reason=reason)
    return connection


def require_stream(fd: int, name: str, direction: Literal["out", "in"]) -> None:
    """Check that a state stream can go out by descriptor `name`, or come in.

    Raises:
        DescriptorWrongKind: it is no stream socket, pipe or regular file, or was opened for the other direction.
    """
    if host_fds.descriptor_kind(fd) not in ("a pipe", "a regular file"):
        host_sockets.require_stream_socket(fd, name, " or a pipe or a regular file")
    elif direction == "out":
        host_fds.require_writable(fd, name)
    else:
        host_fds.require_readable(fd, name)


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

    async def accept(self, *, patient: bool = True) -> trio.socket.SocketType:
        """Wait for the next connection.

        Whoever comes while the host lacks what one takes is served later; without `patient` that is an `OSError`, for
        whoever keeps a guest standing meanwhile.
        """
        while True:
            try:
                sock, _ = await self.sock.accept()
                break
            except OSError as error:
                if error.errno not in _LACKING or not patient:
                    raise
                await trio.sleep(_AGAIN)
        if isinstance(self.address, DescriptorAddress):
            bound_silence(sock)  # it may have been connected before the listener came here, of which it has the rest
        return sock

    def close(self) -> None:
        """Stop listening. Idempotent."""
        if self._bound is not None and isinstance(self.address, UnixAddress):
            host_sockets.unlink_own(self.address.path, self._bound)
            self._bound = None
        self.sock.close()


async def listen(address: SocketAddress) -> Listener:
    """Bind `address`. For a descriptor: duplicate the listening socket; the descriptor stays the caller's.

    Raises:
        HostFileRefused: it cannot be bound, or is a descriptor that does not listen.
        SocketInUse: somebody listens there.
    """
    if isinstance(address, InetAddress):
        place = _place(address, address.to)
        sock = _patient(await place.listen(), address)
        host, port = sock.getsockname()[:2]
        return Listener(trio.socket.from_stdlib_socket(sock), InetAddress(host, str(port)))
    try:
        match address:
            case UnixAddress(abstract=False):
                bound = host_sockets.listen_unix(address.path)
                return Listener(trio.socket.from_stdlib_socket(bound), address, bound)
            case UnixAddress():
                return Listener(await _bound(socket.AF_UNIX, address.socket_name()), address)
            case VsockAddress():
                vsock = await _bound(socket.AF_VSOCK, (int(address.cid), int(address.port)))
                cid, number = vsock.getsockname()
                return Listener(vsock, VsockAddress(str(cid), str(number)))
            case DescriptorAddress():
                copy = _copy(address)
                if not _listens(copy):
                    copy.close()
                    reason = "it is no listening socket"
                    raise HostFileRefused(action="listen on", path=_name(address), reason=reason)
                return Listener(trio.socket.from_stdlib_socket(copy), address)
    except OSError as error:
        raise _refused("listen on", address, error) from error


async def _bound(family: socket.AddressFamily, name: str | bytes | tuple[int, int]) -> trio.socket.SocketType:
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        await sock.bind(name)
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock
