"""A guest is copied through commands, pipes, files and sockets of every kind that a channel can be."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

import vmm
from tests.phases.copy_kit import (
    SIZE,
    Client,
    arrived,
    commands,
    empty,
    execute,
    goes_on,
    outcome,
    port_of,
    started,
)
from vmm.capabilities import MIGRATE
from vmm.errors import DescriptorWrongKind, HostFileRefused, MigrationRefused

if TYPE_CHECKING:
    from pathlib import Path

    from vmm.embedding import EmbeddedMachine

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]


# --- commands ---------------------------------------------------------------------------------------------------


async def test_a_guest_goes_through_a_command_into_a_file_and_back(tmp_path: Path) -> None:
    async with started() as source, empty() as destination:
        await source.execute("migrate", uri=f"exec:gzip -1 > {tmp_path}/state")
        assert (await outcome(source))["status"] == "completed"
        await destination.execute("migrate-incoming", uri=f"exec:gunzip < {tmp_path}/state")
        await arrived(source, destination)


def program(*args: str) -> list[dict[str, Any]]:
    """Return a channel that is a program and its arguments, without a shell."""
    return [{"channel-type": "main", "addr": {"transport": "exec", "args": list(args)}}]


async def test_the_words_of_a_command_are_not_a_shells(tmp_path: Path) -> None:
    async with started() as source, empty() as destination:
        await source.execute("migrate", channels=program("dd", f"of={tmp_path}/a b;c", "status=none"))
        assert (await outcome(source))["status"] == "completed"
        await destination.execute("migrate-incoming", channels=program("cat", f"{tmp_path}/a b;c"))
        await arrived(source, destination)


@pytest.mark.parametrize("script", ["exit 7", "cat > /dev/null; exit 7"])
async def test_a_guest_whose_command_fails_goes_on_where_it_is(script: str) -> None:
    async with started() as source:
        await source.execute("migrate", uri=f"exec:{script}")
        info = await outcome(source)
        assert info["status"] == "failed"
        assert info["error-desc"] == (
            f"Migration command {script!r} ended with status 7; "
            "it must take or give the whole stream, and end with status 0"
        )
        await goes_on(source)


async def test_a_migration_that_is_cancelled_kills_its_command() -> None:
    async with started() as source:
        await source.execute("migrate", uri="exec:sleep 1000")
        await source.execute("migrate_cancel")
        assert (await outcome(source))["status"] == "cancelled"
        await goes_on(source)


async def test_a_command_that_cannot_be_started_is_the_reply() -> None:
    async with started() as source:
        with pytest.raises(HostFileRefused) as caught:
            await source.execute("migrate", channels=program("/nowhere/program"))
        assert str(caught.value) == "Cannot start /nowhere/program: No such file or directory"
        await goes_on(source)
    async with empty() as destination:
        with pytest.raises(HostFileRefused):
            await destination.execute("migrate-incoming", channels=program("/nowhere/program"))


async def test_a_guest_whose_command_fails_at_the_destination_is_refused() -> None:
    async with empty() as destination:
        await destination.execute("migrate-incoming", uri="exec:echo; exit 4", exit_on_error=False)
        assert (await outcome(destination))["error-desc"] == (
            "Migration command 'echo; exit 4' ended with status 4; "
            "it must take or give the whole stream, and end with status 0"
        )
        await destination.execute("migrate-incoming", uri="exec:exit 0")


async def test_a_machine_that_ends_while_its_command_is_awaited_leaves_nothing_of_it() -> None:
    async with empty() as destination:
        await destination.execute("migrate-incoming", uri="exec:sleep 1000")


def talking(folder: Path) -> tuple[str, str]:
    """Return commands for both sides that carry the stream there, and words back, through two named pipes."""
    there, back = folder / "there", folder / "back"
    for path in (there, back):
        os.mkfifo(path)
    return (
        f"exec:exec 3<&0; cat <&3 >{there} & cat <{back}; wait",
        f"exec:exec 3<&0; cat <&3 >{back} & cat <{there}; wait",
    )


async def returns(*machines: EmbeddedMachine) -> None:
    """Turn `return-path` on."""
    for machine in machines:
        await machine.execute("migrate-set-capabilities", capabilities=[{"capability": "return-path", "state": True}])


async def test_a_destination_answers_through_commands_with_return_path(tmp_path: Path) -> None:
    out, back = talking(tmp_path)
    async with started() as source, empty() as destination:
        await returns(source, destination)
        await destination.execute("migrate-incoming", uri=back)
        await source.execute("migrate", uri=out)
        await arrived(source, destination)


async def test_a_destination_refuses_through_commands_with_return_path(tmp_path: Path) -> None:
    out, back = talking(tmp_path)
    async with started() as source, vmm.machine(commands(upto="accel-set", size=SIZE * 2)) as destination:
        await returns(source, destination)
        await destination.execute("migrate-incoming", uri=back, exit_on_error=False)
        await source.execute("migrate", uri=out)
        info = await outcome(source)
        assert info["status"] == "failed"
        assert info["error-desc"].startswith("Refused by the destination: ")
        await goes_on(source)


async def test_a_source_that_waits_for_answers_which_cannot_come_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "there")
    async with started() as source, empty() as destination:
        await returns(source)
        await destination.execute("migrate-incoming", uri=f"exec:cat {tmp_path}/there", exit_on_error=False)
        await source.execute("migrate", uri=f"exec:cat > {tmp_path}/there")
        assert (await outcome(destination))["error-desc"] == (
            "The source waits for answers, and nothing that is said here gets there: turn migration capability "
            "return-path on at both sides, or at none"
        )
        # Its command finds that nobody reads, or has been through already; the guest is here in either case.
        await source.execute("migrate_cancel")
        assert (await outcome(source))["status"] in ("cancelled", "failed")
        await goes_on(source)


async def test_a_destination_says_nothing_to_a_source_that_does_not_listen(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "there")
    async with started() as source, empty() as destination:
        await returns(destination)
        await destination.execute("migrate-incoming", uri=f"exec:cat {tmp_path}/there")
        await source.execute("migrate", uri=f"exec:cat > {tmp_path}/there")
        await arrived(source, destination)


@pytest.mark.parametrize("command", ["migrate", "migrate-incoming"])
async def test_a_session_that_may_open_nothing_here_starts_nothing_here(command: str, tmp_path: Path) -> None:
    client = Client(grant=MIGRATE)
    async with vmm.machine(commands()) if command == "migrate" else empty() as machine:
        with pytest.raises(MigrationRefused) as caught:
            await execute(machine, client, command, uri=f"exec:touch {tmp_path}/made")
        assert str(caught.value) == (
            f"{command}: a command takes may-open-host-file, which this session is not lent; use a socket"
        )
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["main", "cpr"])
@pytest.mark.parametrize("command", ["migrate", "x-cpr-check", "migrate-incoming"])
async def test_no_channel_of_a_live_update_is_a_command(command: str, kind: str, tmp_path: Path) -> None:
    other = {"transport": "socket", "type": "unix", "path": str(tmp_path / "other")}
    made = {"transport": "exec", "args": ["touch", str(tmp_path / "made")]}
    channels = [{"channel-type": name, "addr": made if name == kind else other} for name in ("main", "cpr")]
    async with empty() if command == "migrate-incoming" else vmm.machine(commands()) as machine:
        if command == "migrate":
            await machine.execute("migrate-set-parameters", mode="cpr-transfer")
        with pytest.raises(MigrationRefused) as caught:
            await machine.execute(command, channels=channels)
        assert str(caught.value) == f"{command}: the {kind} channel of a live update must be a socket, not a command"
    assert os.listdir(tmp_path) == []


# --- pipes and files that are open already ------------------------------------------------------------------------


async def test_a_guest_goes_through_a_pipe() -> None:
    async with started() as source, empty() as destination:
        reading, writing = os.pipe()
        await destination.execute("migrate-incoming", uri=f"fd:{reading}")
        await source.execute("migrate", uri=f"fd:{writing}")
        await arrived(source, destination)


async def test_a_pipe_whose_reader_has_gone_leaves_the_guest_where_it_is() -> None:
    async with started() as source:
        reading, writing = os.pipe()
        os.close(reading)
        await source.execute("migrate", uri=f"fd:{writing}")
        info = await outcome(source)
        assert info["status"] == "failed"
        assert info["error-desc"].startswith("Cannot write pipe:[")
        assert info["error-desc"].endswith("]: Broken pipe")
        await goes_on(source)


async def test_a_guest_goes_into_a_file_that_is_open_and_back_from_where_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"before")
    async with started() as source, empty() as destination:
        await source.execute("migrate", uri=f"fd:{os.open(path, os.O_WRONLY | os.O_APPEND)}")
        assert (await outcome(source))["status"] == "completed"
        assert path.read_bytes()[:6] == b"before"
        reading = os.open(path, os.O_RDONLY)
        os.lseek(reading, 6, os.SEEK_SET)
        await destination.execute("migrate-incoming", uri=f"fd:{reading}")
        await arrived(source, destination)


@pytest.mark.parametrize("kind", ["pipe", "file"])
async def test_a_descriptor_for_the_other_direction_is_refused_and_stays_the_sessions(
    kind: str, tmp_path: Path
) -> None:
    if kind == "pipe":
        reading, writing = os.pipe()
    else:
        writing = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
        reading = os.open(tmp_path / "file", os.O_RDONLY)
    found = "a pipe" if kind == "pipe" else "a regular file"
    client = Client(descriptors={"in": reading, "out": writing})
    async with started() as source, empty() as destination:
        with pytest.raises(DescriptorWrongKind) as caught:
            await execute(source, client, "migrate", uri="fd:in")
        wanted = "something to write to"
        assert str(caught.value) == f"Descriptor 'in' is {found} that was opened to be read, not {wanted}"
        with pytest.raises(DescriptorWrongKind) as caught:
            await execute(destination, client, "migrate-incoming", uri="fd:out")
        wanted = "something to read from"
        assert str(caught.value) == f"Descriptor 'out' is {found} that was opened to be written, not {wanted}"
    assert client.descriptors == {"in": reading, "out": writing}
    os.close(reading)
    os.close(writing)


async def test_a_source_does_not_connect_to_a_socket_that_listens(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "main"))
        listener.listen()
        async with started() as source:
            with pytest.raises(HostFileRefused, match=r"descriptor .*: it is a listening socket, not a connected one"):
                await source.execute("migrate", uri=f"fd:{os.dup(listener.fileno())}")
            await goes_on(source)


# --- sockets ------------------------------------------------------------------------------------------------------


async def test_a_listener_takes_the_first_port_of_a_range_that_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with started() as source, empty() as destination:
            last = min(port + 50, 65535)
            await destination.execute("migrate-incoming", uri=f"tcp:127.0.0.1:{port},to={last},keep-alive=on")
            found = int(await port_of(destination))
            assert port < found <= last
            await source.execute("migrate", uri=f"tcp:127.0.0.1:{found},keep-alive,keep-alive-idle=9")
            await arrived(source, destination)


def why_no_vsock() -> str:
    """Say why the kernel has no AF_VSOCK within this host; empty if it has."""
    try:
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener:
            listener.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
            listener.listen()
            with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as client:
                client.settimeout(0.1)
                client.connect((1, listener.getsockname()[1]))
    except OSError as error:
        return f"no vsock within this host: {error}"
    return ""


async def test_a_guest_goes_over_vsock() -> None:
    reason = why_no_vsock()
    if reason:
        pytest.skip(reason)
    async with started() as source, empty() as destination:
        await destination.execute("migrate-incoming", uri="vsock:1:4294967295")
        (address,) = (await destination.execute("query-migrate"))["socket-address"]
        assert address["type"] == "vsock"
        await source.execute("migrate", uri=f"vsock:1:{address['port']}")
        await arrived(source, destination)


async def test_a_vsock_port_is_bound_and_told() -> None:
    try:
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
    except OSError as error:
        pytest.skip(f"no vsock in this kernel: {error}")
    async with empty() as destination:
        await destination.execute("migrate-incoming", uri="vsock:4294967295:4294967295")
        (address,) = (await destination.execute("query-migrate"))["socket-address"]
        assert address["type"] == "vsock"
        assert address["port"].isdecimal()
        taken = f"vsock:4294967295:{address['port']}"
        async with empty() as other:
            with pytest.raises(HostFileRefused) as caught:
                await other.execute("migrate-incoming", uri=taken)
            assert str(caught.value) == f"Cannot listen on {taken}: Address already in use"
