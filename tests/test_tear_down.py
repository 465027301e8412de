"""What was opened last is closed first, wherever a cancel comes from and whatever it interrupts.

trio delivers a cancel from outside to every task at once, so nesting alone does not give that order: see
`test_nesting_alone_gives_no_order`, which holds the check against nurseries without shielded residents.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import trio

from tests.trees import Log, basic, lending, out_of_order, settings, tree

if TYPE_CHECKING:
    from tests.trees import Settings
    from vmm.nursery_tree import Phase, Window

RUNS = 100
DEPTH = 5
PHASES = ("precreate", "accel", "backends", "devices", "running")


def faults_of(lines: list[str]) -> list[str]:
    """Phases and residents close in reverse, and so do phases and tokens; of one phase, tokens before residents."""
    faults = out_of_order(lines, ("open", "start"), ("leave", "end"))
    faults += out_of_order(lines, ("open", "granted"), ("leave", "revoked"))
    ended: set[str] = set()
    for line in lines:
        verb, _, name = line.partition(" ")
        if verb == "end":
            ended.add(name.split("#")[0])
        elif verb == "revoked" and name.split(" of ")[1] in ended:
            faults.append(f"{line}, after residents of its phase had ended")
    return faults


async def use(log: Log, turns: int) -> None:
    for _ in range(turns):
        await trio.lowlevel.checkpoint()


async def populate(phase: Phase, log: Log, choice: random.Random) -> None:
    for _ in range(choice.randrange(4)):
        name = f"{phase.path}#{len(phase.residents.names)}"
        if choice.random() < 0.3:
            phase.residents.start_soon(name, resident, log, name, 0, choice.randrange(3))
        else:
            await phase.residents.start(name, resident, log, name, choice.randrange(3), choice.randrange(3))
        log.note(f"start {name}")


async def resident(
    log: Log, name: str, before: int, after: int, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Takes a while before it has started, and to end. Cancelled together with its starter, it never was there."""
    try:
        for _ in range(before):
            await trio.lowlevel.checkpoint()
        task_status.started()
        await trio.sleep_forever()
    finally:
        with trio.CancelScope(shield=True):
            for _ in range(after):
                await trio.lowlevel.checkpoint()
        log.note(f"{'end' if f'start {name}' in log.lines else 'undone'} {name}")


async def chain(parent: Phase, log: Log, choice: random.Random, names: tuple[str, ...]) -> None:
    """Open phase after phase, each inside the one before, as the chain of a machine does."""
    if not names:
        await trio.sleep_forever()
    async with parent.child(names[0]) as phase:
        async with phase.window(settings()) as window, trio.open_nursery() as clients:
            await populate(phase, log, choice)
            for _ in range(choice.randrange(3)):
                clients.start_soon(call, window, log, choice.randrange(4))
        await populate(phase, log, choice)
        await chain(phase, log, choice, names[1:])


async def call(window: Window[Settings], log: Log, turns: int) -> None:
    await window.call(lending(), use, {"log": log, "turns": turns})


async def machine(log: Log, choice: random.Random) -> None:
    async with tree(log) as boot, boot.window(basic()):
        await populate(boot, log, choice)
        await chain(boot, log, choice, PHASES)


async def cancel_after(turns: int, scope: trio.CancelScope) -> None:
    for _ in range(turns):
        await trio.lowlevel.checkpoint()
    scope.cancel()


@pytest.mark.parametrize("seed", range(RUNS))
async def test_a_cancel_from_outside_closes_everything_in_reverse(seed: int) -> None:
    choice = random.Random(seed)
    log = Log()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(machine, log, choice)
        nursery.start_soon(cancel_after, choice.randrange(1, 80), nursery.cancel_scope)
    assert log.lines[0] == "open boot"
    assert log.lines[-1] == "leave boot"
    assert faults_of(log.lines) == []


def test_the_runs_are_cancelled_in_every_phase() -> None:
    """Else the test above would show less than it says."""
    reached: set[str] = set()
    for seed in range(RUNS):
        choice, log = random.Random(seed), Log()

        async def run(log: Log = log, choice: random.Random = choice) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(machine, log, choice)
                nursery.start_soon(cancel_after, choice.randrange(1, 80), nursery.cancel_scope)

        trio.run(run)
        reached.add(max((line for line in log.lines if line.startswith("open")), key=len))
    assert {line.rsplit("/", 1)[-1] for line in reached} >= set(PHASES)


@pytest.mark.parametrize("seed", range(RUNS))
async def test_a_crash_anywhere_closes_everything_in_reverse(seed: int) -> None:
    choice = random.Random(seed)
    log = Log()
    crashed_at = choice.randrange(1, 60)

    async def fragile() -> None:
        for _ in range(crashed_at):
            await trio.lowlevel.checkpoint()
        raise ZeroDivisionError

    async def run() -> None:
        async with tree(log) as boot, boot.window(basic()):
            await populate(boot, log, choice)
            boot.residents.start_soon("fragile", fragile)
            await chain(boot, log, choice, PHASES)

    with pytest.raises(BaseExceptionGroup) as caught:
        await run()
    assert caught.group_contains(ZeroDivisionError)
    assert faults_of(log.lines) == []


async def test_nesting_alone_gives_no_order() -> None:
    """The check finds what it is there to find: plain nested nurseries under a cancel from outside."""

    async def nest(log: Log, names: tuple[str, ...]) -> None:
        if not names:
            await trio.sleep_forever()
        async with trio.open_nursery() as nursery:
            await nursery.start(log.resident, names[0])
            await nest(log, names[1:])

    found = 0
    for _ in range(RUNS):
        log = Log()
        with trio.CancelScope() as outside:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(nest, log, PHASES)
                nursery.start_soon(cancel_after, 20, outside)
        found += bool(out_of_order(log.lines, ("start",), ("end",)))
    assert found > 0


def test_the_check_finds_each_kind_of_fault() -> None:
    good = [
        "open boot", "granted a of boot", "start boot#0", "open boot/x", "start boot/x#0",
        "end boot/x#0", "leave boot/x", "revoked a of boot", "end boot#0", "leave boot",
    ]  # fmt: skip
    assert faults_of(good) == []

    def swapped(one: str, other: str) -> list[str]:
        lines = list(good)
        i, j = lines.index(one), lines.index(other)
        lines[i], lines[j] = lines[j], lines[i]
        return faults_of(lines)

    assert swapped("end boot/x#0", "leave boot/x")
    assert swapped("leave boot/x", "end boot#0")
    assert swapped("leave boot/x", "revoked a of boot")
    assert swapped("revoked a of boot", "end boot#0")
    assert faults_of(good[:-1]) == ["boot was never closed", "boot was never closed"]
