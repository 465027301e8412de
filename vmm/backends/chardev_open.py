"""From the options of a chardev to a chardev: with what the host opens for it, or with a predecessor's descriptors."""

from __future__ import annotations

import os
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Protocol

import attrs

from vmm import host_fds, host_sockets, host_tcp, hostio, terminals
from vmm.backends.chardev_file import FileChardev, NullChardev
from vmm.backends.chardev_options import (
    ChardevBackend,
    ChardevFileWrapper,
    ChardevNullWrapper,
    ChardevPipeWrapper,
    ChardevPtyWrapper,
    ChardevSocket,
    ChardevSocketWrapper,
    FdSocketAddress,
    InetSocketAddress,
)
from vmm.backends.chardev_pipe import PipeChardev
from vmm.backends.chardev_pty import PtyChardev
from vmm.backends.chardev_socket import (
    FIRST_CLIENT,
    UNIX_CLIENT,
    UNIX_LISTENER,
    SocketChardev,
    serial_of,
)
from vmm.backends.chardev_stdio import StdioChardev
from vmm.errors import DescriptorMissing, DescriptorsUnclaimed, OptionInvalid, Unsupported
from vmm.host_tcp import TcpPlace

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from vmm.backends.chardev import Chardev, Complain


_PIPES: Final = ("a pipe", "a character device", "a terminal")
_KINDS: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = MappingProxyType(
    {
        "file": {"out": ("a regular file", *_PIPES)},
        "pipe": {"in": _PIPES, "out": _PIPES},
        "pty": {"master": ("a pty master",)},
    }
)
"""What the descriptors must be, in the words of `descriptor_kind`. Standard input and output may be anything."""

_CONNECTING: Final = 5.0
"""Seconds for a TCP peer to answer. No other command that makes something is carried out meanwhile."""


class ObtainsDescriptors(Protocol):
    """The token by which descriptors are had: may-open-host-file, or may-adopt-descriptor."""

    def obtain(self, name: str, opener: Callable[[], int]) -> int:
        """Return the descriptor of host resource `name`, the caller's from here on."""
        ...

    def names(self, prefix: str) -> Sequence[str] | None:
        """Return the names below `prefix` that a predecessor sent; None where they are to be opened here."""
        ...

    @property
    def inherits(self) -> bool:
        """Whether there is a predecessor, so that what is made here begins at rest."""
        ...


def _leave_nothing() -> None:
    """Stand in for the end of the machine where there is no machine to end."""


async def make_chardev(
    label: str,
    backend: ChardevBackend,
    may: ObtainsDescriptors,
    complain: Complain,
    on_escape: Callable[[], None] = _leave_nothing,
) -> Chardev:
    """Make chardev `label` as `open_chardev` does, and wait for what must be waited for: a host's name, a TCP peer."""
    _check(backend)
    ready: dict[str, int] = {}
    if isinstance(backend, ChardevSocketWrapper) and may.names(f"chardev/{label}/") is None:
        place = _place(backend.data)
        if place is not None and backend.data.server:
            ready["listener"] = (await place.listen()).detach()
        elif place is not None:
            ready[FIRST_CLIENT] = (await place.connect(_CONNECTING)).detach()
    try:
        return open_chardev(label, backend, may, complain, on_escape, ready=ready)
    finally:
        _close(ready)


def open_chardev(
    label: str,
    backend: ChardevBackend,
    may: ObtainsDescriptors,
    complain: Complain,
    on_escape: Callable[[], None] = _leave_nothing,
    *,
    ready: dict[str, int] | None = None,
) -> Chardev:
    """Make chardev `label`, with descriptors named `chardev/LABEL/...`; one with a predecessor's begins at rest.

    Whoever does not serve it must `close` it. A TCP socket is not opened here, but taken out of `ready`.

    Raises:
        HostFileRefused, SocketInUse: the host or another process stood in the way.
        Unsupported: an option is QEMU's and not ours.
        OptionInvalid: an option cannot be.
        DescriptorMissing, DescriptorsUnclaimed, DescriptorWrongKind: the predecessor sent others than needed.
    """
    _check(backend)
    prefix = f"chardev/{label}/"
    openers = _openers(backend, {} if ready is None else ready)
    sent = may.names(prefix)
    if sent is not None:
        openers = {name.removeprefix(prefix): _never for name in sent}
    descriptors: dict[str, int] = {}
    try:
        for suffix, opener in openers.items():
            descriptors[suffix] = may.obtain(prefix + suffix, opener)
    except BaseException:
        _close(descriptors)
        raise
    chardev = _make(label, backend, descriptors, complain, on_escape, inherited=may.inherits)
    if sent is None:
        chardev.own()
    return chardev


def _check(backend: ChardevBackend) -> None:
    """Check what the types of `backend` leave open. Raises `Unsupported`, `OptionInvalid`."""
    if not isinstance(backend, ChardevSocketWrapper):
        return
    if backend.data.server and backend.data.wait:
        instead = "the guest starts without waiting for a client; say wait=off"
        raise Unsupported(what="Option of a socket chardev", name="wait=on", instead=instead)
    address = backend.data.addr.data
    if isinstance(address, InetSocketAddress):
        _check_inet(address, server=backend.data.server)


def _check_inet(address: InetSocketAddress, *, server: bool) -> None:
    port = address.port
    lowest = 0 if server else 1
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and lowest <= int(port) <= 0xFFFF):
        raise OptionInvalid(option="chardev-add: port", value=port, wanted=f"a number from {lowest} to 65535")
    if address.to is not None and not (server and int(port) <= address.to):
        wanted = f"a port from {port} up" if server else "possible without server on: there is one port to connect to"
        raise OptionInvalid(option="chardev-add: to", value=address.to, wanted=wanted)
    if len(address.host) > _HOST_LIMIT or not address.host.isprintable():
        wanted = f"a host's name or address, of at most {_HOST_LIMIT} characters"
        raise OptionInvalid(option="chardev-add: host", value=address.host, wanted=wanted)
    if address.ipv4 is False and address.ipv6 is False:
        raise OptionInvalid(option="chardev-add: ipv6", value=False, wanted="possible with ipv4 off too; leave one on")


_HOST_LIMIT: Final = 255
"""Characters; a name in the DNS is shorter."""


def _place(options: ChardevSocket) -> TcpPlace | None:
    """Return where a TCP socket is, of options that have been checked; None for another one."""
    address = options.addr.data
    if not isinstance(address, InetSocketAddress):
        return None
    return TcpPlace(
        host=address.host,
        port=int(address.port),
        last_port=address.to,
        ipv4=address.ipv4,
        ipv6=address.ipv6,
        numeric=address.numeric,
        keep_alive=address.keep_alive,
        no_delay=options.nodelay,
    )


def _never() -> int:
    raise AssertionError("a name that a predecessor sent is not opened here")


def _openers(backend: ChardevBackend, ready: dict[str, int]) -> dict[str, Callable[[], int]]:
    """Return how to open what every chardev of that kind begins with; a TCP socket is taken out of `ready`."""
    if isinstance(backend, ChardevNullWrapper):
        return {}
    if isinstance(backend, ChardevFileWrapper):
        file = backend.data
        return {"out": lambda: hostio.open_output_file(file.out, file.append)}
    if isinstance(backend, ChardevPipeWrapper):
        path = backend.data.device
        return {"in": lambda: hostio.open_pipe(path, "in"), "out": lambda: hostio.open_pipe(path, "out")}
    if isinstance(backend, ChardevPtyWrapper):
        return {"master": lambda: terminals.open_pty()[0]}
    if isinstance(backend, ChardevSocketWrapper):
        address, server = backend.data.addr.data, backend.data.server
        name = "listener" if server else FIRST_CLIENT
        if isinstance(address, InetSocketAddress):
            return {name: lambda: ready.pop(name)}
        if isinstance(address, FdSocketAddress):
            kinds = socket_kinds(backend.data)[not server]
            return {name: lambda: host_sockets.adopt_socket(int(address.name), *kinds)}
        path = address.path
        if server:
            return {"listener": lambda: host_sockets.listen_unix(path).detach()}
        return {FIRST_CLIENT: lambda: host_sockets.connect_unix(path).detach()}
    return {"input": lambda: terminals.open_private(0), "output": lambda: terminals.open_private(1)}


def socket_kinds(options: ChardevSocket) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what a listener's descriptor may be, and what a client's, in the words of `host_fds.descriptor_kind`."""
    match options.addr.data:
        case InetSocketAddress():
            return (host_tcp.LISTENS,), (host_tcp.CONNECTED,)
        case FdSocketAddress():
            return (UNIX_LISTENER, host_tcp.LISTENS), (UNIX_CLIENT, host_tcp.CONNECTED)
        case _:
            return (UNIX_LISTENER,), (UNIX_CLIENT,)


def _close(descriptors: Mapping[str, int]) -> None:
    for fd in descriptors.values():
        os.close(fd)


def _make(
    label: str,
    backend: ChardevBackend,
    descriptors: dict[str, int],
    complain: Complain,
    on_escape: Callable[[], None],
    *,
    inherited: bool,
) -> Chardev:
    """Make the chardev of `descriptors`, which are its own from here on, even if an error is raised."""
    found = _Found(f"chardev/{label}/", descriptors)
    try:
        found.check(backend)
        if isinstance(backend, ChardevNullWrapper):
            return NullChardev(label, complain, inherited=inherited)
        if isinstance(backend, ChardevFileWrapper):
            return FileChardev(label, descriptors["out"], backend.data.out, complain, inherited=inherited)
        if isinstance(backend, ChardevPipeWrapper):
            source, sink, path = descriptors["in"], descriptors["out"], backend.data.device
            return PipeChardev(label, source, sink, path, complain, inherited=inherited)
        if isinstance(backend, ChardevPtyWrapper):
            return PtyChardev(label, descriptors["master"], complain, inherited=inherited)
        if isinstance(backend, ChardevSocketWrapper):
            return _make_socket(label, backend.data, found, complain, inherited=inherited)
        source, sink, signals = descriptors["input"], descriptors["output"], backend.data.signal
        return StdioChardev(label, source, sink, complain, on_escape, signals=signals, inherited=inherited)
    except BaseException:
        _close(descriptors)
        raise


def _make_socket(
    label: str, options: ChardevSocket, found: _Found, complain: Complain, *, inherited: bool
) -> SocketChardev:
    listeners, clients = socket_kinds(options)
    client = next((name for name in found.descriptors if name != "listener"), None)
    fd = None if client is None else found.descriptors[client]
    serial = (serial_of(client) if client is not None else None) or 1
    path, where = _name(options)
    if not options.server:
        return SocketChardev(
            label, where, path, complain, client=fd, serial=serial, clients_are=clients, inherited=inherited
        )
    listener = host_sockets.adopt_listener(found.descriptors["listener"], f"{found.prefix}listener", *listeners)
    if host_tcp.is_tcp(listener):
        where = f"tcp:{host_tcp.local_name(listener)}"
    try:
        return SocketChardev(
            label,
            where,
            path,
            complain,
            listener=listener,
            client=fd,
            serial=serial,
            clients_are=clients,
            inherited=inherited,
        )
    except BaseException:
        if not inherited and path is not None:
            host_sockets.unlink_own(path, listener)
        listener.detach()  # the caller closes it with the others
        raise


def _name(options: ChardevSocket) -> tuple[str | None, str]:
    """Return the path of a unix socket, and what texts call a socket."""
    match options.addr.data:
        case FdSocketAddress(name):
            return None, f"fd:{name}"
        case InetSocketAddress(host, port):
            return None, f"tcp:{f'[{host}]' if ':' in host else host}:{port}"
        case unix:
            return unix.path, f"unix:{unix.path}"


@attrs.frozen
class _Found:
    """Descriptors of one chardev, by the last part of their names."""

    prefix: str
    descriptors: dict[str, int]

    def check(self, backend: ChardevBackend) -> None:
        """Check that all that `backend` begins with is here, and nothing else but a client, and of the right kind."""
        needed = set(_openers(backend, {}))
        clients = set()
        kinds: dict[str, tuple[str, ...]] = dict(_KINDS.get(backend.type, {}))
        if isinstance(backend, ChardevSocketWrapper):
            needed -= {FIRST_CLIENT}  # it may have hung up since
            clients = {name for name in self.descriptors if serial_of(name) is not None}
            kinds["listener"], of_clients = socket_kinds(backend.data)
            kinds |= dict.fromkeys(clients, of_clients)
        for name in sorted(needed - set(self.descriptors)):
            raise DescriptorMissing(name=self.prefix + name)
        extra = sorted(set(self.descriptors) - needed - set(sorted(clients)[:1]))
        if extra:
            raise DescriptorsUnclaimed(names=tuple(self.prefix + name for name in extra))
        for name, fd in self.descriptors.items():
            if name in kinds:
                host_fds.require_kind(fd, self.prefix + name, *kinds[name])
