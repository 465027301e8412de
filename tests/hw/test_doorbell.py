from __future__ import annotations

import os
import threading

import pytest
import trio

from vmm.hw.doorbell import Doorbell, open_doorbell


def is_readable(bell: Doorbell) -> bool:
    """Whether the eventfd counts anything; takes it."""
    try:
        os.eventfd_read(bell.fd)
    except BlockingIOError:
        return False
    return True


async def test_a_ring_before_the_wait_is_heard() -> None:
    with open_doorbell() as bell:
        bell.ring()
        await bell.wait_rung()


async def test_rings_coalesce_without_a_system_call() -> None:
    with open_doorbell() as bell:
        for _ in range(1000):
            bell.ring()
        assert os.eventfd_read(bell.fd) == 1


async def test_after_an_answer_the_bell_is_silent_until_the_next_ring(autojump_clock: trio.testing.MockClock) -> None:
    with open_doorbell() as bell:
        for _ in range(2):
            bell.ring()
            await bell.wait_rung()
            with trio.move_on_after(1) as waiting:
                await bell.wait_rung()
            assert waiting.cancelled_caught


async def test_a_cancelled_wait_loses_no_ring() -> None:
    with open_doorbell() as bell:
        bell.ring()
        with trio.CancelScope() as scope:
            scope.cancel()
            await bell.wait_rung()
        assert scope.cancelled_caught
        bell.ring()
        await bell.wait_rung()


async def test_the_kernel_can_ring_too() -> None:
    with open_doorbell() as bell:
        os.eventfd_write(bell.fd, 3)  # as an ioeventfd does
        await bell.wait_rung()
        bell.ring()
        await bell.wait_rung()
        assert not is_readable(bell)


async def test_no_ring_of_another_thread_is_lost() -> None:
    work, done, count = [0], 0, 20_000
    with open_doorbell() as bell:

        def produce() -> None:
            for number in range(1, count + 1):
                work[0] = number
                bell.ring()

        thread = threading.Thread(target=produce)
        thread.start()
        with trio.fail_after(60):
            while done < count:
                await bell.wait_rung()
                done = work[0]
        thread.join()


async def test_two_bells_play_ping_pong_with_a_thread() -> None:
    """Each side rings only when it has heard the other: one lost ring and this stands still."""
    rounds = 2_000
    heard = threading.Semaphore(0)
    with open_doorbell() as bell:

        def ring_when_heard() -> None:
            for _ in range(rounds):
                bell.ring()
                heard.acquire()

        thread = threading.Thread(target=ring_when_heard)
        thread.start()
        with trio.fail_after(60):
            for _ in range(rounds):
                await bell.wait_rung()
                heard.release()
        thread.join()


async def test_closing_ends_the_wait() -> None:
    async def listen(bell: Doorbell) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await bell.wait_rung()

    async with trio.open_nursery() as nursery:
        with open_doorbell() as bell:
            nursery.start_soon(listen, bell)
            await trio.testing.wait_all_tasks_blocked()


async def test_a_ring_after_the_end_is_nothing() -> None:
    with open_doorbell() as bell:
        pass
    bell.ring()


async def test_the_eventfd_is_not_inherited() -> None:
    with open_doorbell() as bell:
        assert not os.get_inheritable(bell.fd)
