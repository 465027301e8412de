from __future__ import annotations

import os
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from vmm.hw.doorbell import make_doorbell
from vmm.hw.irq import IrqLines
from vmm.qtest.vm import QtestVm

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

pytestmark = pytest.mark.usefixtures("no_leaks")

Change = tuple[int, bool]


@asynccontextmanager
async def serving() -> AsyncGenerator[tuple[QtestVm, trio.MemoryReceiveChannel[Change]]]:
    """A virtual machine with its task, and the changes of its lines."""
    lines = IrqLines()
    send, receive = trio.open_memory_channel[Change](16)
    lines.observer = lambda gsi, level: send.send_nowait((gsi, level))
    vm = QtestVm(lines)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vm.serve)
            yield vm, receive
            nursery.cancel_scope.cancel()


async def test_a_written_irqfd_pulses_its_line() -> None:
    with closing(make_doorbell()) as bell:
        async with serving() as (vm, changes):
            vm.assign_irqfd(bell.fd, 7)
            os.eventfd_write(bell.fd, 1)
            assert [await changes.receive(), await changes.receive()] == [(7, True), (7, False)]


async def test_an_interrupt_counts_as_acknowledged_at_once() -> None:
    with closing(make_doorbell()) as bell, closing(make_doorbell()) as acknowledged:
        async with serving() as (vm, _):
            vm.assign_irqfd(bell.fd, 7, resample_fd=acknowledged.fd)
            os.eventfd_write(bell.fd, 1)
            await acknowledged.wait_rung()


async def test_an_irqfd_that_was_taken_away_drives_no_line() -> None:
    with closing(make_doorbell()) as gone, closing(make_doorbell()) as bell:
        async with serving() as (vm, changes):
            vm.assign_irqfd(gone.fd, 5)
            vm.deassign_irqfd(gone.fd, 5)
            vm.assign_irqfd(bell.fd, 7)
            os.eventfd_write(gone.fd, 1)
            os.eventfd_write(bell.fd, 1)
            assert await changes.receive() == (7, True)


async def test_an_ioeventfd_hears_stores_of_its_size_and_value_alone() -> None:
    with closing(make_doorbell()) as bell:
        async with serving() as (vm, _):
            vm.assign_ioeventfd(bell.fd, 0x1000, 4, value=2)
            heard = [
                vm.ring(0x1000, 4, 2, port=False),
                vm.ring(0x1000, 4, 3, port=False),
                vm.ring(0x1000, 2, 2, port=False),
                vm.ring(0x1004, 4, 2, port=False),
                vm.ring(0x1000, 4, 2, port=True),
            ]
            assert heard == [True, False, False, False, False]
            assert os.eventfd_read(bell.fd) == 1


async def test_an_ioeventfd_of_size_0_hears_any_store() -> None:
    with closing(make_doorbell()) as bell:
        async with serving() as (vm, _):
            vm.assign_ioeventfd(bell.fd, 0x60, 0, port=True)
            assert vm.ring(0x60, 1, 0xFF, port=True)
            assert vm.ring(0x60, 2, 0, port=True)
            vm.deassign_ioeventfd(bell.fd, 0x60, 0, port=True)
            assert not vm.ring(0x60, 1, 0xFF, port=True)


def test_an_observer_is_told_of_changes_and_the_controller_of_all() -> None:
    driven: list[Change] = []
    told: list[Change] = []
    lines = IrqLines(lambda gsi, level: driven.append((gsi, level)))
    lines.set(3, False)
    lines.observer = lambda gsi, level: told.append((gsi, level))
    lines.set(3, True)
    lines.set(3, True)
    assert lines.level(3)
    lines.set(3, False)
    assert driven == [(3, False), (3, True), (3, True), (3, False)]
    assert told == [(3, True), (3, False)]


async def test_what_is_written_while_irqfds_are_held_waits() -> None:
    with closing(make_doorbell()) as bell, closing(make_doorbell()) as late:
        async with serving() as (vm, changes):
            vm.assign_irqfd(bell.fd, 7)
            os.eventfd_write(bell.fd, 1)
            vm.hold_irqfds()
            vm.hold_irqfds()
            assert [changes.receive_nowait(), changes.receive_nowait()] == [(7, True), (7, False)]
            os.eventfd_write(bell.fd, 1)
            vm.assign_irqfd(late.fd, 5)
            vm.deassign_irqfd(late.fd, 5)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.WouldBlock):
                changes.receive_nowait()
            vm.release_irqfds()
            vm.release_irqfds()
            assert [await changes.receive(), await changes.receive()] == [(7, True), (7, False)]
