from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from tests.trees import LEFT, lending, looked_up, nothing, over, refusal, reserved_for, settings, tree
from vmm.capabilities import (
    MaySetMigrationCap,
)
from vmm.decisions import Inbox, Turn
from vmm.errors import (
    CommandAborted,
    DrainTimeout,
    InvalidState,
    NameTaken,
)

# --- turns and inboxes ------------------------------------------------------------------------------------


async def test_a_turn_that_succeeds_gives_nothing() -> None:
    turn = Turn("go")
    turn.succeed()
    assert turn.value == "go"
    assert over(turn)
    assert not turn.failed
    assert await turn is None  # type: ignore[func-returns-value]


async def test_a_turn_that_fails_raises_for_each_who_waits() -> None:
    turn = Turn("go")
    seen: list[str] = []

    async def wait() -> None:
        with pytest.raises(NameTaken) as caught:
            await turn
        seen.append(str(caught.value))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert not over(turn)
        turn.fail(refusal())
    assert seen == ["Chardev 'serial0' exists already; choose another name"] * 2
    assert turn.failed


async def test_a_turn_is_settled_once() -> None:
    turn = Turn("go")
    turn.succeed()
    turn.fail(refusal())
    assert not turn.failed
    await turn
    other = Turn("go")
    other.fail(refusal())
    other.succeed()
    assert other.failed


async def test_who_asks_to_be_told_is_told_once_and_at_once_if_it_is_over() -> None:
    turn = Turn("go")
    told: list[str] = []
    turn.on_settled(lambda: told.append("before"))
    turn.succeed()
    turn.succeed()
    turn.on_settled(lambda: told.append("after"))
    assert told == ["before", "after"]


async def test_an_inbox_gives_decisions_in_their_order() -> None:
    inbox: Inbox[int] = Inbox("precreate")
    inbox.post(1)
    inbox.post(2, until="running")
    first, second = await inbox.take(), await inbox.take()
    assert (first.value, first.until) == (1, None)
    assert (second.value, second.until) == (2, "running")


async def test_taking_from_an_empty_inbox_waits() -> None:
    inbox: Inbox[int] = Inbox("precreate")
    taken: list[int] = []

    async def take() -> None:
        taken.append((await inbox.take()).value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        await trio.testing.wait_all_tasks_blocked()
        assert taken == []
        inbox.post(7)
    assert taken == [7]


async def test_a_closed_inbox_fails_what_it_has_and_what_comes() -> None:
    inbox: Inbox[int] = Inbox("precreate")
    early = inbox.post(1)
    inbox.close()
    late = inbox.post(2)
    for turn in (early, late):
        with pytest.raises(InvalidState) as caught:
            await turn
        assert str(caught.value) == LEFT.format("precreate")


async def test_a_taken_turn_is_not_the_inboxes_any_more() -> None:
    inbox: Inbox[int] = Inbox("precreate")
    inbox.post(1)
    turn = await inbox.take()
    inbox.close()
    assert not over(turn)


# --- decisions --------------------------------------------------------------------------------------------


async def test_a_decision_that_fails_is_answered_and_leaves_the_phase_as_it_was() -> None:
    def carry_out(value: str) -> str:
        if value == "bad":
            raise refusal()
        return value.upper()

    async with tree() as boot, boot.child("precreate") as phase, trio.open_nursery() as nursery:
        inbox: Inbox[str] = Inbox("precreate")
        results: list[str] = []

        async def body() -> None:
            async with phase.window(settings()):
                results.append(await phase.decided(inbox, carry_out))

        nursery.start_soon(body)
        for _ in range(2):
            with pytest.raises(NameTaken):
                await inbox.post("bad")
            assert phase.open_window is not None
            looked_up(phase, MaySetMigrationCap)
        turn = inbox.post("good")
        await trio.testing.wait_all_tasks_blocked()
        assert results == ["GOOD"]
        assert phase.open_window is None
        assert not over(turn), "it is answered where it leads to"
        with pytest.raises(InvalidState, match=LEFT.format("precreate")):
            await inbox.post("late")
        async with boot.child("next") as following, following.window(nothing):
            assert over(turn)
            await turn


async def test_a_decision_that_was_settled_before_its_turn_came_is_not_carried_out() -> None:
    async with tree() as boot, boot.child("preconfig") as phase:
        inbox: Inbox[str] = Inbox("preconfig")
        inbox.post("first").fail(refusal())
        second = Turn("second")
        inbox.post_turn(second)
        async with phase.window(nothing):
            assert await phase.decided(inbox, str) == "second"
        async with phase.child("next") as following, following.window(nothing):
            assert over(second)
            assert not second.failed


async def test_a_decision_is_answered_by_the_window_of_the_phase_that_it_names() -> None:
    async with tree() as boot, boot.child("accel") as phase:
        inbox: Inbox[str] = Inbox("accel")
        turn = inbox.post("kvm", until="preconfig")
        async with phase.window(nothing):
            await phase.decided(inbox, str)
        async with phase.child("backends") as backends:
            async with backends.window(nothing):
                assert not over(turn)
            async with backends.child("preconfig") as preconfig:
                assert not over(turn), "the phase is open, its window is not"
                async with preconfig.window(nothing):
                    assert over(turn)
                    assert not turn.failed


async def test_when_it_is_answered_the_next_command_is_admitted() -> None:
    async with tree() as boot, boot.child("precreate") as phase, trio.open_nursery() as nursery:
        inbox: Inbox[str] = Inbox("precreate")
        admitted: list[object] = []

        async def client() -> None:
            await inbox.post("machine")
            admitted.append(looked_up(boot, MaySetMigrationCap)[1].path)

        nursery.start_soon(client)
        async with phase.window(nothing):
            await phase.decided(inbox, str)
        async with phase.child("accel") as accel, accel.window(settings()):
            await trio.testing.wait_all_tasks_blocked()
    assert admitted == ["boot/precreate/accel"]


async def test_what_a_cancelled_phase_had_before_it_fails() -> None:
    async with tree() as boot:
        inbox: Inbox[str] = Inbox("precreate")
        with trio.CancelScope() as scope:
            async with boot.child("precreate") as phase:
                await boot.tree.drain(Turn("other"), "nowhere")  # a move that is never over
                taken, waiting = inbox.post("first"), inbox.post("second")
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(phase.decided, inbox, str)
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel()
        for turn in (taken, waiting):
            with pytest.raises(InvalidState, match=LEFT.format("precreate")):
                await turn


async def test_a_bug_in_a_decision_answers_it_and_goes_on_up() -> None:
    def bug(value: str) -> None:
        raise ZeroDivisionError

    async with tree() as boot, boot.child("precreate") as phase:
        inbox: Inbox[str] = Inbox("precreate")
        turn = inbox.post("x")
        with pytest.raises(ZeroDivisionError):
            await phase.decided(inbox, bug)
        assert turn.failed


async def test_at_the_end_of_the_machine_every_wait_for_it_is_over() -> None:
    async with tree() as boot, trio.open_nursery() as nursery:
        told: list[str] = []
        moving = Turn("moving", until="never")
        posted: Inbox[str] = Inbox("running")

        async def wait(command: str, turn: Turn[Any]) -> None:
            with pytest.raises(CommandAborted) as caught:
                await boot.tree.outcome(command, turn)
            told.append(str(caught.value))

        await boot.tree.drain(moving, "running")
        boot.tree.move(moving)
        nursery.start_soon(wait, "cont", moving)
        nursery.start_soon(wait, "migrate", posted.post("x"))
        await trio.testing.wait_all_tasks_blocked()
        boot.tree.settle()
        await boot.tree.drain(Turn("free"), "anywhere")
    assert sorted(told) == [
        "Command 'cont' was cut short because its phase ended",
        "Command 'migrate' was cut short because its phase ended",
    ]


async def test_what_ended_the_machine_is_told_to_who_wanted_to_get_there() -> None:
    async with tree() as boot, boot.child("precreate"):
        turn = Turn("x")
        boot.tree.move(turn)
        boot.tree.settle(refusal())
        with pytest.raises(NameTaken):
            await turn


# --- draining ---------------------------------------------------------------------------------------------


async def test_draining_waits_for_the_command_under_way() -> None:
    async with tree() as boot, trio.open_nursery() as nursery:
        held = lending("chardev-add", "qmp0/3")
        await boot.tree.pass_turnstile(held)
        turn = Turn("go")
        nursery.start_soon(boot.tree.drain, turn, "migrating")
        await trio.testing.wait_all_tasks_blocked()
        assert len(nursery.child_tasks) == 1
        boot.tree.leave_turnstile(held)
        await trio.testing.wait_all_tasks_blocked()
        assert len(nursery.child_tasks) == 0


async def test_draining_has_a_time_limit_and_names_the_holder(autojump_clock: trio.testing.MockClock) -> None:
    async with tree() as boot:
        held = lending("chardev-add", "qmp0/3")
        await boot.tree.pass_turnstile(held)
        before = trio.current_time()
        with pytest.raises(DrainTimeout) as caught:
            await boot.tree.drain(Turn("go"), "migrating")
        assert trio.current_time() - before == pytest.approx(10)
        assert str(caught.value) == (
            "Phase migrating could not open within 10 s: chardev-add of qmp0/3 is still in progress"
        )
        boot.tree.leave_turnstile(held)
        await boot.tree.drain(Turn("again"), "migrating")


async def test_a_move_that_is_under_way_is_named_too(autojump_clock: trio.testing.MockClock) -> None:
    async with tree() as boot:
        await boot.tree.drain(Turn("first"), "migrating")
        with pytest.raises(DrainTimeout) as caught:
            await boot.tree.drain(Turn("second"), "quiesced", within=0.5)
    assert str(caught.value) == (
        "Phase quiesced could not open within 0.5 s: a move of the machine is still in progress"
    )


async def test_a_decision_that_could_not_be_drained_leaves_the_phase_as_it_was(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with tree() as boot, boot.child("precreate") as phase, trio.open_nursery() as nursery:
        inbox: Inbox[str] = Inbox("precreate")
        held = lending("migrate-incoming", "qmp0/3")
        await boot.tree.pass_turnstile(held)
        nursery.start_soon(phase.decided, inbox, str)
        with pytest.raises(DrainTimeout) as caught:
            await inbox.post("first")
        boot.tree.leave_turnstile(held)
        turn = inbox.post("second")
        await trio.testing.wait_all_tasks_blocked()
        boot.tree.settle()
        assert over(turn)
    assert str(caught.value) == (
        "Phase after boot/precreate could not open within 10 s: migrate-incoming of qmp0/3 is still in progress"
    )


async def test_new_commands_are_held_off_until_the_move_is_over() -> None:
    async with tree() as boot, trio.open_nursery() as nursery:
        turn = Turn("go")
        await boot.tree.drain(turn, "next")
        nursery.start_soon(boot.tree.pass_turnstile, lending("late"))
        await trio.testing.wait_all_tasks_blocked()
        assert len(nursery.child_tasks) == 1
        turn.fail(refusal())
        await trio.testing.wait_all_tasks_blocked()
        assert len(nursery.child_tasks) == 0


async def test_at_the_end_nobody_passes_the_turnstile() -> None:
    async with tree() as boot, trio.open_nursery() as nursery:
        told: list[str] = []
        turn = Turn("go")
        await boot.tree.drain(turn, "next")
        boot.tree.move(turn)

        async def late(name: str) -> None:
            with pytest.raises(CommandAborted) as caught:
                await boot.tree.pass_turnstile(lending(name))
            told.append(str(caught.value))

        nursery.start_soon(late, "one")
        nursery.start_soon(late, "two")
        await trio.testing.wait_all_tasks_blocked()
        boot.tree.settle()
    assert sorted(told) == [f"Command '{name}' was cut short because its phase ended" for name in ("one", "two")]


# --- who goes first ---------------------------------------------------------------------------------------


async def test_others_wait_for_whoever_begins() -> None:
    async with tree() as boot, trio.open_nursery() as nursery:
        boot.tree.begin_with("the start recipe")
        await boot.tree.wait_begun("machine-set", "the start recipe")
        nursery.start_soon(boot.tree.wait_begun, "machine-set", "qmp0/1")
        await trio.testing.wait_all_tasks_blocked()
        assert len(nursery.child_tasks) == 1
        assert reserved_for(boot) == "the start recipe"
        boot.tree.begun()
        await trio.testing.wait_all_tasks_blocked()
        assert len(nursery.child_tasks) == 0
        assert reserved_for(boot) is None
        await boot.tree.wait_begun("machine-set", "qmp0/1")


async def test_others_are_told_if_it_never_began() -> None:
    async with tree() as boot, trio.open_nursery() as nursery:
        boot.tree.begin_with("the start recipe")
        told: list[str] = []

        async def other() -> None:
            with pytest.raises(CommandAborted) as caught:
                await boot.tree.wait_begun("machine-set", "qmp0/1")
            told.append(str(caught.value))

        nursery.start_soon(other)
        await trio.testing.wait_all_tasks_blocked()
        boot.tree.settle(refusal())
    assert told == ["Command 'machine-set' was cut short because its phase ended"]


async def test_between_two_windows_commands_wait_also_those_that_had_waited_for_one_before() -> None:
    async with tree() as boot, trio.open_nursery() as nursery:
        held = lending("chardev-add")
        await boot.tree.wait_held_off("cont")  # by nobody
        await boot.tree.pass_turnstile(held)
        nursery.start_soon(boot.tree.pass_turnstile, lending("stop"))
        await trio.testing.wait_all_tasks_blocked()
        boot.tree.hold_off(until="next")
        boot.tree.leave_turnstile(held)
        nursery.start_soon(boot.tree.wait_held_off, "cont")
        async with boot.child("other") as phase, phase.window(nothing):
            await trio.testing.wait_all_tasks_blocked()
            assert len(nursery.child_tasks) == 2
        async with boot.child("next") as phase, phase.window(nothing):
            await trio.testing.wait_all_tasks_blocked()
            assert len(nursery.child_tasks) == 0
            await boot.tree.wait_held_off("cont")


async def test_commands_that_wait_between_two_windows_are_told_of_the_end() -> None:
    async with tree() as boot, trio.open_nursery() as nursery:
        boot.tree.hold_off(until="next")

        async def late() -> None:
            with pytest.raises(CommandAborted):
                await boot.tree.wait_held_off("cont")
            with pytest.raises(CommandAborted):
                await boot.tree.pass_turnstile(lending("stop"))

        nursery.start_soon(late)
        await trio.testing.wait_all_tasks_blocked()
        boot.tree.settle()
