"""Descriptors that a migration is given: whose they are, and what becomes of them where it is refused."""

from __future__ import annotations

import os
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest

import vmm
from tests.phases.copy_kit import Client, commands, empty, execute, goes_on, in_status, outcome, started
from vmm.errors import (
    DescriptorError,
    DescriptorWrongKind,
    HostFileRefused,
    InvalidState,
    MigrationRefused,
    Unsupported,
    VmmError,
)
from vmm.phases.start import Start
from vmm.recipe import Recipe, Step

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from vmm.embedding import EmbeddedMachine

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]


def named(kind: str, name: str) -> dict[str, Any]:
    """Return a channel that is a descriptor."""
    return {"channel-type": kind, "addr": {"transport": "socket", "type": "fd", "str": name}}


def at(kind: str, path: Path) -> dict[str, Any]:
    """Return a channel that is a unix socket's path."""
    return {"channel-type": kind, "addr": {"transport": "socket", "type": "unix", "path": str(path)}}


@asynccontextmanager
async def running() -> AsyncGenerator[EmbeddedMachine, None]:
    """Run a machine."""
    async with vmm.machine(commands()) as machine:
        yield machine


def hung_up(sock: socket.socket) -> bool:
    """Say whether nobody has the other end any more."""
    sock.setblocking(False)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False


STREAM: Final = "a stream socket or a pipe or a regular file"

# --- numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["migrate", "migrate-incoming", "x-cpr-check"])
@pytest.mark.parametrize("number", ["open", "999"])
async def test_a_session_cannot_name_a_descriptor_of_the_process_by_its_number(command: str, number: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        fd = str(theirs.fileno()) if number == "open" else number
        arguments: dict[str, Any] = {"uri": f"fd:{fd}"}
        if command == "x-cpr-check":
            arguments = {"channels": [named("main", fd), named("cpr", "cpr")]}
        async with empty() if command == "migrate-incoming" else running() as machine:
            with pytest.raises(DescriptorError) as caught:
                await execute(machine, Client(), command, **arguments)
            assert str(caught.value) == (
                f"Descriptor {fd!r} is a number, and of those no session can know; send it by getfd, and name it"
            )
            assert (await machine.execute("query-migrate")) == {}
            assert not hung_up(ours)


async def test_the_program_around_a_machine_names_descriptors_by_number() -> None:
    async with started() as source, empty() as destination:
        ours, theirs = socket.socketpair()
        await destination.execute("migrate-incoming", uri=f"fd:{theirs.detach()}")
        await source.execute("migrate", uri=f"fd:{ours.detach()}")
        assert (await outcome(source))["status"] == "completed"
        await in_status(destination, "running")
        await goes_on(destination)


async def test_the_command_line_names_descriptors_by_number() -> None:
    ours, theirs = socket.socketpair()
    step = Step("migrate-incoming", {"uri": f"fd:{theirs.detach()}"})
    async with started() as source, vmm.machine(start=Start(Recipe("of this test", (step,)))) as destination:
        await source.execute("migrate", uri=f"fd:{ours.detach()}")
        assert (await outcome(source))["status"] == "completed"
        await in_status(destination, "running")


@pytest.mark.parametrize("command", ["migrate", "migrate-incoming"])
async def test_a_number_that_is_no_stream_socket_is_refused_and_stays_as_it_is(command: str, tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        async with running() if command == "migrate" else empty() as machine:
            for number, found in (
                (999, "not open"),
                (folder, "a directory"),
                (datagrams.fileno(), "a socket of another type"),
            ):
                with pytest.raises(DescriptorWrongKind) as caught:
                    await machine.execute(command, uri=f"fd:{number}")
                assert str(caught.value) == f"Descriptor '{number}' is {found}, not {STREAM}"
        os.close(folder)
        datagrams.getsockname()


# --- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["migrate", "migrate-incoming"])
async def test_a_datagram_socket_is_refused_and_stays_the_sessions(command: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        client = Client(descriptors={"main": datagrams.fileno()})
        async with running() if command == "migrate" else empty() as machine:
            with pytest.raises(DescriptorWrongKind) as caught:
                await execute(machine, client, command, uri="fd:main")
            assert str(caught.value) == f"Descriptor 'main' is a socket of another type, not {STREAM}"
        assert client.descriptors == {"main": datagrams.fileno()}
        datagrams.getsockname()


async def test_one_descriptor_is_not_for_two_channels() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        client = Client(descriptors={"one": theirs.fileno()})
        async with empty() as machine:
            with pytest.raises(DescriptorError, match="Descriptor 'one' is given for two channels"):
                await execute(machine, client, "migrate-incoming", channels=[named("main", "one"), named("cpr", "one")])
        assert client.descriptors == {"one": theirs.fileno()}


async def test_a_live_update_is_awaited_on_descriptors_that_listen(tmp_path: Path) -> None:
    client = Client()
    for kind in ("main", "cpr"):
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(tmp_path / kind))
        sock.listen()
        client.descriptors[kind] = sock.detach()
    async with empty() as machine:
        await execute(machine, client, "migrate-incoming", channels=[named("main", "main"), named("cpr", "cpr")])
        assert client.descriptors == {}
        assert (await machine.execute("query-migrate"))["status"] == "setup"
        await machine.execute("x-cpr-abandon")
        with pytest.raises(ConnectionRefusedError), socket.socket(socket.AF_UNIX) as late:
            late.connect(str(tmp_path / "cpr"))


NOWHERE: Final = {
    "channel-type": "main",
    "addr": {"transport": "socket", "type": "unix", "path": "/nowhere/main"},
}


@pytest.mark.parametrize(
    ("kind", "reason", "arguments"),
    [
        (
            MigrationRefused,
            "migrate-incoming: two channels of one type; give one of each",
            {"channels": [named("main", "one"), named("main", "two")]},
        ),
        (
            MigrationRefused,
            "migrate-incoming: give a channel of type main, and for a live update one of type cpr besides; given: cpr",
            {"channels": [named("cpr", "one")]},
        ),
        (
            Unsupported,
            "exit-on-error of a live update 'false' is not supported here; leave it true: "
            "a destination whose source was refused has nothing to go on with",
            {"channels": [named("main", "one"), named("cpr", "two")], "exit_on_error": False},
        ),
        (
            HostFileRefused,
            "Cannot listen on descriptor ",
            {"channels": [named("main", "one"), named("cpr", "two")]},
        ),
        (
            HostFileRefused,
            "Cannot listen on /nowhere/main: No such file or directory",
            {"channels": [NOWHERE, named("cpr", "one")]},
        ),
    ],
)
async def test_a_refused_migrate_incoming_closes_what_it_was_given(
    kind: type[VmmError], reason: str, arguments: dict[str, Any]
) -> None:
    async with empty() as machine:
        await refused(machine, kind, reason, arguments)


async def test_a_migrate_incoming_beside_another_closes_what_it_was_given(tmp_path: Path) -> None:
    async with empty() as machine:
        await machine.execute("migrate-incoming", uri=f"unix:{tmp_path / 'main'}")
        reason = "migrate-incoming: channels are bound already; query-migrate shows them"
        await refused(machine, MigrationRefused, reason, {"uri": "fd:one"})


async def test_a_live_update_of_a_machine_that_is_there_closes_what_it_was_given() -> None:
    async with vmm.machine(commands(upto="accel-set")) as machine:
        reason = "migrate-incoming is not possible once the machine is defined"
        await refused(machine, InvalidState, reason, {"channels": [named("main", "one"), named("cpr", "two")]})


async def refused(machine: EmbeddedMachine, kind: type[VmmError], reason: str, arguments: dict[str, Any]) -> None:
    """Expect a refusal that leaves nobody at the other end of the descriptors `one` and `two`, if they are named."""
    client, ends = Client(), []
    for name in ("one", "two"):
        if f"{name}'" in str(arguments):
            ours, theirs = socket.socketpair()
            client.descriptors[name] = theirs.detach()
            ends.append(ours)
    with pytest.raises(kind) as caught:
        await execute(machine, client, "migrate-incoming", **arguments)
    assert str(caught.value).startswith(reason)
    assert client.descriptors == {}
    assert ends
    for ours in ends:
        with ours:
            assert hung_up(ours)


# --- x-cpr-check ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["main", "cpr"])
async def test_a_destination_is_not_asked_through_a_file(kind: str, tmp_path: Path) -> None:
    file = {"channel-type": kind, "addr": {"transport": "file", "filename": str(tmp_path / "file"), "offset": 0}}
    other = at("cpr" if kind == "main" else "main", tmp_path / "other")
    async with running() as machine:
        with pytest.raises(MigrationRefused) as caught:
            await machine.execute("x-cpr-check", channels=[file, other])
        assert str(caught.value) == f"x-cpr-check: the {kind} channel of a live update must be a socket, not a file"
    assert os.listdir(tmp_path) == []
