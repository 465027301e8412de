"""Who waits for whom among the threads of several channels."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from vmm.migration.crew import Aborted, JobQueues, PassGate

pytestmark = pytest.mark.usefixtures("no_leaks")


async def test_each_thread_has_its_jobs_in_order_and_all_are_waited_for() -> None:
    queues = JobQueues[int](2)
    done: list[list[int]] = [[], []]

    def work(thread: int) -> None:
        while (job := queues.take(thread)) is not None:
            done[thread].append(job)
            queues.done(thread)

    def fill() -> None:
        for job in range(100):
            queues.put(job % 2, job)
        queues.drain()
        assert done == [list(range(0, 100, 2)), list(range(1, 100, 2))]
        queues.end()

    async with trio.open_nursery() as nursery:
        for thread in range(2):
            nursery.start_soon(trio.to_thread.run_sync, work, thread)
        await trio.to_thread.run_sync(fill)
    assert queues.over
    queues.begin()
    assert not queues.over


@pytest.mark.parametrize("waits", ["put", "take", "drain"])
async def test_whoever_waits_is_woken_by_an_end_of_it_all(waits: str) -> None:
    queues = JobQueues[int](1)
    if waits != "take":
        queues.put(0, 1)
        queues.put(0, 2)

    def wait() -> None:
        with pytest.raises(Aborted):
            {"put": lambda: queues.put(0, 3), "take": lambda: queues.take(0), "drain": queues.drain}[waits]()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, wait)
        await trio.testing.wait_all_tasks_blocked()
        queues.abort()


async def test_no_channel_is_in_a_pass_before_all_have_ended_the_one_before() -> None:
    gate = PassGate(3)
    log: list[tuple[str, int]] = []

    def channel(thread: int) -> None:
        gate.ended(thread, 0)
        for number in range(1, 20):
            log.append(("page", number))
            gate.ended(thread, number)

    def stream() -> None:
        for number in range(1, 20):
            gate.begins(number)
            log.append(("begins", number))
        gate.release()

    async with trio.open_nursery() as nursery:
        for thread in range(3):
            nursery.start_soon(trio.to_thread.run_sync, channel, thread)
        nursery.start_soon(trio.to_thread.run_sync, stream)
    pages = [number for kind, number in log if kind == "page"]
    assert pages == sorted(pages)
    assert len(pages) == 19 * 3


@pytest.mark.parametrize("waits", ["ended", "begins"])
async def test_whoever_waits_at_the_gate_is_woken_too(waits: str) -> None:
    gate = PassGate(1)

    def wait() -> None:
        with pytest.raises(Aborted):
            gate.ended(0, 0) if waits == "ended" else gate.begins(2)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, wait)
        await trio.testing.wait_all_tasks_blocked()
        gate.abort()
