from __future__ import annotations

import pytest

from vmm.errors import OptionInvalid
from vmm.migration.address import (
    ChannelAddress,
    DescriptorAddress,
    ExecAddress,
    InetAddress,
    UnixAddress,
    VsockAddress,
    check_address,
)


@pytest.mark.parametrize(
    "address",
    [
        UnixAddress(path="p" * 107),
        UnixAddress(path="/run/vm.sock", tight=True),
        UnixAddress(path="\udcff"),
        UnixAddress(path="vm", abstract=True, tight=False),
        InetAddress(host="", port="0"),
        InetAddress(host="::1", port="65535", ipv4=False),
        InetAddress(host="h", port="9", to=9, keep_alive=True, keep_alive_count=127),
        VsockAddress(cid="4294967295", port="0"),
        ExecAddress(args=["cat"]),
        ExecAddress(args=["sh", "\udcff", ""]),
        DescriptorAddress(name="7"),
        DescriptorAddress(name="main-channel"),
    ],
)
def test_a_possible_address_passes(address: ChannelAddress) -> None:
    check_address(address, "migrate")


PATH = "is not a socket's path: 1 to 107 bytes, none of them NUL"
WORD = "is not a word of a command: fewer than 131072 bytes, none of them NUL"
NAME = "is not a descriptor's number, or a name given with getfd, which does not begin with a digit"


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (UnixAddress(path=""), f"path: '' {PATH}"),
        (UnixAddress(path="a\0b"), f"path: 'a\\x00b' {PATH}"),
        (UnixAddress(path="é" * 54), f"path: {'é' * 54!r} {PATH}"),
        (UnixAddress(path="\ud800"), f"path: '\\ud800' {PATH}"),
        (UnixAddress(path="x", tight=False), "tight: False is not possible without abstract on"),
        (InetAddress(host="h", port="65536"), "port: '65536' is not a number from 0 to 65535"),
        (InetAddress(host="h", port="http"), "port: 'http' is not a number from 0 to 65535"),
        (InetAddress(host="h", port=""), "port: '' is not a number from 0 to 65535"),
        (InetAddress(host="h", port="٣"), "port: '٣' is not a number from 0 to 65535"),
        (
            InetAddress(host="a\0", port="1"),
            "host: 'a\\x00' is not a host's name or address, of at most 255 characters",
        ),
        (
            InetAddress(host="h", port="1", ipv4=False, ipv6=False),
            "ipv6: False is not possible with ipv4 off too; leave one on",
        ),
        (InetAddress(host="h", port="9", to=8), "to: 8 is not a port from 9 to 65535"),
        (InetAddress(host="h", port="9", to=65536), "to: 65536 is not a port from 9 to 65535"),
        (
            InetAddress(host="h", port="9", keep_alive_idle=1),
            "keep-alive-idle: 1 is not possible without keep-alive on",
        ),
        (
            InetAddress(host="h", port="9", keep_alive=True, keep_alive_count=128),
            "keep-alive-count: 128 is not a number from 0 to 127",
        ),
        (
            InetAddress(host="h", port="9", keep_alive=True, keep_alive_interval=32768),
            "keep-alive-interval: 32768 is not a number from 0 to 32767",
        ),
        (VsockAddress(cid="any", port="1"), "cid: 'any' is not a number from 0 to 4294967295"),
        (VsockAddress(cid="1", port="4294967296"), "port: '4294967296' is not a number from 0 to 4294967295"),
        (ExecAddress(args=[]), "args: [] is not a program and its arguments, 1 to 1024 words"),
        (ExecAddress(args=["", "x"]), "args: ['', 'x'] is not a program and its arguments, 1 to 1024 words"),
        (ExecAddress(args=["a", "b\0"]), f"args: 'b\\x00' {WORD}"),
        (ExecAddress(args=["a", "\ud800"]), f"args: '\\ud800' {WORD}"),
        (DescriptorAddress(name=""), f"fd: '' {NAME}"),
        (DescriptorAddress(name="7up"), f"fd: '7up' {NAME}"),
        (DescriptorAddress(name="9" * 10), f"fd: '9999999999' {NAME}"),
    ],
)
def test_an_impossible_address_is_refused(address: ChannelAddress, text: str) -> None:
    with pytest.raises(OptionInvalid) as caught:
        check_address(address, "migrate: uri")
    assert str(caught.value) == f"migrate: uri: {text}"


def test_a_unix_address_is_a_path_or_an_abstract_name() -> None:
    assert UnixAddress(path="/run/vm.sock").socket_name() == "/run/vm.sock"
    assert UnixAddress(path="vm", abstract=True).socket_name() == b"\0vm"
    assert UnixAddress(path="vm", abstract=True, tight=False).socket_name() == b"\0vm" + bytes(105)


def test_a_descriptor_is_a_number_or_a_name() -> None:
    assert DescriptorAddress(name="12").number == 12
    assert DescriptorAddress(name="main").number is None


def test_a_command_is_called_as_it_was_given() -> None:
    assert ExecAddress(args=["/bin/sh", "-c", "gzip > 'a b'"]).command == "gzip > 'a b'"
    assert ExecAddress(args=["gzip", "a b"]).command == "gzip 'a b'"
