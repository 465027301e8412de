"""A chardev on a TCP socket: what differs from a unix one."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from tests.backends.chardev_kit import (
    Complaints,
    Frontend,
    Host,
    connect_tcp,
    port_of,
    read_all,
    read_exactly,
    served,
    socket_at,
    tcp_at,
)
from vmm.backends.chardev_open import make_chardev, open_chardev
from vmm.backends.chardev_options import (
    ChardevSocket,
    ChardevSocketWrapper,
    FdSocketAddress,
    FdSocketAddressWrapper,
)
from vmm.errors import DescriptorWrongKind, HostFileRefused, OptionInvalid

if TYPE_CHECKING:
    from vmm.backends.chardev import Chardev
    from vmm.backends.chardev_options import ChardevBackend


async def made(complain: Complaints, backend: ChardevBackend | None = None) -> Chardev:
    return await make_chardev("serial0", backend or tcp_at(), Host(), complain)


async def test_a_client_reads_output_and_writes_input(complain: Complaints, frontend: Frontend) -> None:
    async with served(await made(complain)) as chardev:
        chardev.attach(frontend)
        here = f"tcp:127.0.0.1:{port_of(chardev)},server=on"
        assert chardev.filename == f"disconnected:{here}"
        async with await connect_tcp(chardev) as client:
            await client.send_all(b"root\n")
            assert await frontend.wait_received(5) == b"root\n"
            assert chardev.filename == f"{here} <-> 127.0.0.1:{client.socket.getsockname()[1]}"
            chardev.put(b"login: ")
            assert await read_exactly(client, 7) == b"login: "
    assert complain.texts == []


@pytest.mark.parametrize(("host", "written"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
async def test_a_client_chardev_talks_to_a_server(
    complain: Complaints, frontend: Frontend, host: str, written: str
) -> None:
    family = socket.AF_INET6 if host == "::1" else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        port = listener.getsockname()[1]
        async with served(await made(complain, tcp_at(host, port, server=False, nodelay=True))) as chardev:
            chardev.attach(frontend)
            accepted = listener.accept()[0]
            server = trio.SocketStream(trio.socket.from_stdlib_socket(accepted))
            own = server.socket.getpeername()[1]
            assert chardev.filename == f"tcp:{written}:{own} <-> {written}:{port}"
            with socket.socket(fileno=chardev.descriptors()["client-1"]) as sock:
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                sock.detach()
            chardev.put(b"ping")
            assert await read_exactly(server, 4) == b"ping"
            await server.send_all(b"pong")
            assert await frontend.wait_received(4) == b"pong"
            await server.aclose()
            chardev.put(b"x")
            while chardev.filename != f"disconnected:tcp:{written}:{port}":
                await trio.testing.wait_all_tasks_blocked()
                chardev.put(b"x")
            assert chardev.put(bytes(1 << 20)) == 1 << 20, "it is not connected again, and output is dropped"


async def test_who_has_said_all_reads_on_until_the_next_one_comes(complain: Complaints, frontend: Frontend) -> None:
    async with served(await made(complain)) as chardev:
        chardev.attach(frontend)
        async with await connect_tcp(chardev) as first:
            await first.send_all(b"uname\n")
            await first.send_eof()
            await frontend.wait_received(6)
            await trio.testing.wait_all_tasks_blocked()
            chardev.put(b"Linux\n")
            assert await read_exactly(first, 6) == b"Linux\n"
            async with await connect_tcp(chardev) as second:
                assert await read_all(first) == b"", "it may have left: nothing tells"
                await second.send_all(b"hello")
                await frontend.wait_received(11)
                chardev.put(b"for the second")
                assert await read_exactly(second, 14) == b"for the second"


async def test_a_client_that_was_reset_is_one_that_left(complain: Complaints, frontend: Frontend) -> None:
    frontend.space = 0
    async with served(await made(complain)) as chardev:
        chardev.attach(frontend)
        first = await connect_tcp(chardev)
        await first.send_all(b"last words, ")
        await trio.testing.wait_all_tasks_blocked()
        first.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        first.socket.close()
        async with await connect_tcp(chardev) as second:
            await second.send_all(b"first words")
            await trio.testing.wait_all_tasks_blocked()
            frontend.space = 100
            chardev.accept_input()
            assert await frontend.wait_received(23) == b"last words, first words"


async def test_nobody_to_connect_to_is_refused_by_name(complain: Complaints) -> None:
    with socket.socket() as bound:  # and does not listen
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        with pytest.raises(HostFileRefused) as caught:
            await made(complain, tcp_at("127.0.0.1", port, server=False))
        assert str(caught.value) == f"Cannot connect to 127.0.0.1 port {port}: Connection refused"


async def test_a_port_in_use_is_refused_and_the_next_of_a_range_is_taken(complain: Complaints) -> None:
    async with served(await made(complain)) as chardev:
        port = port_of(chardev)
        with pytest.raises(HostFileRefused) as caught:
            await made(complain, tcp_at(port=port))
        assert str(caught.value) == f"Cannot listen on 127.0.0.1 port {port}: Address already in use"
        async with served(await made(complain, tcp_at(port=port, to=min(port + 100, 65535)))) as second:
            assert port < port_of(second)


@pytest.mark.parametrize(
    ("options", "server", "text"),
    [
        ({"port": "http"}, True, "port: 'http' is not a number from 0 to 65535"),
        ({"port": "65536"}, True, "port: '65536' is not a number from 0 to 65535"),
        ({"port": "-1"}, True, "port: '-1' is not a number from 0 to 65535"),
        ({"port": "\u0661"}, True, "port: '\u0661' is not a number from 0 to 65535"),
        ({"port": "0"}, False, "port: '0' is not a number from 1 to 65535"),
        ({"port": "5", "to": 4}, True, "to: 4 is not a port from 5 up"),
        ({"port": "5", "to": 6}, False, "to: 6 is not possible without server on: there is one port to connect to"),
        ({"host": "a\0b"}, True, "host: 'a\\x00b' is not a host's name or address, of at most 255 characters"),
        ({"host": "a" * 256}, True, f"host: '{'a' * 256}' is not a host's name or address, of at most 255 characters"),
        ({"ipv4": False, "ipv6": False}, True, "ipv6: False is not possible with ipv4 off too; leave one on"),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_an_address_that_cannot_be_is_refused(
    complain: Complaints, options: dict[str, Any], server: bool, text: str
) -> None:
    backend = tcp_at(**options, server=server)
    with pytest.raises(OptionInvalid) as caught:
        await made(complain, backend)
    assert str(caught.value) == f"chardev-add: {text}"
    with pytest.raises(OptionInvalid):  # before any descriptor is asked for
        open_chardev("serial0", backend, Host(), complain)


async def test_a_socket_that_was_open_already_may_be_a_tcp_one(complain: Complaints) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    address = FdSocketAddressWrapper(FdSocketAddress(str(listener.fileno())))
    async with served(await made(complain, ChardevSocketWrapper(ChardevSocket(address)))) as chardev:
        assert chardev.filename == f"disconnected:tcp:127.0.0.1:{listener.getsockname()[1]},server=on"
        listener.detach()
        async with await connect_tcp(chardev) as client:
            await trio.testing.wait_all_tasks_blocked()
            chardev.put(b"hello")
            assert await read_exactly(client, 5) == b"hello"


async def test_a_socket_that_is_none_is_refused_by_its_number(complain: Complaints) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as udp:
        address = FdSocketAddressWrapper(FdSocketAddress(str(udp.fileno())))
        with pytest.raises(DescriptorWrongKind) as caught:
            await made(complain, ChardevSocketWrapper(ChardevSocket(address)))
        assert str(caught.value) == (
            f"Descriptor '{udp.fileno()}' is a socket of another family, "
            "not a listening unix socket or a listening tcp socket"
        )


async def test_what_was_opened_ahead_is_closed_where_it_is_not_wanted(path: str, complain: Complaints) -> None:
    class Revoked(Host):
        def obtain(self, name: str, opener: object) -> int:
            raise HostFileRefused(action="open", path=name, reason="the window has closed")

    for backend in (tcp_at(), socket_at(path)):
        with pytest.raises(HostFileRefused, match="the window has closed"):
            await make_chardev("serial0", backend, Revoked(), complain)
