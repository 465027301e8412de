"""TLS beside a channel: what goes through, how each direction ends, and what each side says of a peer that is wrong."""

from __future__ import annotations

import os
import select
import socket
import struct
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

from tests.migration.pki import NAME, Pki, creds
from vmm.errors import HostFileRefused, MigrationPeerGone, OptionInvalid, TlsFailed, VmmError
from vmm.hw.doorbell import open_doorbell
from vmm.migration.tls import secure
from vmm.migration.tls_relay import Closed, Relay
from vmm.residents import Residents

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from vmm.migration.connection import Connection
    from vmm.migration.tls_creds import Endpoint, TlsCredentials

pytestmark = pytest.mark.usefixtures("no_leaks")

HANGS: Final = 30.0
"""Seconds after which a test says that what it waits for does not come. No outcome depends on it."""

MUCH: Final = os.urandom(1 << 16) * 48
"""More than all buffers between the two ends have room for."""


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki.make(tmp_path_factory.mktemp("pki"))


@asynccontextmanager
async def tcp_pair() -> AsyncGenerator[tuple[trio.socket.SocketType, trio.socket.SocketType]]:
    """Connect two sockets over the network."""
    with trio.socket.socket() as listener:
        await listener.bind(("127.0.0.1", 0))
        listener.listen()
        with trio.socket.socket() as client:
            await client.connect(listener.getsockname())
            server, _ = await listener.accept()
            with server:
                yield client, server


class Ends:
    """What has come of a handshake at each end."""

    client: Connection | VmmError
    server: Connection | VmmError


async def shaken(
    nursery: trio.Nursery, client: TlsCredentials, server: TlsCredentials, *, serve: bool = True, **options: Any
) -> Ends:
    """Shake hands, and return what came of it; without `serve`, nobody passes on anything yet."""
    ends, residents = Ends(), Residents(nursery)
    async with tcp_pair() as (near, far):

        async def side(
            name: str, sock: trio.socket.SocketType, creds: TlsCredentials, peer: str, **options: Any
        ) -> None:
            own = trio.socket.from_stdlib_socket(socket.socket(fileno=os.dup(sock.fileno())))
            try:
                end = await secure(own, creds, peer, within=HANGS, **options)
                setattr(ends, name, end.serve(residents) if serve else end)
            except VmmError as error:
                setattr(ends, name, error)

        async with trio.open_nursery() as both:
            both.start_soon(lambda: side("client", near, client, "destination", **{"hostname": NAME, **options}))
            both.start_soon(lambda: side("server", far, server, "source"))
    return ends


@asynccontextmanager
async def connected(pki: Pki, **options: Any) -> AsyncGenerator[tuple[Connection, Connection]]:
    """Connect two ends that know each other."""
    async with trio.open_nursery() as nursery:
        ends = await shaken(nursery, creds(pki.folder(), "client"), creds(pki.folder(), "server"), **options)
        client, server = ends.client, ends.server
        assert not isinstance(client, VmmError), client
        assert not isinstance(server, VmmError), server
        try:
            yield client, server
        finally:
            client.close()
            server.close()


def stream(connection: Connection) -> trio.SocketStream:
    assert connection.stream is not None
    return connection.stream


async def read_all(connection: Connection) -> bytes:
    found = bytearray()
    with trio.fail_after(HANGS):
        while data := await stream(connection).receive_some(1 << 20):
            found += data
    return bytes(found)


# --- what goes through ------------------------------------------------------------------------------------------


async def test_both_directions_go_on_at_a_time(pki: Pki) -> None:
    async with connected(pki) as (client, server), trio.open_nursery() as nursery:
        for end in (client, server):

            async def send(end: Connection = end) -> None:
                await stream(end).send_all(MUCH)
                await stream(end).send_eof()

            async def receive(end: Connection = end) -> None:
                assert await read_all(end) == MUCH

            nursery.start_soon(send)
            nursery.start_soon(receive)


@pytest.mark.parametrize("first", ["client", "server"])
async def test_one_direction_may_end_before_the_other(pki: Pki, first: str) -> None:
    async with connected(pki) as (client, server), trio.open_nursery() as nursery:
        ending, other = (client, server) if first == "client" else (server, client)
        half, ended = len(MUCH) // 2, trio.Event()

        async def send() -> None:
            await stream(other).send_all(MUCH[:half])
            await ended.wait()
            await stream(other).send_all(MUCH[half:])
            await stream(other).send_eof()

        async def receive() -> None:
            assert await read_all(ending) == MUCH

        nursery.start_soon(send)
        nursery.start_soon(receive)
        await stream(ending).send_all(b"all there is")
        await stream(ending).send_eof()
        assert await read_all(other) == b"all there is"
        ended.set()


async def test_what_was_said_before_the_channel_was_closed_arrives(pki: Pki) -> None:
    async with connected(pki) as (client, server):
        await stream(client).send_all(b"yours")
        client.part()
        client.close()
        assert await read_all(server) == b"yours"


async def test_what_was_said_last_arrives_though_the_machine_ends(pki: Pki) -> None:
    async with trio.open_nursery() as nursery:
        ends = await shaken(nursery, creds(pki.folder(), "client"), creds(pki.folder(), "server"), serve=False)
        client, server = ends.client, ends.server
        assert not isinstance(client, VmmError), client
        assert not isinstance(server, VmmError), server
        server.serve(Residents(nursery))

        heard: list[bytes] = []

        async def hear() -> None:
            heard.append(await read_all(server))
            server.close()

        nursery.start_soon(hear)
        await stream(client).send_all(b"yours")
        client.part()
        residents = Residents(nursery)
        client.serve(residents)
        client.close()
        await residents.leave_all()
    assert heard == [b"yours"]


async def test_a_peer_that_dies_is_the_end_and_nobodys_doing(pki: Pki) -> None:
    async with connected(pki) as (client, server):
        server.close()
        assert await read_all(client) == b""
        with pytest.raises(MigrationPeerGone):
            async with client.explained():
                raise MigrationPeerGone(peer="destination", what="is gone", outcome="the guest stays")


@pytest.mark.parametrize("hostname", [NAME, "127.0.0.1"])
async def test_a_certificate_is_for_a_name_or_an_address(pki: Pki, hostname: str) -> None:
    async with connected(pki, hostname=hostname) as (client, server):
        await stream(server).send_all(b"x")
        assert await stream(client).receive_some(1) == b"x"


# --- peers that are wrong ---------------------------------------------------------------------------------------


async def outcome(pki: Pki, client: TlsCredentials, server: TlsCredentials, **options: Any) -> list[str]:
    """Return what each side says in the end."""
    said = []
    async with trio.open_nursery() as nursery:
        ends = await shaken(nursery, client, server, **options)
        for end in (ends.client, ends.server):
            if isinstance(end, VmmError):
                said.append(str(end))
                continue
            with suppress(trio.BrokenResourceError):
                await read_all(end)
            try:
                async with end.explained():
                    raise MigrationPeerGone(peer="peer", what="is gone", outcome="")
            except VmmError as error:
                said.append(str(error))
            end.close()
    return said


async def test_a_server_of_another_authority_is_named_at_both_sides(pki: Pki) -> None:
    client, server = await outcome(pki, creds(pki.folder(), "client"), creds(pki.folder("other"), "server"))
    assert client == (
        "TLS with the destination: its certificate is not accepted (self-signed certificate in certificate chain); "
        "have it signed by the CA in ca-cert.pem of 'tls0'"
    )
    assert server == (
        "TLS with the source: it does not accept the certificate of this side (tlsv1 alert unknown ca); "
        "have server-cert.pem of 'tls0' signed by the CA that it knows"
    )


async def test_a_certificate_for_another_name_is_named(pki: Pki) -> None:
    wrong = {"hostname": "elsewhere.example"}
    client, server = await outcome(pki, creds(pki.folder(), "client"), creds(pki.folder(), "server"), **wrong)
    assert client == (
        "TLS with the destination: its certificate is not accepted (Hostname mismatch, certificate is not valid for "
        "'elsewhere.example'); set tls-hostname to a name that is in it, or connect to one"
    )
    assert server.startswith("TLS with the source: it does not accept the certificate of this side (")


async def test_a_client_without_a_certificate_is_told_what_it_needs(pki: Pki, tmp_path: Path) -> None:
    alone = pki.copy(tmp_path / "alone")
    client, server = await outcome(pki, creds(alone, "client"), creds(pki.folder(), "server"))
    assert client == (
        "TLS with the destination: it wants a certificate of this side; "
        "put client-cert.pem and client-key.pem into the dir of 'tls0'"
    )
    assert server == (
        "TLS with the source: it sent no certificate; "
        "put client-cert.pem and client-key.pem where its credentials are, or set verify-peer=off here"
    )


async def test_a_client_of_another_authority_is_named_at_both_sides(pki: Pki, tmp_path: Path) -> None:
    mixed = pki.copy(tmp_path / "mixed", "client-cert.pem", "client-key.pem", of="other")
    pki.copy(mixed)
    client, server = await outcome(pki, creds(mixed, "client", sanity_check=False), creds(pki.folder(), "server"))
    assert client.startswith("TLS with the destination: it does not accept the certificate of this side (")
    assert client.endswith("; have client-cert.pem of 'tls0' signed by the CA that it knows")
    assert server.startswith("TLS with the source: its certificate is not accepted (")
    assert server.endswith("; have it signed by the CA in ca-cert.pem of 'tls0'")


async def test_whoever_does_not_ask_gets_no_certificate(pki: Pki, tmp_path: Path) -> None:
    alone = pki.copy(tmp_path / "alone")
    async with trio.open_nursery() as nursery:
        trusting = creds(pki.folder("other"), "client", verify_peer=False)
        ends = await shaken(nursery, trusting, creds(pki.folder(), "server", verify_peer=False), hostname=None)
        for end in (ends.client, ends.server):
            assert not isinstance(end, VmmError), end
            end.close()
        ends = await shaken(nursery, creds(alone, "client"), creds(pki.folder(), "server", verify_peer=False))
        for end in (ends.client, ends.server):
            assert not isinstance(end, VmmError), end
            end.close()


async def test_a_certificate_that_has_expired_is_named(pki: Pki, tmp_path: Path) -> None:
    old = pki.copy(tmp_path / "old")
    pki.certificate("ours", "server", into=old, days=0)
    client, _ = await outcome(pki, creds(pki.folder(), "client"), creds(old, "server", sanity_check=False))
    assert client == (
        "TLS with the destination: its certificate is not accepted (certificate has expired); "
        "renew it, or set the clock right"
    )


async def test_a_certificate_that_was_revoked_is_named(pki: Pki, tmp_path: Path) -> None:
    folder = pki.copy(tmp_path / "list", "server-cert.pem", "server-key.pem")
    pki.revoke(folder, "client")
    _, server = await outcome(pki, creds(pki.folder(), "client"), creds(folder, "server", sanity_check=False))
    assert server == (
        "TLS with the source: its certificate is not accepted (certificate revoked); "
        "have it signed by the CA in ca-cert.pem of 'tls0'"
    )


async def one_side(pki: Pki, endpoint: Endpoint, said: bytes, *, within: float = HANGS, leave: bool = True) -> str:
    """Shake hands with a peer that says this instead, and leaves or stays; return what is said of it."""
    failure: TlsFailed | None = None
    async with tcp_pair() as (near, far):
        own = trio.socket.from_stdlib_socket(socket.socket(fileno=near.detach()))

        async def play() -> None:
            if said:
                await far.send(said)
            if leave:
                far.shutdown(socket.SHUT_WR)
            with suppress(OSError):
                while await far.recv(1 << 16):
                    pass
            far.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(play)
            peer, hostname = ("destination", NAME) if endpoint == "client" else ("source", None)
            try:
                await secure(own, creds(pki.folder(), endpoint), peer, hostname=hostname, within=within)
            except TlsFailed as error:
                failure = error
    assert failure is not None
    return str(failure)


PLAIN: Final = "it does not speak TLS; set tls-creds there too, or unset it here"


@pytest.mark.parametrize("said", [b'{"word": "refused", "reason": "no stream"}\n', b"HTTP/1.1 400 Bad Request\r\n\r\n"])
async def test_a_destination_without_tls_is_named(pki: Pki, said: bytes) -> None:
    assert await one_side(pki, "client", said) == f"TLS with the destination: {PLAIN}"


@pytest.mark.parametrize("said", [b"\x89TVMM\r\n\x1a\1\0\0\0", b"GET / HTTP/1.1\r\n\r\n"])
async def test_a_source_without_tls_is_named(pki: Pki, said: bytes) -> None:
    assert await one_side(pki, "server", said) == f"TLS with the source: {PLAIN}"


@pytest.mark.parametrize(("endpoint", "peer"), [("client", "destination"), ("server", "source")])
async def test_a_peer_that_hangs_up_in_the_handshake_is_named(pki: Pki, endpoint: Endpoint, peer: str) -> None:
    assert await one_side(pki, endpoint, b"") == (
        f"TLS with the {peer}: it hung up in the middle of the handshake; "
        "its own error says why; one that has no tls-creds does that too"
    )


@pytest.mark.parametrize(("endpoint", "peer"), [("client", "destination"), ("server", "source")])
async def test_a_peer_that_stalls_in_the_handshake_has_a_limit(pki: Pki, endpoint: Endpoint, peer: str) -> None:
    assert await one_side(pki, endpoint, b"", within=0.05, leave=False) == (
        f"TLS with the {peer}: it did not finish the handshake within 0.05 s; set tls-creds there too, or unset it here"
    )


async def test_a_name_that_none_can_have_is_refused(pki: Pki) -> None:
    async with tcp_pair() as (near, _):
        own = trio.socket.from_stdlib_socket(socket.socket(fileno=os.dup(near.fileno())))
        with pytest.raises(OptionInvalid) as caught:
            await secure(own, creds(pki.folder(), "client"), "destination", hostname="a..b", within=HANGS)
        assert str(caught.value).startswith(
            "Migration parameter tls-hostname: 'a..b' is not a host's name or address ("
        )


async def test_what_breaks_tls_later_is_the_reason(pki: Pki) -> None:
    async with trio.open_nursery() as nursery, tcp_pair() as (near, far):
        own, mine = (trio.socket.from_stdlib_socket(socket.socket(fileno=os.dup(it.fileno()))) for it in (near, far))
        found: list[Connection] = []

        async def client() -> None:
            found.append(await secure(own, creds(pki.folder(), "client"), "destination", hostname=NAME, within=HANGS))

        async with trio.open_nursery() as both:
            both.start_soon(client)
            server = await secure(mine, creds(pki.folder(), "server"), "source", within=HANGS)
        residents = Residents(nursery)
        (end,) = found
        end.serve(residents)
        # Nobody relays at the server: bytes of our own come instead.
        await far.send(b"this is no record of TLS at all, and long enough to be looked at as one")
        far.shutdown(socket.SHUT_WR)
        assert await read_all(end) == b""
        with pytest.raises(TlsFailed, match=r"^TLS with the destination: it "):
            async with end.explained():
                raise MigrationPeerGone(peer="destination", what="is gone", outcome="")
        end.close()
        server.serve(residents)
        server.close()


async def test_what_a_peer_said_before_it_broke_off_arrives(pki: Pki) -> None:
    async with tcp_pair() as (near, far), trio.open_nursery() as nursery:
        own = trio.socket.from_stdlib_socket(socket.socket(fileno=os.dup(near.fileno())))
        server = creds(pki.folder(), "server").context

        def refuse() -> None:
            raw = socket.socket(fileno=far.detach())
            raw.setblocking(True)
            with server.wrap_socket(raw, server_side=True) as tls:
                tls.sendall(b"no")
                tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        end = None
        async with trio.open_nursery() as both:
            both.start_soon(trio.to_thread.run_sync, refuse)
            end = await secure(own, creds(pki.folder(), "client"), "destination", hostname=NAME, within=HANGS)
        # It has broken off, with what was said unread, when there is something to be sent.
        broken = select.poll()
        broken.register(near.fileno(), 0)
        await trio.to_thread.run_sync(broken.poll, HANGS * 1000)
        await stream(end).send_all(b"more of the state")
        end.serve(Residents(nursery))
        assert await read_all(end) == b"no"
        end.close()


async def test_whoever_speaks_no_tls_and_goes_on_fills_no_memory(pki: Pki) -> None:
    net, peer = socket.socketpair()
    with peer, trio.socket.from_stdlib_socket(net) as sock, open_doorbell() as bell:
        relay = Relay(sock, creds(pki.folder(), "server").context, server=True, hostname=None)

        def speak() -> None:
            peer.sendall(b"This is not TLS." * (1 << 16))
            peer.shutdown(socket.SHUT_WR)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, speak)
            with pytest.raises(Closed):
                await trio.to_thread.run_sync(relay.shake_hands, bell)
        # No more than what had come before it was looked at.
        assert relay._arrived.pending < len(relay._buffer)
        relay.close()


# --- the files --------------------------------------------------------------------------------------------------


def refused(folder: Path, endpoint: Endpoint = "server", **options: Any) -> str:
    with pytest.raises((OptionInvalid, HostFileRefused)) as caught:
        creds(folder, endpoint, **options)
    return str(caught.value)


def test_a_file_that_is_needed_is_named(pki: Pki, tmp_path: Path) -> None:
    assert refused(tmp_path) == f"Cannot read {tmp_path}/ca-cert.pem: No such file or directory"
    pki.copy(tmp_path)
    assert refused(tmp_path) == f"Cannot read {tmp_path}/server-cert.pem: No such file or directory"
    pki.copy(tmp_path, "server-cert.pem", "client-cert.pem")
    assert refused(tmp_path) == f"Cannot read {tmp_path}/server-key.pem: No such file or directory"
    assert refused(tmp_path, "client") == f"Cannot read {tmp_path}/client-key.pem: it is not there, and its cert is"


def test_a_key_that_others_may_read_is_refused(pki: Pki, tmp_path: Path) -> None:
    pki.copy(tmp_path, "server-cert.pem", "server-key.pem")
    (tmp_path / "server-key.pem").chmod(0o644)
    assert refused(tmp_path) == (
        f"Cannot take a secret from {tmp_path}/server-key.pem: its mode is 0644, so others than its owner have access; "
        "use chmod 600"
    )


def test_what_is_no_certificate_is_named(pki: Pki, tmp_path: Path) -> None:
    pki.copy(tmp_path, "server-cert.pem", "server-key.pem")
    (tmp_path / "ca-cert.pem").write_text("nothing")
    assert refused(tmp_path).startswith(
        f"tls-creds-x509 tls0: ca-cert.pem: '{tmp_path}/ca-cert.pem' is not a certificate of a CA, in PEM ("
    )
    pki.copy(tmp_path)
    (tmp_path / "ca-crl.pem").write_text("nothing")
    assert refused(tmp_path).startswith(
        f"tls-creds-x509 tls0: ca-crl.pem: '{tmp_path}/ca-crl.pem' is not a list of revoked certificates, in PEM ("
    )
    (tmp_path / "ca-crl.pem").unlink()
    pki.copy(tmp_path, "server-cert.pem", of="other")
    pki.copy(tmp_path)
    assert refused(tmp_path).startswith(
        f"tls-creds-x509 tls0: server-cert.pem: '{tmp_path}/server-cert.pem' is not a certificate in PEM, to the key "
        "in server-key.pem, which has no passphrase ("
    )


def test_the_own_certificate_is_tried_unless_that_is_off(pki: Pki, tmp_path: Path) -> None:
    other = pki.copy(tmp_path / "other", "server-cert.pem", "server-key.pem", of="other")
    pki.copy(other)
    assert refused(other) == (
        f"tls-creds-x509 tls0: server-cert.pem: '{other}/server-cert.pem' is not a certificate that ca-cert.pem beside "
        "it accepts of a server (unable to get local issuer certificate)"
    )
    old = pki.copy(tmp_path / "old")
    pki.certificate("ours", "client", into=old, days=0)
    assert refused(old, "client").endswith("accepts of a client (certificate has expired)")
    swapped = pki.copy(tmp_path / "swapped")
    for file in ("cert", "key"):
        (swapped / f"server-{file}.pem").write_bytes((pki.folder() / f"client-{file}.pem").read_bytes())
        (swapped / f"server-{file}.pem").chmod(0o600)
    assert refused(swapped).endswith("accepts of a server (unsuitable certificate purpose)")
    no_ca = tmp_path / "no-ca"
    no_ca.mkdir()
    (no_ca / "ca-cert.pem").write_bytes((pki.folder() / "client-cert.pem").read_bytes())
    assert refused(no_ca, "client") == (
        f"tls-creds-x509 tls0: ca-cert.pem: '{no_ca}/ca-cert.pem' is not a certificate of a CA (it is of no ca)"
    )
    for folder, endpoint in ((other, "server"), (old, "client"), (swapped, "server"), (no_ca, "client")):
        assert creds(folder, endpoint, sanity_check=False).endpoint == endpoint  # type: ignore[arg-type]
