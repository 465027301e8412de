"""TCP sockets of the host: names looked up, ports bound, peers connected to, and what a socket is connected to.

What waits, for a name or for a peer, is async and waits on the loop; all else is done at once. Sockets are
close-on-exec and do not block. TCP_NODELAY and SO_KEEPALIVE are set on a listener, and its clients inherit them (Linux,
`inet_csk_clone_lock`): so they go along to whoever gets the listener.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final, TypeAlias, final

import attrs
import trio

from vmm.errors import DescriptorWrongKind, HostFileRefused
from vmm.host_fds import descriptor_kind
from vmm.host_sockets import BACKLOG
from vmm.hostio import refused

if TYPE_CHECKING:
    from collections.abc import Sequence

LOOPBACK: Final = ("127.0.0.1", "::1")
"""Addresses that no other machine can connect to. (`localhost` is not among them: a name may lead anywhere.)"""

LISTENS: Final = "a listening tcp socket"
CONNECTED: Final = "a connected tcp socket"
"""In the words of `host_fds.descriptor_kind`."""

_SockAddr: TypeAlias = tuple[socket.AddressFamily, str]
"""Family, and the address in numbers."""


@final
@attrs.frozen(kw_only=True)
class TcpPlace:
    """Where to listen or to connect to, and how."""

    host: str
    """A name or an address; empty is every address of this host to listen on, and this host to connect to."""
    port: int
    """0: any free one, to listen on."""
    last_port: int | None = None
    """To listen on: the ports from `port` to this one are tried in turn."""
    ipv4: bool | None = None
    ipv6: bool | None = None
    """Whether addresses of that family are used; one that is true alone rules the other out."""
    numeric: bool = False
    """Whether `host` is an address, and no name to look up."""
    keep_alive: bool = False
    no_delay: bool = False

    @property
    def name(self) -> str:
        """What texts call it."""
        ports = f"{self.port}" if self.last_port in (None, self.port) else f"{self.port} to {self.last_port}"
        return f"{self.host or 'every address'} port {ports}"

    @property
    def _families(self) -> tuple[socket.AddressFamily, ...]:
        ipv4 = self.ipv4 if self.ipv4 is not None else not self.ipv6
        ipv6 = self.ipv6 if self.ipv6 is not None else not self.ipv4
        # IPv4 first: of a name that has both, every client knows that one.
        both = ((ipv4, socket.AF_INET), (ipv6, socket.AF_INET6))
        return tuple(family for wanted, family in both if wanted)

    async def look_up(self, action: str) -> list[_SockAddr]:
        """Return the addresses of the host's name, best first. Raises `HostFileRefused` if there are none."""
        if not self.host:
            return [(family, LOOPBACK[family == socket.AF_INET6]) for family in self._families]
        flags = socket.AI_NUMERICHOST if self.numeric else 0
        try:
            found = await trio.socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=flags)
        except OSError as error:
            raise HostFileRefused(action=action, path=self.name, reason=error.strerror or str(error)) from error
        except UnicodeError as error:  # a name is encoded for the DNS (IDNA), and some cannot be
            reason = f"it has no host's name ({error})"
            raise HostFileRefused(action=action, path=self.name, reason=reason) from error
        # Whoever has given a family has left out the other.
        addresses: list[_SockAddr] = [
            (wanted, str(address[0]))
            for wanted in self._families
            for family, _, _, _, address in found
            if family == wanted
        ]
        if not addresses:
            kind = "IPv6" if socket.AF_INET not in self._families else "IPv4"
            raise HostFileRefused(action=action, path=self.name, reason=f"it has no {kind} address")
        return addresses

    async def listen(self) -> socket.socket:
        """Bind a socket and listen.

        Raises:
            HostFileRefused: the name is unknown, every port is taken, or the host refused.
        """
        addresses: list[_SockAddr]
        if self.host:
            addresses = await self.look_up("listen on")
        else:  # one socket for both families where both are wanted
            addresses = [(family, "::" if family == socket.AF_INET6 else "0.0.0.0") for family in self._families[::-1]]
        error: HostFileRefused | None = None
        for port in range(self.port, (self.last_port or self.port) + 1):
            for family, address in addresses:
                try:
                    listener = _bound(family, address, port, self.name, both=not self.host and self.ipv4 is not False)
                except HostFileRefused as failure:
                    error = error or failure
                else:
                    self._set_options(listener)
                    return listener
        assert error is not None, "there is at least one address and one port"
        raise error

    async def connect(self, within: float) -> socket.socket:
        """Connect to whoever answers there first, of all addresses in turn.

        Raises:
            HostFileRefused: nobody answers, or not within so many seconds.
        """
        error: OSError | None = None
        with trio.move_on_after(within):
            for family, address in await self.look_up("connect to"):
                try:
                    with trio.socket.socket(family, socket.SOCK_STREAM) as sock:
                        await sock.connect((address, self.port))
                        connected = socket.socket(fileno=sock.detach())
                except OSError as failure:
                    error = error or failure
                else:
                    connected.setblocking(False)
                    self._set_options(connected)
                    return connected
            assert error is not None, "there is at least one address"
            raise refused("connect to", self.name, error) from error
        raise HostFileRefused(action="connect to", path=self.name, reason=f"nobody answers within {within:g} s")

    def _set_options(self, sock: socket.socket) -> None:
        if self.keep_alive:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if self.no_delay:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _bound(family: socket.AddressFamily, address: str, port: int, name: str, *, both: bool = False) -> socket.socket:
    try:
        listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as error:  # a kernel without IPv6
        raise refused("listen on", name, error) from error
    try:
        # On Linux this lets a port be bound whose last connections linger, and never one that somebody listens on.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not both)
        listener.bind((address, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise refused("listen on", name, error) from error
    return listener


def local_name(sock: socket.socket) -> str:
    """Return the own address of `sock`, with the real port: `127.0.0.1:4444`, `[::1]:4444`."""
    return _written(sock.getsockname())


def peer_name(sock: socket.socket) -> str:
    """Return the peer's address in the same form; `?` if it has gone."""
    try:
        return _written(sock.getpeername())
    except OSError:
        return "?"


def _written(address: Sequence[object]) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


def is_tcp(sock: socket.socket) -> bool:
    """Say whether `sock` is a TCP socket."""
    return sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM


def on_loopback(sock: socket.socket) -> bool:
    """Say whether TCP socket `sock` is bound to an address that no other machine can reach."""
    address = str(sock.getsockname()[0])
    return address == "::1" or address.startswith("127.")


# --- listeners of this machine alone ------------------------------------------------------------------------


def listen_loopback(host: str, port: int) -> socket.socket:
    """Bind a socket to `port` (0: any free one) of `host`, one of `LOOPBACK`, and listen.

    Raises:
        HostFileRefused: the port is taken, or the host refused.
    """
    assert host in LOOPBACK, "the caller has checked the address"
    family = socket.AF_INET6 if host == "::1" else socket.AF_INET
    return _bound(family, host, port, f"{host} port {port}")


def adopt_loopback_listener(fd: int, name: str, host: str, port: int) -> socket.socket:
    """Make a socket of the descriptor `fd`, which listens on `port` (0: whichever) of `host`.

    Raises:
        DescriptorWrongKind: it is anything else. `name` is what the text calls it. It stays the caller's; else it
            is the socket's.
    """
    found = descriptor_kind(fd)
    if found == LISTENS:
        listener = socket.socket(fileno=fd)
        bound = listener.getsockname()
        if bound[0] == host and port in (0, bound[1]):
            listener.setblocking(False)
            return listener
        found = f"a socket that listens on {bound[0]} port {bound[1]}"
        listener.detach()
    raise DescriptorWrongKind(name=name, found=found, wanted=f"a socket that listens on {host} port {port}")
