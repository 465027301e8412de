"""TCP sockets of the host: real ones."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest
import trio

from vmm import host_fds, host_sockets, host_tcp, hostio
from vmm.errors import DescriptorWrongKind, HostFileRefused
from vmm.host_tcp import TcpPlace

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("no_leaks")


def option(sock: socket.socket, level: int, name: int) -> bool:
    return bool(sock.getsockopt(level, name))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", ""])
async def test_a_listener_has_a_port_of_its_own_and_is_connected_to(host: str) -> None:
    with await TcpPlace(host=host, port=0).listen() as listener:
        assert not listener.get_inheritable()
        assert not listener.getblocking()
        assert host_fds.descriptor_kind(listener.fileno()) == host_tcp.LISTENS
        assert host_tcp.on_loopback(listener) is (host != "")
        port = listener.getsockname()[1]
        with await TcpPlace(host=host, port=port).connect(10) as client:
            assert not client.get_inheritable()
            assert not client.getblocking()
            assert host_fds.descriptor_kind(client.fileno()) == host_tcp.CONNECTED
            assert client.getpeername()[1] == port
        with pytest.raises(HostFileRefused) as caught:
            await TcpPlace(host=host, port=port).listen()
        assert str(caught.value) == f"Cannot listen on {host or 'every address'} port {port}: Address already in use"


async def test_every_address_is_of_both_families_unless_one_is_ruled_out() -> None:
    for wanted, reached in ((None, {"127.0.0.1", "::1"}), (False, {"::1"}), (True, {"127.0.0.1"})):
        with await TcpPlace(host="", port=0, ipv4=wanted).listen() as listener:
            port = listener.getsockname()[1]
            for host in host_tcp.LOOPBACK:
                place = TcpPlace(host=host, port=port)
                if host in reached:
                    (await place.connect(10)).close()
                else:
                    with pytest.raises(HostFileRefused, match=f"^Cannot connect to {host} port {port}: Connection re"):
                        await place.connect(10)


async def test_the_first_free_port_of_a_range_is_taken() -> None:
    with await TcpPlace(host="127.0.0.1", port=0).listen() as first:
        port = first.getsockname()[1]
        with pytest.raises(HostFileRefused, match=f"^Cannot listen on 127.0.0.1 port {port}: Address already in use$"):
            await TcpPlace(host="127.0.0.1", port=port, last_port=port).listen()
        with await TcpPlace(host="127.0.0.1", port=port, last_port=port + 50).listen() as second:
            assert port < second.getsockname()[1] <= port + 50


async def test_clients_have_the_options_of_their_listener() -> None:
    wanted = [(socket.IPPROTO_TCP, socket.TCP_NODELAY), (socket.SOL_SOCKET, socket.SO_KEEPALIVE)]
    for on in (False, True):
        with (
            await TcpPlace(host="127.0.0.1", port=0, no_delay=on, keep_alive=on).listen() as listener,
            await TcpPlace(host="127.0.0.1", port=listener.getsockname()[1], no_delay=on, keep_alive=on).connect(
                10
            ) as client,
        ):
            fd = host_sockets.accept(listener, "here")
            assert fd is not None
            with socket.socket(fileno=fd) as accepted:
                assert [option(sock, *name) for sock in (client, accepted) for name in wanted] == [on] * 4
                assert host_tcp.local_name(accepted) == host_tcp.peer_name(client)


async def test_names_are_written_so_that_they_can_be_used() -> None:
    for host, written in (("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")):
        with await TcpPlace(host=host, port=0).listen() as listener:
            assert host_tcp.local_name(listener) == f"{written}:{listener.getsockname()[1]}"
            assert host_tcp.peer_name(listener) == "?"


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (TcpPlace(host="127.0.0.1", port=1, ipv6=True), "it has no IPv6 address"),
        (TcpPlace(host="::1", port=1, ipv4=True), "it has no IPv4 address"),
        (TcpPlace(host="localhost", port=1, numeric=True), "Name or service not known"),
        (TcpPlace(host="a" * 64, port=1), "it has no host's name"),
    ],
    ids=lambda value: value.host[:10] if isinstance(value, TcpPlace) else None,
)
async def test_a_name_that_leads_nowhere_is_refused(place: TcpPlace, reason: str) -> None:
    for attempt, action in ((place.listen, "listen on"), (lambda: place.connect(10), "connect to")):
        with pytest.raises(HostFileRefused) as caught:
            await attempt()
        assert str(caught.value).startswith(f"Cannot {action} {place.host} port 1: {reason}")


async def test_a_peer_that_does_not_answer_is_waited_for_no_longer_than_said() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        # A full backlog drops what comes: the connection is neither made nor refused.
        waiting = [socket.socket(type=socket.SOCK_STREAM | socket.SOCK_NONBLOCK) for _ in range(4)]
        for sock in waiting:
            sock.connect_ex(full.getsockname())
        port = full.getsockname()[1]
        with pytest.raises(HostFileRefused) as caught:
            await TcpPlace(host="127.0.0.1", port=port).connect(0.05)
        assert str(caught.value) == f"Cannot connect to 127.0.0.1 port {port}: nobody answers within 0.05 s"
        with trio.CancelScope() as scope:
            scope.cancel()
            await TcpPlace(host="127.0.0.1", port=port).connect(10)
        assert scope.cancelled_caught
        for sock in waiting:
            sock.close()


# --- listeners of this machine alone ------------------------------------------------------------------------


@pytest.mark.parametrize("host", host_tcp.LOOPBACK)
def test_a_loopback_listener_has_a_port_of_its_own_and_goes_to_another_process(host: str) -> None:
    with host_tcp.listen_loopback(host, 0) as listener:
        port = listener.getsockname()[1]
        assert not listener.get_inheritable()
        assert not listener.getblocking()
        with pytest.raises(HostFileRefused) as caught:
            host_tcp.listen_loopback(host, port)
        assert str(caught.value) == f"Cannot listen on {host} port {port}: Address already in use"
        copy = hostio.dup(listener.fileno())
        with host_tcp.adopt_loopback_listener(copy, "listener", host, port) as adopted:
            assert adopted.getsockname()[:2] == (host, port)
            with host_tcp.adopt_loopback_listener(hostio.dup(copy), "listener", host, 0) as again:
                assert again.getsockname()[1] == port


def test_what_does_not_listen_on_the_very_port_is_no_loopback_listener(tmp_path: Path) -> None:
    with (
        host_tcp.listen_loopback("127.0.0.1", 0) as listener,
        host_sockets.listen_unix(str(tmp_path / "s")) as unix,
        socket.socket() as unbound,
        open("/dev/null") as null,
    ):
        port = listener.getsockname()[1]
        for fd, found in {
            listener.fileno(): f"a socket that listens on 127.0.0.1 port {port}",
            unix.fileno(): "a listening unix socket",
            unbound.fileno(): "a connected tcp socket",
            null.fileno(): "a character device",
        }.items():
            with pytest.raises(DescriptorWrongKind) as caught:
                host_tcp.adopt_loopback_listener(fd, "monitor/ws/listener", "127.0.0.1", 1)
            wanted = "a socket that listens on 127.0.0.1 port 1"
            assert str(caught.value) == f"Descriptor 'monitor/ws/listener' is {found}, not {wanted}"
            os.fstat(fd)
