from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from tests.trees import Log, basic, refusal, tree
from vmm.errors import (
    NameTaken,
    leaves,
)
from vmm.residents import Residents


async def test_residents_outlive_the_window_and_end_last_started_first() -> None:
    log = Log()
    async with tree(log) as boot:
        async with boot.window(basic()):
            await boot.residents.start("one", log.resident, "one")
            boot.residents.start_soon("two", log.resident, "two")
            await boot.residents.start("three", log.resident, "three")
        assert boot.residents.names == ["one", "two", "three"]
        log.note("window closed")
    assert log.lines[-6:] == [
        "revoked may-query of boot",
        "window closed",
        "end three",
        "end two",
        "end one",
        "leave boot",
    ]


async def test_one_resident_can_leave_before_the_others() -> None:
    log = Log()
    async with tree(log) as boot:
        await boot.residents.start("one", log.resident, "one")
        two = await boot.residents.start("two", log.resident, "two")
        await boot.residents.start("three", log.resident, "three")
        await two.leave()
        assert log.lines[-1] == "end two"
        assert boot.residents.names == ["one", "three"]
        await two.leave()
    assert log.lines[-3:] == ["end three", "end one", "leave boot"]


async def test_a_resident_that_ends_by_itself_is_forgotten() -> None:
    async with tree() as boot:
        boot.residents.start_soon("short", trio.lowlevel.checkpoint)
        await trio.testing.wait_all_tasks_blocked()
        assert boot.residents.names == []


async def test_residents_that_are_left_may_start_others_which_are_left_too() -> None:
    log = Log()
    async with tree(log) as boot:

        async def hydra() -> None:
            try:
                await trio.sleep_forever()
            finally:
                boot.residents.start_soon("head", log.resident, "head")

        boot.residents.start_soon("hydra", hydra)
        await trio.testing.wait_all_tasks_blocked()
    assert log.lines[-3:] == ["start head", "end head", "leave boot"]


async def test_a_cancel_from_outside_reaches_residents_only_after_the_inner_phases() -> None:
    log = Log()
    with trio.CancelScope() as outside:
        async with tree(log) as boot:
            await boot.residents.start("monitor", log.resident, "monitor")
            async with boot.child("inner") as inner:
                await inner.residents.start("vcpus", log.resident, "vcpus")
                outside.cancel()
                await trio.sleep_forever()
    assert log.lines[-4:] == ["end vcpus", "leave boot/inner", "end monitor", "leave boot"]


async def test_a_resident_that_crashes_ends_the_inner_phases_first() -> None:
    log = Log()
    crash = trio.Event()

    async def fragile() -> None:
        await crash.wait()
        log.note("crash")
        raise ZeroDivisionError

    async def machine() -> None:
        async with tree(log) as boot:
            await boot.residents.start("monitor", log.resident, "monitor")
            boot.residents.start_soon("fragile", fragile)
            async with boot.child("inner") as inner:
                await inner.residents.start("vcpus", log.resident, "vcpus")
                crash.set()
                await trio.sleep_forever()

    with pytest.raises(BaseExceptionGroup) as caught:
        await machine()
    assert [type(error) for error in leaves(caught.value)] == [ZeroDivisionError]
    assert log.lines[-5:] == ["crash", "end vcpus", "leave boot/inner", "end monitor", "leave boot"]


async def test_an_expected_failure_of_a_resident_goes_up_past_the_phases() -> None:
    async def fail() -> None:
        raise refusal()

    log = Log()

    async def machine() -> None:
        async with tree(log) as boot, boot.child("inner") as inner:
            inner.residents.start_soon("refused", fail)
            await trio.sleep_forever()

    with pytest.raises(BaseExceptionGroup) as caught:
        await machine()
    assert [str(error) for error in leaves(caught.value)] == ["Chardev 'serial0' exists already; choose another name"]
    assert log.lines[-2:] == ["leave boot/inner", "leave boot"]


async def test_a_resident_that_fails_before_it_has_started_fails_its_starter_alone() -> None:
    async def refused(*, task_status: trio.TaskStatus[None]) -> None:
        await trio.lowlevel.checkpoint()
        raise refusal()

    async with tree() as boot:
        with pytest.raises(NameTaken):
            await boot.residents.start("refused", refused)
        assert boot.residents.names == []


async def test_a_starter_that_is_cancelled_takes_along_what_has_not_started() -> None:
    log = Log()

    async def slow(*, task_status: trio.TaskStatus[None]) -> None:
        try:
            await trio.sleep_forever()
        finally:
            log.note("undone")

    async with tree(log) as boot:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(boot.residents.start, "slow", slow)
                await trio.testing.wait_all_tasks_blocked()
                assert boot.residents.names == ["slow"]
                scope.cancel()
        assert log.lines[-1] == "undone"
        assert boot.residents.names == []


async def test_a_starter_that_is_cancelled_just_before_it_has_started_takes_it_along_too() -> None:
    """trio then leaves the task with its starter; shielded, it would keep the starter for ever."""
    log = Log()
    starter = trio.CancelScope()

    async def unlucky(*, task_status: trio.TaskStatus[None]) -> None:
        starter.cancel()
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            log.note("undone")

    with trio.fail_after(5):
        async with tree(log) as boot:
            with starter:
                await boot.residents.start("unlucky", unlucky)
            assert starter.cancelled_caught
            assert log.lines[-1] == "undone"
            assert boot.residents.names == []


async def test_what_has_started_is_beyond_its_starters_cancel() -> None:
    log = Log()
    async with tree(log) as boot:
        with trio.CancelScope() as starter:
            await boot.residents.start("lucky", log.resident, "lucky")
            starter.cancel()
            await trio.sleep_forever()
        await trio.testing.wait_all_tasks_blocked()
        assert boot.residents.names == ["lucky"]
        assert "end lucky" not in log.lines


async def test_started_may_be_called_by_a_task_of_the_resident() -> None:
    async with tree() as boot:

        async def with_helper(*, task_status: trio.TaskStatus[str]) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_call, task_status.started)
                await trio.sleep_forever()

        with trio.CancelScope() as starter:
            await boot.residents.start("helped", with_helper)
            starter.cancel()
            await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()
        assert boot.residents.names == ["helped"]


async def _call(fn: Any) -> None:
    fn()


def test_residents_have_names_even_before_any_came() -> None:
    async def main() -> list[str]:
        async with trio.open_nursery() as nursery:
            return Residents(nursery).names

    assert trio.run(main) == []
