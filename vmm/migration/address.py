"""Where a migration goes or comes from: QEMU's MigrationAddress, as far as it is supported.

An address is a socket (unix, inet, vsock or a descriptor), a file or a command. Resolving names, opening, starting and
looking descriptors up is not done here. The annotations are those of `vmm.monitor.qapi`: they say what the wire has,
`check_address` says the rest.

Source: QEMU qapi/migration.json (MigrationAddress), qapi/sockets.json (SocketAddress), util/qemu-sockets.c.
"""

from __future__ import annotations

import shlex
from typing import Annotated, Final, Literal, TypeAlias, final

import attrs

from vmm.errors import OptionInvalid
from vmm.monitor.qapi import U16, U32, Size, Union

SUN_PATH_SIZE: Final = 108  # bytes in sockaddr_un, one of them a NUL before or after the name
UNIX_PATH_LIMIT: Final = SUN_PATH_SIZE - 1
_HOST_LIMIT: Final = 255  # characters; a name in the DNS is shorter
_COMMAND_LIMIT: Final = 128 << 10  # bytes of one word of a command. Source: execve(2), MAX_ARG_STRLEN
_COMMAND_WORDS: Final = 1024


@final
@attrs.frozen
class UnixAddress:
    """A unix stream socket by its path, or by its name in the abstract namespace."""

    type: Literal["unix"] = attrs.field(default="unix", kw_only=True)
    path: str
    abstract: bool = False
    """Whether `path` is a name in the abstract namespace."""
    tight: bool = True
    """Whether an abstract name ends with `path`, or is filled up with NUL bytes."""

    def socket_name(self) -> str | bytes:
        """Return what to bind or connect to."""
        if not self.abstract:
            return self.path
        name = b"\0" + _path_bytes(self.path)
        return name if self.tight else name.ljust(SUN_PATH_SIZE, b"\0")


@final
@attrs.frozen
class InetAddress:
    """A TCP address. Port "0" lets the listener choose; an empty host means every address of this host."""

    type: Literal["inet"] = attrs.field(default="inet", kw_only=True)
    host: str
    port: str
    """Decimal, 0 to 65535."""
    numeric: bool | None = None
    """Whether `host` is an address, not to be looked up; None is no."""
    to: U16 | None = None
    """The last port that a listener tries, from `port` on; None is `port` alone. A source connects to `port`."""
    ipv4: bool | None = None
    ipv6: bool | None = None
    """Whether addresses of that family are used; both None is both, one true is that one."""
    keep_alive: bool | None = None
    """Whether the kernel asks a silent peer whether it lives; None is yes, within the bounds of
    `vmm.migration.silence`, and true is within the host's."""
    keep_alive_count: U32 | None = None
    """Questions without an answer after which it does not; None or 0 leaves it at those bounds."""
    keep_alive_idle: U32 | None = None
    """Seconds of silence before the first; likewise."""
    keep_alive_interval: U32 | None = None
    """Seconds between two; likewise."""


@final
@attrs.frozen
class VsockAddress:
    """An address of AF_VSOCK, between a host and its guests. Port 4294967295 lets the listener choose."""

    type: Literal["vsock"] = attrs.field(default="vsock", kw_only=True)
    cid: str
    """Decimal, 0 to 4294967295. A listener's 4294967295 is every address of this host; 1 is this host, for both."""
    port: str
    """Decimal, 0 to 4294967295."""


@final
@attrs.frozen
class DescriptorAddress:
    """What is open already: a socket, a pipe or a file that `getfd` named, or by its number in this process."""

    type: Literal["fd"] = attrs.field(default="fd", kw_only=True)
    name: str = attrs.field(metadata={"wire": "str"})
    """Digits are a number; a name never begins with a digit."""

    @property
    def number(self) -> int | None:
        """The descriptor's number, or None where it has a name."""
        return int(self.name) if self.name.isdecimal() else None


SocketAddress: TypeAlias = Annotated[UnixAddress | InetAddress | VsockAddress | DescriptorAddress, Union("type")]


@final
@attrs.frozen(kw_only=True)
class SocketTransport:
    """A migration address that is a socket: `transport` and the socket's own members side by side."""

    transport: Literal["socket"] = "socket"
    address: SocketAddress = attrs.field(metadata={"inline": True})


@final
@attrs.frozen
class FileAddress:
    """A file that holds, or is to hold, a state stream."""

    transport: Literal["file"] = attrs.field(default="file", kw_only=True)
    filename: str
    offset: Size = 0
    """Bytes of the file before the stream, which are not touched."""

    @property
    def what(self) -> str:
        """What texts call it."""
        return "a file"


@final
@attrs.frozen
class ExecAddress:
    """A command of this host, whose standard input or output the stream is."""

    transport: Literal["exec"] = attrs.field(default="exec", kw_only=True)
    args: list[str]
    """The program, which is looked for in PATH, and its arguments."""

    @property
    def what(self) -> str:
        """What texts call it."""
        return "a command"

    @property
    def command(self) -> str:
        """What to call it: a shell's one command, or all of its words."""
        if self.args[:-1] == [*SHELL]:
            return self.args[-1]
        return shlex.join(self.args)


SHELL: Final = ("/bin/sh", "-c")
"""What a URI's one command is given to."""

MigrationAddress: TypeAlias = Annotated[SocketTransport | ExecAddress | FileAddress, Union("transport")]

HostAddress: TypeAlias = ExecAddress | FileAddress
"""What is opened or started here, and takes may-open-host-file."""

ChannelAddress: TypeAlias = UnixAddress | InetAddress | VsockAddress | DescriptorAddress | ExecAddress | FileAddress
"""Where one channel goes."""


def check_address(address: ChannelAddress, where: str) -> None:
    """Check what the types of `address` leave open.

    Args:
        where: what it came from ("-incoming", "migrate: channels[0]"), for the error text.

    Raises:
        OptionInvalid: a path, a port, a name or a combination that cannot be.
    """
    if isinstance(address, UnixAddress):
        _check_unix(address, where)
    elif isinstance(address, InetAddress):
        _check_inet(address, where)
    elif isinstance(address, VsockAddress):
        _check_vsock(address, where)
    elif isinstance(address, FileAddress):
        _check_file(address, where)
    elif isinstance(address, ExecAddress):
        _check_command(address, where)
    else:
        _check_descriptor(address, where)


def _check_unix(address: UnixAddress, where: str) -> None:
    if not _is_path(address.path):
        wanted = f"a socket's path: 1 to {UNIX_PATH_LIMIT} bytes, none of them NUL"
        raise OptionInvalid(option=f"{where}: path", value=address.path, wanted=wanted)
    if not address.tight and not address.abstract:
        raise OptionInvalid(option=f"{where}: tight", value=address.tight, wanted="possible without abstract on")


def _check_inet(address: InetAddress, where: str) -> None:
    port = address.port
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and int(port) <= 0xFFFF):
        raise OptionInvalid(option=f"{where}: port", value=port, wanted="a number from 0 to 65535")
    if not address.host.isprintable() or len(address.host) > _HOST_LIMIT:
        wanted = f"a host's name or address, of at most {_HOST_LIMIT} characters"
        raise OptionInvalid(option=f"{where}: host", value=address.host, wanted=wanted)
    if address.ipv4 is False and address.ipv6 is False:
        raise OptionInvalid(option=f"{where}: ipv6", value=False, wanted="possible with ipv4 off too; leave one on")
    if address.to is not None and not int(port) <= address.to <= 0xFFFF:
        raise OptionInvalid(option=f"{where}: to", value=address.to, wanted=f"a port from {port} to 65535")
    for name, value, most in (
        ("keep-alive-count", address.keep_alive_count, 127),
        ("keep-alive-idle", address.keep_alive_idle, 32767),
        ("keep-alive-interval", address.keep_alive_interval, 32767),
    ):
        if value is None:
            continue
        if not address.keep_alive:
            raise OptionInvalid(option=f"{where}: {name}", value=value, wanted="possible without keep-alive on")
        if value > most:  # Source: linux/tcp.h, MAX_TCP_KEEPCNT and its like
            raise OptionInvalid(option=f"{where}: {name}", value=value, wanted=f"a number from 0 to {most}")


def _check_vsock(address: VsockAddress, where: str) -> None:
    for name, value in (("cid", address.cid), ("port", address.port)):
        if not (value.isascii() and value.isdecimal() and len(value) <= 10 and int(value) <= 0xFFFF_FFFF):
            raise OptionInvalid(option=f"{where}: {name}", value=value, wanted="a number from 0 to 4294967295")


def _check_command(address: ExecAddress, where: str) -> None:
    args = address.args
    if not args or not args[0] or len(args) > _COMMAND_WORDS:
        wanted = f"a program and its arguments, 1 to {_COMMAND_WORDS} words"
        raise OptionInvalid(option=f"{where}: args", value=args, wanted=wanted)
    for word in args:
        if not _is_word(word):
            wanted = f"a word of a command: fewer than {_COMMAND_LIMIT} bytes, none of them NUL"
            raise OptionInvalid(option=f"{where}: args", value=word, wanted=wanted)


def _check_file(address: FileAddress, where: str) -> None:
    if not address.filename or "\0" in address.filename:
        raise OptionInvalid(option=f"{where}: filename", value=address.filename, wanted="a path, which has no NUL")
    if not 0 <= address.offset < 1 << 62:
        raise OptionInvalid(option=f"{where}: offset", value=address.offset, wanted="a number of bytes below 2^62")


def _check_descriptor(address: DescriptorAddress, where: str) -> None:
    name = address.name
    number = name.isascii() and name.isdecimal() and len(name) <= 9
    if not number and (not name or name[0].isdecimal()):
        wanted = "a descriptor's number, or a name given with getfd, which does not begin with a digit"
        raise OptionInvalid(option=f"{where}: fd", value=name, wanted=wanted)


def _is_word(word: str) -> bool:
    try:
        return len(_path_bytes(word)) < _COMMAND_LIMIT and "\0" not in word
    except UnicodeEncodeError:
        return False


def _is_path(path: str) -> bool:
    try:
        return 1 <= len(_path_bytes(path)) <= UNIX_PATH_LIMIT and "\0" not in path
    except UnicodeEncodeError:
        return False


def _path_bytes(path: str) -> bytes:
    # A path from the command line that is no UTF-8 has surrogates in it, which become its bytes again.
    return path.encode(errors="surrogateescape")
