from __future__ import annotations

import pytest

from vmm.errors import OptionInvalid
from vmm.migration.address import DescriptorAddress, InetAddress, SocketAddress, UnixAddress, check_address


@pytest.mark.parametrize(
    "address",
    [
        UnixAddress(path="p" * 107),
        UnixAddress(path="/run/vm.sock", tight=True),
        UnixAddress(path="\udcff"),
        UnixAddress(path="vm", abstract=True, tight=False),
        InetAddress(host="", port="0"),
        InetAddress(host="::1", port="65535", ipv4=False),
        DescriptorAddress(name="7"),
        DescriptorAddress(name="main-channel"),
    ],
)
def test_a_possible_address_passes(address: SocketAddress) -> None:
    check_address(address, "migrate")


PATH = "is not a socket's path: 1 to 107 bytes, none of them NUL"
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
        (DescriptorAddress(name=""), f"fd: '' {NAME}"),
        (DescriptorAddress(name="7up"), f"fd: '7up' {NAME}"),
        (DescriptorAddress(name="9" * 10), f"fd: '9999999999' {NAME}"),
    ],
)
def test_an_impossible_address_is_refused(address: SocketAddress, text: str) -> None:
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
