"""A chardev on named pipes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from tests.backends.chardev_kit import Complaints, Frontend, Host, named_pipe, read_exactly, served
from vmm import terminals
from vmm.backends.chardev_open import open_chardev
from vmm.backends.chardev_options import ChardevHostdev, ChardevPipeWrapper
from vmm.errors import HostFileRefused

if TYPE_CHECKING:
    from vmm.backends.chardev import Chardev


def made(path: str, complain: Complaints) -> Chardev:
    return open_chardev("serial0", ChardevPipeWrapper(ChardevHostdev(path)), Host(), complain)


@pytest.fixture
def pipes(path: str) -> str:
    for end in ("in", "out"):
        os.close(named_pipe(f"{path}.{end}"))
    return path


async def test_who_reads_and_who_writes_may_come_and_go(pipes: str, complain: Complaints, frontend: Frontend) -> None:
    async with served(made(pipes, complain)) as chardev:
        chardev.attach(frontend)
        assert chardev.filename == "pipe"
        chardev.put(b"nobody reads yet; ")
        await trio.testing.wait_all_tasks_blocked()
        for number in range(3):
            Path(f"{pipes}.in").write_bytes(b"%d" % number)  # noqa: ASYNC240 - which opens, writes and closes
            assert await frontend.wait_received(number + 1) == b"012"[: number + 1]
        async with trio.lowlevel.FdStream(os.open(f"{pipes}.out", os.O_RDONLY)) as reader:
            assert await read_exactly(reader, 18) == b"nobody reads yet; "
        chardev.put(b"read later")
        await trio.testing.wait_all_tasks_blocked()
        async with trio.lowlevel.FdStream(os.open(f"{pipes}.out", os.O_RDONLY)) as reader:
            assert await read_exactly(reader, 10) == b"read later"
    assert complain.texts == []


async def test_a_pipe_that_is_full_holds_the_guest(pipes: str, complain: Complaints, frontend: Frontend) -> None:
    async with served(made(pipes, complain)) as chardev:
        chardev.attach(frontend)
        sent = bytearray()
        while chardev.room():
            chunk = os.urandom(8192)
            sent += chunk[: chardev.put(chunk)]
            await trio.testing.wait_all_tasks_blocked(0.01)
        drained = frontend.times_drained
        async with trio.lowlevel.FdStream(os.open(f"{pipes}.out", os.O_RDONLY | os.O_NONBLOCK)) as reader:
            assert await read_exactly(reader, len(sent)) == sent
            await frontend.wait_drained(drained + 1)


async def test_without_pipes_the_path_is_opened_for_both(complain: Complaints, frontend: Frontend) -> None:
    master, slave = terminals.open_pty()
    async with trio.lowlevel.FdStream(master) as other_end, served(made(slave, complain)) as chardev:
        chardev.attach(frontend)
        chardev.put(b"ping")
        assert await read_exactly(other_end, 4) == b"ping"
        await other_end.send_all(b"pong")
        assert await frontend.wait_received(4) == b"pong"


def test_what_is_no_pipe_is_refused_by_name(path: str, complain: Complaints) -> None:
    def refusal() -> str:
        with pytest.raises(HostFileRefused) as caught:
            made(path, complain)
        return str(caught.value)

    assert refusal() == (f"Cannot open {path}: No such file or directory, nor are there pipes {path}.in and {path}.out")
    os.close(named_pipe(f"{path}.in"))
    assert "nor are there pipes" in refusal(), "one is not enough"
    Path(path).touch()
    assert refusal() == f"Cannot open {path}: it is a regular file, not a pipe or a character device"
    Path(f"{path}.out").touch()
    assert refusal() == f"Cannot open {path}.out: it is a regular file, not a pipe"
    os.unlink(f"{path}.in")
    os.mkdir(f"{path}.in")
    assert refusal() == f"Cannot open {path}.in: Is a directory"
