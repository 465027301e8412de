"""Addresses that the host does not have, and what sockets of channels are like."""

from __future__ import annotations

import os
import resource
import socket
from contextlib import closing
from typing import TYPE_CHECKING, Any, Final

import attrs
import pytest
import trio
import trio.testing

from vmm import hostio
from vmm.errors import HostFileRefused
from vmm.migration.address import DescriptorAddress, InetAddress, UnixAddress
from vmm.migration.connect import connect, listen

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.mark.parametrize("host", ["a" * 64, "a..b", "☃"])
async def test_what_is_no_hosts_name_is_refused_as_an_address(host: str) -> None:
    with pytest.raises(HostFileRefused) as caught:
        await connect(InetAddress(host, "1"), within=10)
    assert str(caught.value).startswith(f"Cannot connect to {host} port 1: it has no host's name (")
    with pytest.raises(HostFileRefused) as caught:
        await listen(InetAddress(host, "0"))
    assert str(caught.value).startswith(f"Cannot listen on {host} port 0: it has no host's name (")


async def test_whoever_connects_while_no_descriptor_is_left_is_served_later(tmp_path: Path) -> None:
    address = UnixAddress(str(tmp_path / "here"))
    with closing(await listen(address)) as listener, await connect(address, within=10):
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        come: list[trio.socket.SocketType] = []

        async def accept() -> None:
            come.append(await listener.accept())

        async with trio.open_nursery() as nursery:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
            try:
                nursery.start_soon(accept)
                await trio.testing.wait_all_tasks_blocked()
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        come[0].close()


def test_an_offset_that_no_file_can_have_is_refused_and_nothing_stays_open(tmp_path: Path) -> None:
    path = str(tmp_path / "state")
    (tmp_path / "state").write_bytes(b"x")
    # What is too much depends on the file system; this is nowhere possible.
    with pytest.raises(HostFileRefused) as caught:
        hostio.open_saved_state(path, -1)
    assert str(caught.value) == f"Cannot read {path}: no file there can have -1 bytes"
    with pytest.raises(HostFileRefused) as caught:
        hostio.open_state_file(path, -1)
    assert str(caught.value) == f"Cannot write {path}: no file there can have -1 bytes"
    assert (tmp_path / "state").read_bytes() == b"x"
    with pytest.raises(HostFileRefused):
        hostio.open_state_file(f"{path}2", -1)
    assert os.listdir(tmp_path) == ["state"]


# --- how long a peer may be silent ------------------------------------------------------------------------------------


def patience(sock: socket.socket | trio.socket.SocketType) -> tuple[int, ...]:
    """Return the limit for an acknowledgement; whether, when, how far apart and how often a peer is asked."""
    return (
        sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
        sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
        sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
        sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
    )


USUAL: Final = (30_000, 1, 10, 5, 4)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, USUAL),
        ({"keep_alive": False}, (30_000, 0, *USUAL[2:])),
        ({"keep_alive_idle": 3}, (30_000, 1, 3, 5, 4)),
    ],
)
async def test_a_tcp_channel_has_bounds_at_both_ends(settings: dict[str, Any], expected: tuple[int, ...]) -> None:
    listener = await listen(InetAddress("127.0.0.1", "0", **settings))
    assert isinstance(listener.address, InetAddress)
    one = await connect(attrs.evolve(listener.address, **settings), within=10)
    other = await listener.accept()
    bounds = [patience(sock) for sock in (one, other)]
    if not settings.get("keep_alive", True):
        bounds = [(*bound[:2], *USUAL[2:]) for bound in bounds]  # nobody is asked, and the rest is the host's
    assert bounds == [expected, expected]
    for end in (one, other, listener):
        end.close()


async def test_a_socket_that_came_as_a_descriptor_has_them_unless_its_owner_has_set_others() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as given:
            taken = await connect(DescriptorAddress(str(given.fileno())), within=10)
            assert patience(taken) == USUAL
            taken.close()
        with socket.create_connection(server.getsockname()) as given:
            given.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            given.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 77)
            before = patience(given)
            taken = await connect(DescriptorAddress(str(given.fileno())), within=10)
            assert patience(taken) == before
            taken.close()
        listener = await listen(DescriptorAddress(str(server.fileno())))
        with socket.create_connection(server.getsockname()):
            accepted = await listener.accept()
            assert patience(accepted) == USUAL
            accepted.close()
        listener.close()
