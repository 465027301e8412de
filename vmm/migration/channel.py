"""Migration channels: the forms that `-incoming`, `migrate` and `migrate-incoming` take them in.

    URI          unix:/run/vm/main.sock        tcp:192.0.2.1:4444        tcp:[2001:db8::1]:4444,ipv4=off        fd:main
                 vsock:2:1234    file:/var/lib/vm/state,offset=1M    exec:ssh there trio-vmm-receive
    JSON         {"channel-type": "cpr", "addr": {"transport": "socket", "type": "unix", "path": "/run/vm/cpr.sock"}}
    dotted keys  cpr,addr.transport=socket,addr.type=unix,addr.path=/run/vm/cpr.sock

Every function takes `where`, what the text came from ("-incoming", "migrate: uri"), for the error texts.

Source: QEMU qapi/migration.json (MigrationChannel), migration/migration.c (URIs), docs/devel/migration/CPR.rst.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, Literal, final

import attrs

from vmm.errors import InvalidArguments, MigrationRefused, OptionInvalid, Unsupported
from vmm.migration.address import (
    SHELL,
    ChannelAddress,
    DescriptorAddress,
    ExecAddress,
    FileAddress,
    InetAddress,
    MigrationAddress,
    SocketTransport,
    UnixAddress,
    VsockAddress,
    check_address,
)
from vmm.migration.dotted_keys import parse_dotted_keys
from vmm.monitor.arguments import structure, unstructure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ChannelType = Literal["main", "cpr"]

TEXT_LIMIT: Final = 4096  # characters
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+-]*:")
_UNSUPPORTED_SCHEMES: Final = ("rdma",)
_POSSIBLE: Final = "use tcp:HOST:PORT, unix:PATH, vsock:CID:PORT, fd:NAME, file:PATH or exec:COMMAND"
_SIZE: Final = re.compile(r"(0x[0-9a-f]{1,16}|\d{1,19})([bkmgt]?)", re.IGNORECASE)
_SUFFIXES: Final[Mapping[str, int]] = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_INET_FLAGS: Final = ("numeric", "ipv4", "ipv6", "keep-alive")
_INET_NUMBERS: Final = ("to", "keep-alive-count", "keep-alive-idle", "keep-alive-interval")
_NUMBER: Final = re.compile(r"[0-9]{1,9}")
_FLAGS: Final = ("abstract", "tight", *_INET_FLAGS)
_SWITCH: Final[Mapping[str, bool]] = {"on": True, "off": False}


@final
@attrs.frozen(kw_only=True)
class MigrationChannel:
    """QEMU's MigrationChannel, for arguments of commands."""

    channel_type: ChannelType
    addr: MigrationAddress


@final
@attrs.frozen
class Channel:
    """One channel of a migration, and what it carries: the machine's state, or descriptors and the recipe (cpr)."""

    channel_type: ChannelType
    address: ChannelAddress

    @classmethod
    def from_json(cls, value: object, where: str) -> Channel:
        """Read QEMU's MigrationChannel, as JSON or structured already.

        Raises:
            OptionInvalid: it is none, or says something that cannot be.
        """
        channel = value if isinstance(value, MigrationChannel) else _structured(value, where)
        address = channel.addr.address if isinstance(channel.addr, SocketTransport) else channel.addr
        check_address(address, where)
        return cls(channel.channel_type, address)

    @classmethod
    def from_uri(cls, uri: str, where: str) -> Channel:
        """Read a URI: the address of a main channel. Raises as `parse` does."""
        _check_length(uri, where)
        scheme, colon, rest = uri.partition(":")
        if colon and scheme in _UNSUPPORTED_SCHEMES:
            raise Unsupported(what="Migration transport", name=scheme, instead=_POSSIBLE)
        address: ChannelAddress
        if colon and scheme == "unix":
            address = UnixAddress(rest)
        elif colon and scheme == "fd":
            address = DescriptorAddress(rest)
        elif colon and scheme == "tcp":
            address = _inet_of(rest, where)
        elif colon and scheme == "vsock":
            address = _vsock_of(rest, where)
        elif colon and scheme == "file":
            address = _file_of(rest, where)
        elif colon and scheme == "exec":
            address = ExecAddress([*SHELL, rest])
        else:
            raise OptionInvalid(option=where, value=uri, wanted=f"a migration URI; {_POSSIBLE}")
        check_address(address, where)
        return cls("main", address)

    @classmethod
    def parse(cls, text: str, where: str) -> Channel:
        """Read any of the three forms.

        Raises:
            OptionInvalid: it is none of them, or says something that cannot be.
            Unsupported: QEMU has such a transport, and this VMM has not.
        """
        _check_length(text, where)
        if text.startswith("{"):
            return cls.from_json(_json_of(text, where), where)
        # A key has no colon: what has one before any comma or equals sign is a URI, even if its scheme is unknown.
        if _SCHEME.match(text):
            return cls.from_uri(text, where)
        return cls.from_json(_typed(parse_dotted_keys(text, "channel-type", where)), where)

    def to_json(self) -> dict[str, object]:
        """Return it as QEMU's MigrationChannel; `from_json` undoes it."""
        address = self.address
        addr = address if isinstance(address, ExecAddress | FileAddress) else SocketTransport(address=address)
        json = unstructure(MigrationChannel(channel_type=self.channel_type, addr=addr))
        assert isinstance(json, dict)
        return json


@final
@attrs.frozen
class Channels:
    """Where one migration goes."""

    main: ChannelAddress
    cpr: ChannelAddress | None = None

    def to_json(self) -> list[dict[str, object]]:
        """Return them as QEMU's list of MigrationChannel."""
        channels = [Channel("main", self.main)]
        if self.cpr is not None:
            channels.append(Channel("cpr", self.cpr))
        return [channel.to_json() for channel in channels]


def outgoing_channels(uri: str | None, channels: Sequence[object] | None) -> Channels:
    """Return where `migrate` goes, from its arguments `uri` and `channels` (each as `Channel.from_json` takes it).

    Raises:
        MigrationRefused: both or neither are given, or the list has no main channel or two of one type.
        OptionInvalid, Unsupported: one of them cannot be understood.
    """
    by_type: dict[str, ChannelAddress] = {}
    for channel in _given(uri, channels, "migrate"):
        if channel.channel_type in by_type:
            reason = f"migrate: channels has more than one channel of type {channel.channel_type!r}; give one"
            raise MigrationRefused(reason=reason)
        by_type[channel.channel_type] = channel.address
    if "main" not in by_type:
        raise MigrationRefused(reason="migrate: channels has no channel of type 'main'; add one")
    return Channels(by_type["main"], by_type.get("cpr"))


def incoming_channels(uri: str | None, channels: Sequence[object] | None) -> list[Channel]:
    """Return where `migrate-incoming` listens, from its arguments. Raises as `outgoing_channels` does."""
    return _given(uri, channels, "migrate-incoming")


def _given(uri: str | None, channels: Sequence[object] | None, command: str) -> list[Channel]:
    if uri is not None and channels is None:
        return [Channel.from_uri(uri, f"{command}: uri")]
    if channels is None or uri is not None:
        reason = "neither was given" if uri is None else "both were given"
        raise MigrationRefused(reason=f"{command} needs either 'uri' or 'channels'; {reason}")
    return [Channel.from_json(value, f"{command}: channels[{index}]") for index, value in enumerate(channels)]


def _structured(value: object, where: str) -> MigrationChannel:
    if not isinstance(value, dict):
        raise OptionInvalid(option=where, value=value, wanted="a migration channel: it must be an object")
    try:
        channel = structure(MigrationChannel, value, where)
    except InvalidArguments as error:
        wanted = f"a migration channel: {'; '.join(error.faults)}"
        raise OptionInvalid(option=where, value=value, wanted=wanted) from error
    assert isinstance(channel, MigrationChannel)
    return channel


def _check_length(text: str, where: str) -> None:
    if len(text) > TEXT_LIMIT:
        wanted = f"short enough: it has {len(text)} characters, at most {TEXT_LIMIT} are read"
        raise OptionInvalid(option=where, value=f"{text[:40]}…", wanted=wanted)


def _json_of(text: str, where: str) -> dict[str, object]:
    import json  # most machines are started without a JSON option

    try:
        value: dict[str, object] = json.loads(text)  # an object, since the text begins with a brace
    except (ValueError, RecursionError) as error:
        raise OptionInvalid(option=where, value=text, wanted=f"JSON ({error})") from error
    return value


def _typed(keys: dict[str, object]) -> dict[str, object]:
    """Make booleans and numbers of what dotted keys have for them; leave all else to the check of types."""
    addr = keys.get("addr")
    if not isinstance(addr, dict):
        return keys
    flags = {name: _SWITCH[addr[name]] for name in _FLAGS if addr.get(name) in ("on", "off")}
    numbers = {name: int(addr[name]) for name in _INET_NUMBERS if _NUMBER.fullmatch(str(addr.get(name)))}
    return {**keys, "addr": {**addr, **flags, **numbers}}


def _vsock_of(text: str, where: str) -> VsockAddress:
    cid, colon, port = text.partition(":")
    if not colon:
        raise OptionInvalid(option=where, value=f"vsock:{text}", wanted="of the form vsock:CID:PORT")
    return VsockAddress(cid, port)


def _file_of(text: str, where: str) -> FileAddress:
    """Read `PATH[,offset=SIZE]`. Source: QEMU migration/file.c, file_parse_offset."""
    path, comma, size = text.rpartition(",offset=")
    if not comma:
        return FileAddress(text)
    match = _SIZE.fullmatch(size)
    if match is None:
        raise OptionInvalid(option=f"{where}: offset", value=size, wanted="a size such as 0x1000, 4096, 4K or 1M")
    number = match[1]
    value = int(number, 16) if number[:2] in ("0x", "0X") else int(number)
    return FileAddress(path, value << _SUFFIXES[match[2].lower()])


def _inet_of(text: str, where: str) -> InetAddress:
    """Read `HOST:PORT[,OPTION…]`. Source: QEMU util/qemu-sockets.c, inet_parse."""
    address, *options = text.split(",")
    match = re.fullmatch(r"\[([^\[\]]*)\]:([^:]*)", address) or re.fullmatch(r"([^:\[\]]*):([^:]*)", address)
    if match is None:
        wanted = "of the form tcp:HOST:PORT, an IPv6 address in brackets"
        raise OptionInvalid(option=where, value=f"tcp:{text}", wanted=wanted)
    flags: dict[str, bool] = {}
    numbers: dict[str, int] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if name in _INET_NUMBERS and name not in numbers and _NUMBER.fullmatch(value):
            numbers[name] = int(value)
        elif name in _INET_FLAGS and name not in flags and (not equals or value in _SWITCH):
            flags[name] = value != "off"
        else:
            wanted = (
                f"one of {', '.join(_INET_FLAGS)}, each at most once, alone or with =on or =off, or of "
                f"{', '.join(_INET_NUMBERS)} with a number"
            )
            raise OptionInvalid(option=f"{where}: option of tcp", value=option, wanted=wanted)
    host, port = match.groups()
    return InetAddress(
        host,
        port,
        flags.get("numeric"),
        numbers.get("to"),
        flags.get("ipv4"),
        flags.get("ipv6"),
        flags.get("keep-alive"),
        *(numbers.get(name) for name in _INET_NUMBERS[1:]),
    )
