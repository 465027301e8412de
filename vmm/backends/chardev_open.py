"""From the options of a chardev to a chardev: with what the host opens for it, or with a predecessor's descriptors."""

from __future__ import annotations

import os
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Protocol

import attrs

from vmm import hostio, terminals
from vmm.backends.chardev_file import FileChardev, NullChardev
from vmm.backends.chardev_options import (
    ChardevBackend,
    ChardevFileWrapper,
    ChardevNullWrapper,
    ChardevPtyWrapper,
    ChardevSocket,
    ChardevSocketWrapper,
    FdSocketAddress,
)
from vmm.backends.chardev_pty import PtyChardev
from vmm.backends.chardev_socket import CLIENT, FIRST_CLIENT, SocketChardev, serial_of
from vmm.backends.chardev_stdio import StdioChardev
from vmm.errors import DescriptorMissing, DescriptorsUnclaimed, Unsupported

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from vmm.backends.chardev import Chardev, Complain
    from vmm.backends.chardev_state import ChardevState


_OUTPUTS: Final = ("a regular file", "a pipe", "a character device", "a terminal")
_KINDS: Final = MappingProxyType(
    {
        "out": _OUTPUTS,
        "master": ("a pty master",),
        "listener": ("a listening unix socket",),
        CLIENT: ("a connected unix socket",),
    }
)
"""What the descriptors must be, in the words of `hostio.descriptor_kind`. Standard input and output may be anything."""


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


def open_chardev(
    label: str,
    backend: ChardevBackend,
    may: ObtainsDescriptors,
    complain: Complain,
    on_escape: Callable[[], None] = _leave_nothing,
) -> Chardev:
    """Make chardev `label`, with descriptors named `chardev/LABEL/...`; one with a predecessor's begins at rest.

    Whoever does not serve it must `close` it.

    Raises:
        HostFileRefused, SocketInUse: the host or another process stood in the way.
        Unsupported: an option is QEMU's and not ours.
        DescriptorMissing, DescriptorsUnclaimed, DescriptorWrongKind: the predecessor sent others than needed.
    """
    if isinstance(backend, ChardevSocketWrapper) and backend.data.server and backend.data.wait:
        instead = "the guest starts without waiting for a client; say wait=off"
        raise Unsupported(what="Option of a socket chardev", name="wait=on", instead=instead)
    prefix = f"chardev/{label}/"
    openers = _openers(backend)
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


def from_descriptors(
    label: str,
    backend: ChardevBackend,
    descriptors: Mapping[str, int],
    pending: ChardevState | None,
    complain: Complain,
    on_escape: Callable[[], None] = _leave_nothing,
) -> Chardev:
    """Make a successor's chardev, at rest, from the `descriptors` and what was `pending` of its predecessor.

    With None, say what is pending by `take_over` before it is resumed. The descriptors are the chardev's from here on,
    even if an error is raised.

    Raises:
        DescriptorMissing, DescriptorsUnclaimed, DescriptorWrongKind: there are others than needed.
    """
    chardev = _make(label, backend, dict(descriptors), complain, on_escape, inherited=True)
    if pending is not None:
        chardev.take_over(pending)
    return chardev


def _never() -> int:
    raise AssertionError("a name that a predecessor sent is not opened here")


def _openers(backend: ChardevBackend) -> dict[str, Callable[[], int]]:
    """Return how to open what every chardev of that kind begins with."""
    if isinstance(backend, ChardevNullWrapper):
        return {}
    if isinstance(backend, ChardevFileWrapper):
        file = backend.data
        return {"out": lambda: hostio.open_output_file(file.out, file.append)}
    if isinstance(backend, ChardevPtyWrapper):
        return {"master": lambda: terminals.open_pty()[0]}
    if isinstance(backend, ChardevSocketWrapper):
        address, server = backend.data.addr.data, backend.data.server
        if isinstance(address, FdSocketAddress):
            kind = "a listening unix socket" if server else "a connected unix socket"
            return {"listener" if server else FIRST_CLIENT: lambda: hostio.adopt_socket(int(address.name), kind)}
        path = address.path
        if server:
            return {"listener": lambda: hostio.listen_unix(path).detach()}
        return {FIRST_CLIENT: lambda: hostio.connect_unix(path).detach()}
    return {"input": lambda: terminals.open_private(0), "output": lambda: terminals.open_private(1)}


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
    address = options.addr.data
    path, where = (
        (None, f"fd:{address.name}") if isinstance(address, FdSocketAddress) else (address.path, f"unix:{address.path}")
    )
    client = next((name for name in found.descriptors if name != "listener"), None)
    fd = None if client is None else found.descriptors[client]
    serial = (serial_of(client) if client is not None else None) or 1
    if not options.server:
        return SocketChardev(label, where, path, complain, client=fd, serial=serial, inherited=inherited)
    listener = hostio.adopt_listener(found.descriptors["listener"])
    try:
        return SocketChardev(
            label, where, path, complain, listener=listener, client=fd, serial=serial, inherited=inherited
        )
    except BaseException:
        if not inherited and path is not None:
            hostio.unlink_own(path, listener)
        listener.detach()  # the caller closes it with the others
        raise


@attrs.frozen
class _Found:
    """Descriptors of one chardev, by the last part of their names."""

    prefix: str
    descriptors: dict[str, int]

    def check(self, backend: ChardevBackend) -> None:
        """Check that all that `backend` begins with is here, and nothing else but a client, and of the right kind."""
        needed = set(_openers(backend))
        clients = set()
        if isinstance(backend, ChardevSocketWrapper):
            needed -= {FIRST_CLIENT}  # it may have hung up since
            clients = {name for name in self.descriptors if serial_of(name) is not None}
        for name in sorted(needed - set(self.descriptors)):
            raise DescriptorMissing(name=self.prefix + name)
        extra = sorted(set(self.descriptors) - needed - set(sorted(clients)[:1]))
        if extra:
            raise DescriptorsUnclaimed(names=tuple(self.prefix + name for name in extra))
        for name, fd in self.descriptors.items():
            kinds = _KINDS.get(CLIENT if name in clients else name)
            if kinds is not None:
                hostio.require_kind(fd, self.prefix + name, *kinds)
