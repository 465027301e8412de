"""A guest is copied over TLS; and what is set wrong is said, while it goes on where it is."""

from __future__ import annotations

import os
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio

import vmm
from tests.migration.pki import NAME, Pki
from tests.migration.pki import creds as opened
from tests.phases.copy_kit import HANGS, arrived, commands, empty, given, goes_on, listening, outcome, port_of, started
from vmm.errors import BackendNotFound, MigrationRefused, TlsFailed
from vmm.migration.tls import secure
from vmm.phases.start import Start
from vmm.recipe import Recipe
from vmm.residents import Residents

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from vmm.embedding import EmbeddedMachine
    from vmm.migration.connection import Connection

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki.make(tmp_path_factory.mktemp("pki"))


@asynccontextmanager
async def both(pki: Pki, **parameters: Any) -> AsyncGenerator[tuple[EmbeddedMachine, EmbeddedMachine]]:
    """Run a source and a destination with credentials of the same authority."""
    async with started() as source, empty() as destination:
        await given(source, pki.folder(), "client", **parameters)
        await given(destination, pki.folder(), "server")
        yield source, destination


async def test_a_guest_goes_over_tcp(pki: Pki) -> None:
    async with both(pki) as (source, destination):
        await destination.execute("migrate-incoming", uri="tcp:127.0.0.1:0")
        await source.execute("migrate", uri=f"tcp:127.0.0.1:{await port_of(destination)}")
        await arrived(source, destination)


async def test_a_guest_goes_over_a_unix_socket_whose_peer_has_a_name(pki: Pki, tmp_path: Path) -> None:
    async with both(pki, tls_hostname=NAME) as (source, destination):
        await destination.execute("migrate-incoming", uri=f"unix:{tmp_path / 'main'}")
        await source.execute("migrate", uri=f"unix:{tmp_path / 'main'}")
        await arrived(source, destination)


async def test_a_guest_goes_over_sockets_that_are_connected(pki: Pki) -> None:
    async with both(pki, tls_hostname=NAME) as (source, destination):
        ours, theirs = socket.socketpair()
        await destination.execute("migrate-incoming", uri=f"fd:{theirs.detach()}")
        await source.execute("migrate", uri=f"fd:{ours.detach()}")
        await arrived(source, destination)


async def test_what_goes_over_the_network_says_nothing_to_who_listens(pki: Pki, tmp_path: Path) -> None:
    async with both(pki, tls_hostname=NAME) as (source, destination):
        await destination.execute("migrate-incoming", uri=f"unix:{tmp_path / 'main'}")
        async with trio.open_nursery() as nursery:
            seen = await nursery.start(overheard, tmp_path / "between", tmp_path / "main")
            await source.execute("migrate", uri=f"unix:{tmp_path / 'between'}")
            await arrived(source, destination)
        assert len(seen) > 1000
        assert b"machine-set" not in seen
        assert b"89TVM" not in seen


async def overheard(
    between: Path, there: Path, *, task_status: trio.TaskStatus[bytearray] = trio.TASK_STATUS_IGNORED
) -> None:
    """Pass on what goes between two sockets, and keep it."""
    seen = bytearray()
    with trio.socket.socket(trio.socket.AF_UNIX) as listener:
        await listener.bind(str(between))
        listener.listen()
        task_status.started(seen)
        near = trio.SocketStream((await listener.accept())[0])
    far = await trio.open_unix_socket(str(there))

    async def carry(a: trio.SocketStream, b: trio.SocketStream) -> None:
        try:
            async for data in a:
                seen.extend(data)
                await b.send_all(data)
            await b.send_eof()
        except trio.BrokenResourceError:
            return

    async with near, far, trio.open_nursery() as nursery:
        nursery.start_soon(carry, near, far)
        nursery.start_soon(carry, far, near)


async def test_a_destination_of_another_authority_does_not_get_the_guest(pki: Pki) -> None:
    async with started() as source, empty() as destination:
        await given(source, pki.folder(), "client")
        await given(destination, pki.folder("other"), "server")
        await destination.execute("migrate-incoming", uri="tcp:127.0.0.1:0")
        with pytest.raises(TlsFailed, match=r"^TLS with the destination: its certificate is not accepted"):
            await source.execute("migrate", uri=f"tcp:127.0.0.1:{await port_of(destination)}")
        await goes_on(source)


async def test_a_source_without_a_certificate_does_not_become_the_machine(pki: Pki, tmp_path: Path) -> None:
    async with started() as source, empty() as destination:
        await given(source, pki.copy(tmp_path / "alone"), "client")
        await given(destination, pki.folder(), "server")
        await destination.execute("migrate-incoming", uri="tcp:127.0.0.1:0")
        uri = f"tcp:127.0.0.1:{await port_of(destination)}"
        await source.execute("migrate", uri=uri)
        info = await outcome(source)
        assert info["status"] == "failed"
        assert info["error-desc"] == (
            "TLS with the destination: it wants a certificate of this side; "
            "put client-cert.pem and client-key.pem into the dir of 'tls0'"
        )
        await goes_on(source)
        # Whoever is awaited may still come.
        await source.execute("object-del", id="tls0")
        await given(source, pki.folder(), "client")
        await source.execute("migrate", uri=uri)
        await arrived(source, destination)


async def test_strangers_are_complained_of_and_harm_nothing(pki: Pki) -> None:
    complaints: list[str] = []
    start = Start(Recipe("of this test"), complain=complaints.append)
    async with started() as source, vmm.machine(start=start) as destination:
        await given(destination, pki.folder(), "server")
        await destination.execute("migrate-incoming", uri="tcp:127.0.0.1:0")
        port = await port_of(destination)
        uri = f"tcp:127.0.0.1:{port}"
        # A source that has no TLS.
        await source.execute("migrate", uri=uri)
        info = await outcome(source)
        assert info["status"] == "failed"
        assert info["error-desc"] == (
            "Refused by the destination: it takes TLS alone; set migration parameter tls-creds"
        )
        # Nobody at all.
        (await trio.open_tcp_stream("127.0.0.1", int(port))).socket.close()
        await given(source, pki.folder(), "client")
        await source.execute("migrate", uri=uri)
        await arrived(source, destination)
    assert complaints == [
        "TLS with the source: it does not speak TLS; set tls-creds there too, or unset it here",
        "TLS with the source: it hung up in the middle of the handshake; "
        "its own error says why; one that has no tls-creds does that too",
    ]


async def test_a_destination_without_tls_does_not_get_the_guest(pki: Pki) -> None:
    async with started() as source, empty() as destination:
        await given(source, pki.folder(), "client")
        await destination.execute("migrate-incoming", uri="tcp:127.0.0.1:0")
        with pytest.raises(TlsFailed) as caught:
            await source.execute("migrate", uri=f"tcp:127.0.0.1:{await port_of(destination)}")
        assert str(caught.value) == (
            "TLS with the destination: it does not speak TLS; set tls-creds there too, or unset it here"
        )
        await goes_on(source)


async def test_a_migration_over_tls_can_be_cancelled(pki: Pki, tmp_path: Path) -> None:
    async with started() as source, trio.open_nursery() as nursery, listening(tmp_path) as (uri, listener):
        await given(source, pki.folder(), "client", tls_hostname=NAME)
        found: list[Connection] = []

        async def accept() -> None:
            sock = (await listener.accept()).socket
            found.append(await secure(sock, opened(pki.folder(), "server"), "source", within=HANGS))

        async with trio.open_nursery() as both:
            both.start_soon(accept)
            await source.execute("migrate", uri=uri)
        (peer,) = found
        peer.serve(Residents(nursery))
        await source.execute("migrate_cancel")
        assert (await outcome(source))["status"] == "cancelled"
        peer.close()
        await goes_on(source)


async def refused(machine: EmbeddedMachine, command: str, uri: str) -> str:
    with pytest.raises((BackendNotFound, MigrationRefused)) as caught:
        await machine.execute(command, uri=uri)
    return str(caught.value)


async def test_what_is_set_and_cannot_be_is_named(pki: Pki, tmp_path: Path) -> None:
    async with vmm.machine(commands()) as source, empty() as destination:
        for machine, command in ((source, "migrate"), (destination, "migrate-incoming")):
            await machine.execute("migrate-set-parameters", tls_creds="tls9")
            assert await refused(machine, command, f"unix:{tmp_path / 'main'}") == (
                "TLS credentials 'tls9' does not exist; there are: none"
            )
        await given(source, pki.folder(), "server")
        await given(destination, pki.folder(), "client")
        assert await refused(source, "migrate", f"unix:{tmp_path / 'main'}") == (
            "Migration parameter tls-creds: 'tls0' has endpoint=server, and the source of a migration is the client; "
            "use an object with endpoint=client"
        )
        assert await refused(destination, "migrate-incoming", f"unix:{tmp_path / 'main'}") == (
            "Migration parameter tls-creds: 'tls0' has endpoint=client, and the destination of a migration is the "
            "server; use an object with endpoint=server"
        )
        for machine, endpoint in ((source, "client"), (destination, "server")):
            await machine.execute("object-del", id="tls0")
            await given(machine, pki.folder(), endpoint)
        assert await refused(source, "migrate", f"unix:{tmp_path / 'main'}") == (
            "migrate: such an address has no host's name that the destination's certificate could be for; "
            "set migration parameter tls-hostname"
        )
        await source.execute("migrate-set-parameters", tls_hostname=NAME)
        for machine, command in ((source, "migrate"), (destination, "migrate-incoming")):
            for uri, what in ((f"file:{tmp_path / 'state'}", "a file"), ("exec:true", "a command")):
                assert await refused(machine, command, uri) == (
                    f"{command}: TLS is for sockets, and this channel is {what}; unset migration parameter tls-creds"
                )
        reading, writing = os.pipe()
        assert await refused(source, "migrate", f"fd:{writing}") == (
            "migrate: TLS is for sockets, and this channel is a pipe or a file; unset migration parameter tls-creds"
        )
        os.close(reading)
        assert not (tmp_path / "state").exists()


# --- whose they are -----------------------------------------------------------------------------------------------


async def test_credentials_are_in_no_recipe(pki: Pki) -> None:
    async with vmm.machine(commands()) as machine:
        recorder = machine._host.recorder
        before = recorder.recipe()
        await given(machine, pki.folder(), "client")
        assert recorder.recipe() == before
        await machine.execute("object-del", id="tls0")


def credentials_of_a_source(folder: str) -> dict[str, Any]:
    return {"qom-type": "tls-creds-x509", "id": "tls0", "dir": folder, "endpoint": "server"}


async def test_a_source_has_no_file_of_the_destination_read(pki: Pki, tmp_path: Path) -> None:
    async with started() as source, empty() as destination:
        source._host.recorder.record("object-add", credentials_of_a_source(str(pki.folder())))
        await destination.execute("migrate-incoming", uri=f"unix:{tmp_path / 'main'}", exit_on_error=False)
        await source.execute("migrate", uri=f"unix:{tmp_path / 'main'}")
        info = await outcome(source)
        assert info["error-desc"] == (
            "Refused by the destination: no descriptor came for object/tls0, and this host's own are allowed by name: "
            "-allow-resource object/tls0=PATH"
        )
        await goes_on(source)


async def test_what_an_operator_allows_is_read_where_they_say(pki: Pki, tmp_path: Path) -> None:
    async with started() as source, empty(allowed={"object/tls0": str(pki.folder())}) as destination:
        source._host.recorder.record("object-add", credentials_of_a_source("/nowhere"))
        await destination.execute("migrate-incoming", uri=f"unix:{tmp_path / 'main'}")
        await source.execute("migrate", uri=f"unix:{tmp_path / 'main'}")
        await arrived(source, destination)
        await destination.execute("object-del", id="tls0")
