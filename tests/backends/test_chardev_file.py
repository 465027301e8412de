"""Chardevs without input."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from tests.backends.chardev_kit import Complaints, Frontend, Host, read_exactly, served
from vmm.backends.chardev_open import open_chardev
from vmm.backends.chardev_options import ChardevFile, ChardevFileWrapper, ChardevNullWrapper
from vmm.errors import BackendInUse, HostFileRefused

if TYPE_CHECKING:
    from pathlib import Path

    from vmm.backends.chardev import Chardev


def open_file(path: str, complain: Complaints, *, append: bool = False) -> Chardev:
    return open_chardev("serial0", ChardevFileWrapper(ChardevFile(path, append)), Host(), complain)


async def test_null_takes_all_and_keeps_nothing(complain: Complaints) -> None:
    async with served(open_chardev("null0", ChardevNullWrapper(), Host(), complain)) as chardev:
        assert chardev.put(bytes(1 << 20)) == 1 << 20
        assert chardev.room() > 0
        assert (chardev.label, chardev.filename, chardev.pty, chardev.descriptors()) == ("null0", "null", None, {})


async def test_output_is_in_the_file_once_the_chardev_has_ended(tmp_path: Path, complain: Complaints) -> None:
    async with served(open_file(f"{tmp_path}/log", complain)) as chardev:
        assert chardev.filename == "file"
        assert chardev.put(b"Linux version") == 13
    assert (tmp_path / "log").read_bytes() == b"Linux version"
    assert complain.texts == []
    assert chardev.put(b"too late") == 8, "a guest is not kept waiting for a chardev that has ended"


async def test_append_keeps_what_was_there(tmp_path: Path, complain: Complaints) -> None:
    for word in (b"one ", b"two"):
        async with served(open_file(f"{tmp_path}/log", complain, append=True)) as chardev:
            chardev.put(word)
    assert (tmp_path / "log").read_bytes() == b"one two"


async def test_output_of_a_thread_arrives_in_order(tmp_path: Path, complain: Complaints) -> None:
    lines = [b"%06d\n" % number for number in range(20_000)]

    def vcpu(chardev: Chardev) -> None:
        for line in lines:
            while line:
                line = line[chardev.put(line) :]

    async with served(open_file(f"{tmp_path}/log", complain)) as chardev:
        await trio.to_thread.run_sync(vcpu, chardev)
    assert (tmp_path / "log").read_bytes() == b"".join(lines)


async def test_a_full_disk_is_complained_of_once_and_costs_the_output_only(
    complain: Complaints, frontend: Frontend
) -> None:
    async with served(open_file("/dev/full", complain)) as chardev:
        chardev.attach(frontend)
        for times in range(1, 4):
            while chardev.put(bytes(4096)):
                pass
            await frontend.wait_drained(times)
        assert complain.texts == [
            "Chardev 'serial0' cannot write /dev/full: No space left on device; its output is dropped"
        ]


async def test_a_pipe_that_is_full_holds_the_guest_back(
    tmp_path: Path, complain: Complaints, frontend: Frontend
) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    async with trio.lowlevel.FdStream(reader) as stream, served(open_file(f"{tmp_path}/pipe", complain)) as chardev:
        chardev.attach(frontend)
        sent = 0
        while taken := chardev.put(bytes(4096)):
            sent += taken
            await trio.testing.wait_all_tasks_blocked()
        assert await read_exactly(stream, sent) == bytes(sent)
        await frontend.wait_drained()
        assert chardev.room() > 0


async def test_a_file_that_cannot_be_opened_leaves_nothing_open(tmp_path: Path, complain: Complaints) -> None:
    with pytest.raises(HostFileRefused) as caught:
        open_file(f"{tmp_path}/none/log", complain)
    assert str(caught.value) == f"Cannot write {tmp_path}/none/log: No such file or directory"


async def test_a_chardev_that_is_never_served_is_closed(tmp_path: Path, complain: Complaints) -> None:
    chardev = open_file(f"{tmp_path}/log", complain)
    chardev.put(b"said")
    chardev.close()
    chardev.close()
    assert (tmp_path / "log").read_bytes() == b"said"


async def test_one_device_at_a_time(complain: Complaints, frontend: Frontend) -> None:
    async with served(open_chardev("null0", ChardevNullWrapper(), Host(), complain)) as chardev:
        states = [chardev.frontend_open]
        chardev.attach(frontend)
        states.append(chardev.frontend_open)
        with pytest.raises(BackendInUse) as caught:
            chardev.attach(frontend)
        assert str(caught.value) == "Chardev 'null0' is in use by another device"
        chardev.detach()
        states.append(chardev.frontend_open)
        assert states == [False, True, False]
        chardev.attach(frontend)


async def test_a_thread_may_put_while_the_chardev_ends(tmp_path: Path, complain: Complaints) -> None:
    over = threading.Event()
    started = threading.Event()

    def vcpu(chardev: Chardev) -> None:
        while not over.is_set():
            chardev.put(b"x")
            chardev.accept_input()
            started.set()

    chardev = open_file(f"{tmp_path}/log", complain)
    thread = threading.Thread(target=vcpu, args=(chardev,))
    async with served(chardev):
        thread.start()
        await trio.to_thread.run_sync(started.wait)
    over.set()
    thread.join()
