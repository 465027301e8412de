"""What `chardev-add` says about a chardev: QAPI's ChardevBackend, for the kinds that there are.

Source: QEMU qapi/char.json (ChardevBackend and its branches) and qapi/sockets.json (SocketAddressLegacy).
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias, final

import attrs

from vmm.monitor.qapi import U16, Union

ChardevKind: TypeAlias = Literal["file", "null", "pipe", "pty", "socket", "stdio"]


@final
@attrs.frozen
class ChardevCommon:
    """Options of a chardev that has none."""


@final
@attrs.frozen
class ChardevFile:
    """Options of kind file. `out` is the path; `append` keeps what is there."""

    out: str
    append: bool = False


@final
@attrs.frozen
class ChardevHostdev:
    """Options of kind pipe. `device` is a path: of pipes with `.in` and `.out` at its end, or of one file for both."""

    device: str


@final
@attrs.frozen
class UnixSocketAddress:
    """A unix socket, by its path."""

    path: str


@final
@attrs.frozen
class UnixSocketAddressWrapper:
    """The `unix` branch of SocketAddressLegacy."""

    data: UnixSocketAddress
    type: Literal["unix"] = "unix"


@final
@attrs.frozen
class InetSocketAddress:
    """A TCP address. An empty host is every address of this host, to listen on, or this host, to connect to."""

    host: str
    port: str
    """Decimal; to listen on, 0 is any free one, which `query-chardev` shows."""
    numeric: bool = False
    """Whether `host` is an address, and no name to look up."""
    to: U16 | None = None
    """To listen on: the last port of a range, whose first free one is used."""
    ipv4: bool | None = None
    ipv6: bool | None = None
    """Whether addresses of that family are used; one that is true alone rules the other out."""
    keep_alive: bool = False


@final
@attrs.frozen
class InetSocketAddressWrapper:
    """The `inet` branch of SocketAddressLegacy."""

    data: InetSocketAddress
    type: Literal["inet"] = "inet"


@final
@attrs.frozen
class FdSocketAddress:
    """A unix or TCP socket that is open already."""

    name: str = attrs.field(metadata={"wire": "str"})
    """Digits are the number of a descriptor that this process was started with; others a name given by `getfd`."""


@final
@attrs.frozen
class FdSocketAddressWrapper:
    """The `fd` branch of SocketAddressLegacy."""

    data: FdSocketAddress
    type: Literal["fd"] = "fd"


@final
@attrs.frozen
class ChardevSocket:
    """Options of kind socket. A server takes one client at a time; `wait` must be off: the guest waits for nobody."""

    addr: Annotated[UnixSocketAddressWrapper | InetSocketAddressWrapper | FdSocketAddressWrapper, Union("type")]
    server: bool = True
    wait: bool = False
    nodelay: bool = False
    """For TCP: whether output goes at once, and is not gathered while earlier output is under way."""


@final
@attrs.frozen
class ChardevStdio:
    """Options of kind stdio. With `signal`, Ctrl-C ends the VMM; without, it reaches the guest.

    QEMU's default is on. It is off here, as it is with QEMU's `-nographic` and `-serial mon:stdio`.
    """

    signal: bool = False


@final
@attrs.frozen
class ChardevFileWrapper:
    """A chardev that writes a file."""

    data: ChardevFile
    type: Literal["file"] = "file"


@final
@attrs.frozen
class ChardevNullWrapper:
    """A chardev that drops all output and has no input."""

    data: ChardevCommon = attrs.Factory(ChardevCommon)
    type: Literal["null"] = "null"


@final
@attrs.frozen
class ChardevPipeWrapper:
    """A chardev on named pipes, or on a character device."""

    data: ChardevHostdev
    type: Literal["pipe"] = "pipe"


@final
@attrs.frozen
class ChardevPtyWrapper:
    """A chardev that is a new pty of the host."""

    data: ChardevCommon = attrs.Factory(ChardevCommon)
    type: Literal["pty"] = "pty"


@final
@attrs.frozen
class ChardevSocketWrapper:
    """A chardev that is one end of a unix or TCP socket."""

    data: ChardevSocket
    type: Literal["socket"] = "socket"


@final
@attrs.frozen
class ChardevStdioWrapper:
    """A chardev on the VMM's standard input and output."""

    data: ChardevStdio = attrs.Factory(ChardevStdio)
    type: Literal["stdio"] = "stdio"


ChardevBackend: TypeAlias = Annotated[
    ChardevFileWrapper
    | ChardevNullWrapper
    | ChardevPipeWrapper
    | ChardevPtyWrapper
    | ChardevSocketWrapper
    | ChardevStdioWrapper,
    Union("type"),
]
