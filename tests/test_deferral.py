"""Commands that only wait are sent back, and begun anew, while it is not known which process has the guest."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.monitor.test_command import Session, bench
from vmm.decisions import Inbox
from vmm.deferral import Deferral
from vmm.errors import CommandDeferred, VmmError
from vmm.nursery_tree import Tree


async def test_what_waits_is_deferred_and_what_would_wait_is_too() -> None:
    deferral, lock = Deferral(), trio.Lock()
    outcomes: list[str] = []

    async def wait(name: str) -> None:
        try:
            await deferral.wait(lock.acquire)
        except CommandDeferred:
            outcomes.append(f"{name} deferred")
        else:
            outcomes.append(f"{name} acquired")
            lock.release()

    async with trio.open_nursery() as nursery:
        await lock.acquire()
        nursery.start_soon(wait, "first")
        await wait_all_tasks_blocked()
        deferral.begin()
        deferral.begin()
        await wait_all_tasks_blocked()
        assert lock.statistics().tasks_waiting == 0
        await wait("second")
        nursery.start_soon(deferral.over)
        deferral.end()
        await deferral.over()
        lock.release()
        await wait("third")
    assert outcomes == ["first deferred", "second deferred", "third acquired"]


async def test_who_has_its_turn_already_is_not_deferred() -> None:
    deferral, lock = Deferral(), trio.Lock()
    await lock.acquire()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(deferral.wait, lock.acquire)
        await wait_all_tasks_blocked()
        lock.release()  # to the one that waits
        deferral.begin()
    assert lock.locked()


async def test_a_decision_that_no_phase_has_taken_is_withdrawn_and_one_that_was_taken_is_awaited() -> None:
    tree, inbox = Tree(lambda name, data: None), Inbox[int]("running")
    failures: list[VmmError] = []

    async def outcome(value: int) -> None:
        try:
            await tree.outcome("loadvm", turns[value])
        except VmmError as error:
            failures.append(error)

    turns = [inbox.post(0), inbox.post(1)]
    assert (await inbox.take()).value == 0
    async with trio.open_nursery() as nursery:
        for value in (0, 1):
            nursery.start_soon(outcome, value)
        await wait_all_tasks_blocked()
        tree.deferral.begin()
        await wait_all_tasks_blocked()
        assert [turn.settled for turn in turns] == [False, True]
        turns[0].succeed()
    assert [type(error) for error in failures] == [CommandDeferred]


class Held(Session):
    """A session that begins deferred commands anew itself."""

    held = True


@pytest.mark.parametrize("held", [False, True])
async def test_a_caller_that_is_not_held_waits_and_has_its_command_begun_anew(held: bool) -> None:
    async with bench() as it:
        caller = Held() if held else Session()
        outcomes: list[object] = []

        async def change() -> None:
            try:
                outcomes.append(await it.run("change", caller, name="it"))
            except CommandDeferred:
                outcomes.append("deferred")

        it.boot.tree.deferral.begin()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(change)
            await wait_all_tasks_blocked()
            assert outcomes == (["deferred"] if held else [])
            it.boot.tree.deferral.end()
        assert len(outcomes) == 1
