"""A berth: two sockets without a file, found by their names, and handed on."""

from __future__ import annotations

import os
import socket

import pytest

from vmm.cpr.berth import Berth
from vmm.migration.address import DescriptorAddress, UnixAddress
from vmm.migration.channel import Channel

pytestmark = pytest.mark.usefixtures("no_leaks")


def connect(address: object) -> None:
    assert isinstance(address, UnixAddress)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(address.socket_name())


def test_a_berth_is_found_by_its_names_until_it_is_closed() -> None:
    berth = Berth.bind()
    connect(berth.channels.main)
    connect(berth.channels.cpr)
    berth.close()
    berth.close()
    for address in (berth.channels.main, berth.channels.cpr):
        with pytest.raises(ConnectionRefusedError):
            connect(address)


def test_two_berths_have_names_of_their_own() -> None:
    one, other = Berth.bind(), Berth.bind()
    assert one.channels != other.channels
    one.close()
    other.close()


def test_whoever_occupies_a_berth_has_its_sockets() -> None:
    berth = Berth.bind()
    numbers = berth.filenos()
    assert not any(os.get_inheritable(number) for number in numbers)
    channels = [Channel.from_json(value, "a test") for value in berth.occupy()]
    assert [channel.channel_type for channel in channels] == ["main", "cpr"]
    assert [channel.address for channel in channels] == [DescriptorAddress(str(number)) for number in numbers]
    berth.close()
    connect(berth.channels.main)
    for number in numbers:
        os.close(number)
