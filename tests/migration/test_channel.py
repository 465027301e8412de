from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.errors import MigrationRefused, OptionInvalid, Unsupported, VmmError
from vmm.migration.address import (
    DescriptorAddress,
    ExecAddress,
    FileAddress,
    InetAddress,
    SocketAddress,
    UnixAddress,
    VsockAddress,
)
from vmm.migration.channel import (
    Channel,
    Channels,
    MigrationChannel,
    incoming_channels,
    outgoing_channels,
)
from vmm.monitor.arguments import structure


def main(address: SocketAddress) -> Channel:
    return Channel("main", address)


def cpr(address: SocketAddress) -> Channel:
    return Channel("cpr", address)


def as_json(channels: list[Channel] | None) -> list[dict[str, object]] | None:
    return None if channels is None else [channel.to_json() for channel in channels]


UNIX = UnixAddress(path="/run/vm/main.sock")


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("unix:/run/vm/main.sock", UNIX),
        ("unix:a,b:c", UnixAddress(path="a,b:c")),
        ("tcp:192.0.2.1:4444", InetAddress(host="192.0.2.1", port="4444")),
        ("tcp::0", InetAddress(host="", port="0")),
        ("tcp:[2001:db8::1]:4444", InetAddress(host="2001:db8::1", port="4444")),
        ("tcp:vm:1,ipv4,ipv6=off,numeric=on", InetAddress(host="vm", port="1", ipv4=True, ipv6=False, numeric=True)),
        (
            "tcp:vm:1,to=9,keep-alive,keep-alive-count=3,keep-alive-idle=4,keep-alive-interval=5",
            InetAddress(
                host="vm",
                port="1",
                to=9,
                keep_alive=True,
                keep_alive_count=3,
                keep_alive_idle=4,
                keep_alive_interval=5,
            ),
        ),
        ("vsock:3:1", VsockAddress(cid="3", port="1")),
        ("fd:main", DescriptorAddress(name="main")),
        ("fd:7", DescriptorAddress(name="7")),
    ],
)
def test_a_uri_is_a_main_channel(uri: str, address: SocketAddress) -> None:
    channel = Channel.from_uri(uri, "migrate: uri")
    assert channel == main(address)
    assert Channel.from_json(channel.to_json(), "migrate") == channel
    assert Channel.parse(uri, "-incoming") == main(address)


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("exec:cat > 'a, b'", ExecAddress(args=["/bin/sh", "-c", "cat > 'a, b'"])),
        ("file:/x,offset=4K", FileAddress("/x", 4096)),
    ],
)
def test_a_uri_may_be_a_file_or_a_command(uri: str, address: ExecAddress | FileAddress) -> None:
    channel = Channel.from_uri(uri, "migrate: uri")
    assert channel == Channel("main", address)
    assert Channel.from_json(channel.to_json(), "migrate") == channel


@pytest.mark.parametrize("uri", ["rdma:host:1"])
def test_other_transports_of_qemu_are_refused_by_name(uri: str) -> None:
    with pytest.raises(Unsupported) as caught:
        Channel.from_uri(uri, "migrate: uri")
    assert str(caught.value) == (
        f"Migration transport {uri.split(':')[0]!r} is not supported here; "
        "use tcp:HOST:PORT, unix:PATH, vsock:CID:PORT, fd:NAME, file:PATH or exec:COMMAND"
    )


URI = "is not a migration URI; use tcp:HOST:PORT, unix:PATH, vsock:CID:PORT, fd:NAME, file:PATH or exec:COMMAND"
WORD = "is not a word of a command: fewer than 131072 bytes, none of them NUL"
TCP = "is not of the form tcp:HOST:PORT, an IPv6 address in brackets"
FLAG = (
    "is not one of numeric, ipv4, ipv6, keep-alive, each at most once, alone or with =on or =off, or of "
    "to, keep-alive-count, keep-alive-idle, keep-alive-interval with a number"
)
PATH = "is not a socket's path: 1 to 107 bytes, none of them NUL"


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("", f"migrate: uri: '' {URI}"),
        ("unix", f"migrate: uri: 'unix' {URI}"),
        ("udp:h:1", f"migrate: uri: 'udp:h:1' {URI}"),
        ("UNIX:/x", f"migrate: uri: 'UNIX:/x' {URI}"),
        ("defer", f"migrate: uri: 'defer' {URI}"),
        ("unix:", f"migrate: uri: path: '' {PATH}"),
        ("tcp:", f"migrate: uri: 'tcp:' {TCP}"),
        ("tcp:host", f"migrate: uri: 'tcp:host' {TCP}"),
        ("tcp:::1:44", f"migrate: uri: 'tcp:::1:44' {TCP}"),
        ("tcp:[::1]", f"migrate: uri: 'tcp:[::1]' {TCP}"),
        ("tcp:h:x", "migrate: uri: port: 'x' is not a number from 0 to 65535"),
        ("tcp:h:1,to=x", f"migrate: uri: option of tcp: 'to=x' {FLAG}"),
        ("tcp:h:1,to=1,to=2", f"migrate: uri: option of tcp: 'to=2' {FLAG}"),
        ("tcp:h:5,to=4", "migrate: uri: to: 4 is not a port from 5 to 65535"),
        ("vsock:3", "migrate: uri: 'vsock:3' is not of the form vsock:CID:PORT"),
        ("vsock::1", "migrate: uri: cid: '' is not a number from 0 to 4294967295"),
        ("exec:a\0", f"migrate: uri: args: 'a\\x00' {WORD}"),
        ("tcp:h:1,ipv4=yes", f"migrate: uri: option of tcp: 'ipv4=yes' {FLAG}"),
        ("tcp:h:1,ipv4,ipv4", f"migrate: uri: option of tcp: 'ipv4' {FLAG}"),
        ("tcp:h:1,", f"migrate: uri: option of tcp: '' {FLAG}"),
        (
            "unix:" + "x" * 5000,
            f"migrate: uri: 'unix:{'x' * 35}…' is not short enough: it has 5005 characters, at most 4096 are read",
        ),
    ],
)
def test_a_malformed_uri_is_refused(uri: str, text: str) -> None:
    with pytest.raises(OptionInvalid) as caught:
        Channel.from_uri(uri, "migrate: uri")
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("text", "channel"),
    [
        ("main,addr.transport=socket,addr.type=unix,addr.path=/run/vm/main.sock", main(UNIX)),
        ("channel-type=cpr,addr.transport=socket,addr.type=fd,addr.str=5", cpr(DescriptorAddress(name="5"))),
        (
            "cpr,addr.transport=socket,addr.type=unix,addr.path=a,,b,addr.abstract=on,addr.tight=off",
            cpr(UnixAddress(path="a,b", abstract=True, tight=False)),
        ),
        (
            "main,addr.transport=socket,addr.type=inet,addr.host=h,addr.port=0,addr.ipv4=off,addr.to=9",
            main(InetAddress(host="h", port="0", ipv4=False, to=9)),
        ),
        (
            '{"channel-type": "cpr", "addr": {"transport": "socket", "type": "unix", "path": "/run/vm/main.sock"}}',
            cpr(UNIX),
        ),
    ],
)
def test_dotted_keys_and_json_say_the_same(text: str, channel: Channel) -> None:
    assert Channel.parse(text, "-incoming") == channel
    assert Channel.parse(json.dumps(channel.to_json()), "-incoming") == channel


MAIN = {"channel-type": "main"}
SOCKET = {"transport": "socket", "type": "fd", "str": "5"}


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ({}, "'channel-type' is missing; 'addr' is missing"),
        ({"channel-type": "main"}, "'addr' is missing"),
        ({"channel-type": "main", "addr": "x"}, "'addr' must be an object, not \"x\""),
        (
            {"channel-type": "side", "addr": SOCKET},
            "'channel-type' does not accept \"side\"; it accepts 'main', 'cpr'",
        ),
        (
            {"channel-type": "main", "addr": {"transport": "rdma", "host": "h", "port": "1"}},
            "'addr.transport' does not accept \"rdma\"; it accepts 'socket', 'exec', 'file'",
        ),
        (
            {"channel-type": "main", "addr": {"transport": "socket", "type": "udp"}},
            "'addr.type' does not accept \"udp\"; it accepts 'unix', 'inet', 'vsock', 'fd'",
        ),
        (
            {"channel-type": "main", "addr": SOCKET | {"path": "x"}},
            "'addr.path' is unexpected; there are 'transport', 'type', 'str'",
        ),
        ({"channel-type": "main", "addr": SOCKET | {"str": 5}}, "'addr.str' must be a string, not 5"),
        ([], "it must be an object"),
    ],
)
def test_json_that_is_no_channel_is_refused(value: object, fault: str) -> None:
    with pytest.raises(OptionInvalid) as caught:
        Channel.from_json(value, "migrate: channels[1]")
    assert str(caught.value) == f"migrate: channels[1]: {value!r} is not a migration channel: {fault}"


def test_a_channel_is_read_from_structured_arguments_too() -> None:
    wire = {"channel-type": "main", "addr": {"transport": "socket", "type": "unix", "path": "/run/vm/main.sock"}}
    structured = structure(MigrationChannel, wire, "migrate")
    assert Channel.from_json(structured, "migrate") == Channel.from_json(wire, "migrate") == main(UNIX)
    assert outgoing_channels(None, [structured]) == Channels(UNIX)
    assert main(DescriptorAddress("5")).to_json() == {"channel-type": "main", "addr": SOCKET}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "'' is not of the form key=value"),
        ("main", "{'channel-type': 'main'} is not a migration channel: 'addr' is missing"),
        ("main,addr=", f"{ {**MAIN, 'addr': ''} } is not a migration channel: 'addr' must be an object, not \"\""),
        ("main,addr.transport=socket,addr.type=unix,addr.path=", f"path: '' {PATH}"),
        ("foo:bar", f"'foo:bar' {URI}"),
        ("{}", "{} is not a migration channel: 'channel-type' is missing; 'addr' is missing"),
        ("{", "'{' is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
    ],
)
def test_a_malformed_channel_is_refused(text: str, fault: str) -> None:
    with pytest.raises(OptionInvalid) as caught:
        Channel.parse(text, "-incoming")
    assert str(caught.value) == f"-incoming: {fault}"


def test_deep_json_is_refused() -> None:
    with pytest.raises(OptionInvalid):
        Channel.parse('{"a":' + "[" * 4000, "-incoming")


def test_migrate_goes_to_one_main_and_at_most_one_cpr_channel() -> None:
    other = DescriptorAddress(name="cpr")
    assert outgoing_channels("unix:/run/vm/main.sock", None) == Channels(UNIX)
    assert outgoing_channels(None, as_json([main(UNIX)])) == Channels(UNIX)
    assert outgoing_channels(None, as_json([cpr(other), main(UNIX)])) == Channels(UNIX, other)


@pytest.mark.parametrize(
    ("uri", "channels", "reason"),
    [
        (None, None, "migrate needs either 'uri' or 'channels'; neither was given"),
        ("fd:a", [main(UNIX)], "migrate needs either 'uri' or 'channels'; both were given"),
        (None, [], "migrate: channels has no channel of type 'main'; add one"),
        (None, [cpr(UNIX)], "migrate: channels has no channel of type 'main'; add one"),
        (None, [main(UNIX), main(UNIX)], "migrate: channels has more than one channel of type 'main'; give one"),
        (
            None,
            [main(UNIX), cpr(UNIX), cpr(UNIX)],
            "migrate: channels has more than one channel of type 'cpr'; give one",
        ),
    ],
)
def test_other_channels_of_migrate_are_refused(uri: str | None, channels: list[Channel] | None, reason: str) -> None:
    with pytest.raises(MigrationRefused) as caught:
        outgoing_channels(uri, as_json(channels))
    assert str(caught.value) == reason


def test_migrate_incoming_takes_a_uri_or_a_list() -> None:
    assert incoming_channels("unix:/run/vm/main.sock", None) == [main(UNIX)]
    assert incoming_channels(None, as_json([main(UNIX), cpr(UNIX)])) == [main(UNIX), cpr(UNIX)]


@pytest.mark.parametrize(
    ("text", "filename", "offset"),
    [
        ("file:/tmp/state", "/tmp/state", 0),
        ("file:/tmp/state,offset=0x1000", "/tmp/state", 0x1000),
        ("file:/tmp/state,offset=010", "/tmp/state", 10),
        ("file:a,b,offset=2M", "a,b", 2 << 20),
        ("file:a,offset=1,offset=2", "a,offset=1", 2),
    ],
)
def test_a_file_is_a_path_and_an_offset(text: str, filename: str, offset: int) -> None:
    channel = Channel.from_uri(text, "migrate: uri")
    assert channel.address == FileAddress(filename, offset)
    assert Channel.from_json(channel.to_json(), "migrate: channels[0]") == channel


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("file:", "migrate: uri: filename: '' is not a path, which has no NUL"),
        ("file:a,offset=-1", "migrate: uri: offset: '-1' is not a size such as 0x1000, 4096, 4K or 1M"),
        ("file:a,offset=", "migrate: uri: offset: '' is not a size such as 0x1000, 4096, 4K or 1M"),
        (
            "file:a,offset=0x4000000000000000",
            "migrate: uri: offset: 4611686018427387904 is not a number of bytes below 2^62",
        ),
    ],
)
def test_a_file_that_cannot_be_is_refused(text: str, reason: str) -> None:
    with pytest.raises(OptionInvalid) as caught:
        Channel.from_uri(text, "migrate: uri")
    assert str(caught.value) == reason


def test_the_addresses_of_a_list_are_checked_by_position() -> None:
    with pytest.raises(OptionInvalid) as caught:
        outgoing_channels(None, as_json([main(UNIX), cpr(UnixAddress(""))]))
    assert str(caught.value) == f"migrate: channels[1]: path: '' {PATH}"


@settings(deadline=None, derandomize=True, database=None)
@given(st.text(alphabet='tcpunixfdmae:,=.[]{}"/0159-', max_size=40))
def test_any_text_is_understood_or_refused(text: str) -> None:
    try:
        channel = Channel.parse(text, "-incoming")
    except VmmError:
        return
    assert Channel.parse(json.dumps(channel.to_json()), "-incoming") == channel
