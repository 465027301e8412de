"""A chardev that is a pty: real ptys."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import trio
import trio.testing

from tests.backends.chardev_kit import Complaints, Frontend, Host, read_exactly, served
from vmm.backends.chardev_open import open_chardev
from vmm.backends.chardev_options import ChardevPtyWrapper
from vmm.backends.chardev_state import BUFFER_LIMIT

if TYPE_CHECKING:
    from vmm.backends.chardev import Chardev


def open_pty(complain: Complaints) -> Chardev:
    return open_chardev("serial0", ChardevPtyWrapper(), Host(), complain)


def open_slave(chardev: Chardev) -> trio.lowlevel.FdStream:
    assert chardev.pty is not None
    return trio.lowlevel.FdStream(os.open(chardev.pty, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK))


async def test_who_opens_the_slave_reads_output_and_writes_input(complain: Complaints, frontend: Frontend) -> None:
    async with served(open_pty(complain)) as chardev:
        chardev.attach(frontend)
        assert chardev.filename == f"pty:{chardev.pty}"
        async with open_slave(chardev) as slave:
            chardev.put(b"login:\r\n")
            assert await read_exactly(slave, 8) == b"login:\r\n"
            await slave.send_all(b"root\r")
            assert await frontend.wait_received(5) == b"root\r"
    assert complain.texts == []


async def test_output_is_dropped_while_the_slave_is_closed(complain: Complaints, frontend: Frontend) -> None:
    async with served(open_pty(complain)) as chardev:
        chardev.attach(frontend)
        for times in (1, 2, 3):
            while chardev.put(bytes(BUFFER_LIMIT)):
                pass
            await frontend.wait_drained(times)
        await trio.testing.wait_all_tasks_blocked(0.01)
        async with open_slave(chardev) as slave:
            chardev.put(b"now")
            assert await read_exactly(slave, 3) == b"now", "and nothing old before it"


async def test_a_slave_can_be_closed_and_opened_again(complain: Complaints, frontend: Frontend) -> None:
    async with served(open_pty(complain)) as chardev:
        chardev.attach(frontend)
        for count in range(1, 6):
            async with open_slave(chardev) as slave:
                await slave.send_all(b"typed")
                await frontend.wait_received(5 * count)
                chardev.put(b"printed")
                assert await read_exactly(slave, 7) == b"printed"
            await trio.testing.wait_all_tasks_blocked()


async def test_a_closed_slave_does_not_keep_the_loop_busy(complain: Complaints, frontend: Frontend) -> None:
    class Steps(trio.abc.Instrument):
        count = 0

        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            if task.name.endswith("serve"):
                Steps.count += 1

    async with served(open_pty(complain)) as chardev:
        chardev.attach(frontend)
        await open_slave(chardev).aclose()
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.add_instrument(Steps())
        for _ in range(100):
            await trio.testing.wait_all_tasks_blocked()
        assert Steps.count <= 2


async def test_a_slave_that_is_not_read_holds_the_guest_back_until_it_is(
    complain: Complaints, frontend: Frontend
) -> None:
    text = bytes(range(1, 255)) * 2000
    async with served(open_pty(complain)) as chardev:
        chardev.attach(frontend)
        async with open_slave(chardev) as slave, trio.open_nursery() as nursery:

            async def guest() -> None:
                left = text
                while left:
                    drained = frontend.times_drained
                    taken = chardev.put(left)
                    left = left[taken:]
                    if left:
                        await frontend.wait_drained(drained + 1)

            nursery.start_soon(guest)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert chardev.room() == 0
            assert await read_exactly(slave, len(text)) == text


async def test_a_guest_held_back_goes_on_when_the_slave_is_closed(complain: Complaints, frontend: Frontend) -> None:
    async with served(open_pty(complain)) as chardev:
        chardev.attach(frontend)
        async with open_slave(chardev):
            while chardev.room():
                chardev.put(bytes(BUFFER_LIMIT))
                await trio.testing.wait_all_tasks_blocked(0.01)
            drained = frontend.times_drained
        await frontend.wait_drained(drained + 1)
        assert chardev.room() > 0


async def test_input_is_read_no_faster_than_the_guest_takes_it(complain: Complaints, frontend: Frontend) -> None:
    text = b"0123456789abcdef" * 500
    frontend.space = 1
    async with served(open_pty(complain)) as chardev:
        chardev.attach(frontend)
        async with open_slave(chardev) as slave, trio.open_nursery() as nursery:
            nursery.start_soon(slave.send_all, text)
            for count in range(1, len(text) + 1):
                await frontend.wait_received(count)
                frontend.space = 1
                chardev.accept_input()
    assert bytes(frontend.received) == text


async def test_the_end_closes_the_pty(complain: Complaints) -> None:
    async with served(open_pty(complain)) as chardev:
        slave = open_slave(chardev)
        chardev.put(b"goodbye")
        assert await read_exactly(slave, 7) == b"goodbye"
    async with slave:
        assert await slave.receive_some(1) == b""
