"""Commands at the other end of a channel: what they get and give, how they end, and that nothing of them stays."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Literal

import pytest
import trio

from vmm.errors import HostFileRefused, MigrationCommandFailed, StreamCorrupt
from vmm.migration.address import SHELL, ExecAddress
from vmm.migration.command import start_command
from vmm.residents import Residents

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from vmm.migration.connection import Connection

pytestmark = pytest.mark.usefixtures("no_leaks")

WANTED = "; it must take or give the whole stream, and end with status 0"


@asynccontextmanager
async def command(
    script: str, direction: Literal["out", "in"], *, two_way: bool = False
) -> AsyncGenerator[Connection, None]:
    """Run a command as a migration does. The connection is closed, and the command has ended, afterwards."""
    async with trio.open_nursery() as nursery:
        connection = start_command(ExecAddress([*SHELL, script]), direction, two_way=two_way)
        connection.serve(Residents(nursery))
        try:
            yield connection
        finally:
            connection.close()
            connection.close()


async def read(connection: Connection, count: int) -> bytes:
    found = b""
    while len(found) < count:
        await trio.lowlevel.wait_readable(connection.fd)
        data = os.read(connection.fd, count - len(found))
        assert data
        found += data
    return found


async def test_a_command_gets_the_stream_and_its_end_on_standard_input(tmp_path: Path) -> None:
    async with command(f"cat > {tmp_path}/state; echo nobody reads this", "out") as connection:
        assert not connection.two_way
        assert connection.stream is None
        os.write(connection.fd, b"the stream")
        await connection.finish(sent=True)
        assert (tmp_path / "state").read_bytes() == b"the stream"


async def test_a_command_gives_the_stream_on_standard_output_and_what_follows_is_dropped() -> None:
    async with command("cat; echo the stream; echo and more", "in") as connection:
        assert await read(connection, 10) == b"the stream"
        await connection.finish(sent=False)


async def test_a_command_can_be_asked_and_answer(tmp_path: Path) -> None:
    async with command(f"cat; echo > {tmp_path}/ended", "out", two_way=True) as connection:
        assert connection.stream is not None
        await connection.stream.send_all(b"ask")
        assert await read(connection, 3) == b"ask"
        # All has been said: it ends by itself.
        connection.part()
    assert (tmp_path / "ended").exists()


@pytest.mark.parametrize(
    ("script", "how"),
    [("exit 3", "ended with status 3"), ("kill -9 $$", "was killed by signal 9 (Killed)")],
)
@pytest.mark.parametrize("direction", ["out", "in"])
async def test_a_command_that_does_not_end_well_is_named(
    script: str, how: str, direction: Literal["out", "in"]
) -> None:
    async with command(script, direction) as connection:
        with pytest.raises(MigrationCommandFailed) as caught:
            await connection.finish(sent=direction == "out")
        assert str(caught.value) == f"Migration command {script!r} {how}{WANTED}"


async def test_what_a_command_broke_is_told_as_its_doing() -> None:
    async with command("exit 0", "in") as connection:
        with pytest.raises(MigrationCommandFailed) as caught:
            async with connection.explained():
                raise StreamCorrupt(reason="it ends too early")
        assert str(caught.value) == f"Migration command 'exit 0' ended with status 0{WANTED}"


async def test_what_a_command_did_not_break_stays_what_it_was(autojump_clock: trio.abc.Clock) -> None:
    async with command("sleep 1000", "in") as connection:
        with pytest.raises(StreamCorrupt, match="it is none"):
            async with connection.explained():
                raise StreamCorrupt(reason="it is none")


def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(HostFileRefused) as caught:
        start_command(ExecAddress(["/nowhere/at all"]), "out", two_way=False)
    assert str(caught.value) == "Cannot start /nowhere/at all: No such file or directory"


async def test_a_migration_that_comes_to_nothing_kills_all_that_its_command_has_started(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    end = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        async with command(f"exec 4>{fifo}; sleep 1000 & echo started >&4; wait", "out"):
            while not await readable(end):
                pass
        # Nobody has the other end any more.
        while await readable(end):
            pass
    finally:
        os.close(end)


async def readable(end: int) -> bytes:
    await trio.lowlevel.wait_readable(end)
    return os.read(end, 100)


async def test_a_command_that_does_not_end_when_all_is_over_is_killed(autojump_clock: trio.abc.Clock) -> None:
    before = trio.current_time()
    async with command("sleep 1000", "out") as connection:
        connection.part()
    assert trio.current_time() >= before + 10


async def test_a_command_that_has_given_all_is_not_waited_for_long(autojump_clock: trio.abc.Clock) -> None:
    before = trio.current_time()
    async with command("echo all; sleep 1000", "in") as connection:
        await connection.finish(sent=False)
        assert trio.current_time() >= before + 10


async def test_the_end_of_the_machine_ends_the_command() -> None:
    async with trio.open_nursery() as nursery:
        residents = Residents(nursery)
        connection = start_command(ExecAddress([*SHELL, "sleep 1000"]), "out", two_way=False).serve(residents)
        connection.close()
        await residents.leave_all()


async def test_what_was_said_last_is_passed_on_though_the_machine_ends(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        residents = Residents(nursery)
        address = ExecAddress([*SHELL, f"cat > {tmp_path}/said"])
        connection = start_command(address, "out", two_way=True).serve(residents)
        assert connection.stream is not None
        await connection.stream.send_all(b"yours")
        connection.part()
        connection.close()
        await residents.leave_all()
    assert (tmp_path / "said").read_bytes() == b"yours"
