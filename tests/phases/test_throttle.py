"""Keeping vCPUs out of the guest for a share of the time."""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, final

import attrs
import pytest
import trio
import trio.testing

from tests.kvm.tiny import TinyMachine
from vmm.kvm.vcpu import run_vcpu
from vmm.phases.throttle import Throttle
from vmm.qtest.cpu import IdleCpu

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.kvm.exits import Stop

HANGS = 30.0


@final
@attrs.define(eq=False)
class Held:
    """A vCPU that says how it is held."""

    index: int = 0
    thread_id: int = 0
    has_thread: bool = True
    times: list[tuple[float, float]] = attrs.Factory(list)  # when, for how long
    freed: int = 0

    async def run(
        self, threads: trio.CapacityLimiter, *, entered: Callable[[], object], left: Callable[[Stop], object]
    ) -> Stop:
        raise AssertionError("not here")

    def kick(self) -> None:
        raise AssertionError("not here")

    def hold(self, seconds: float) -> None:
        self.times.append((round(trio.current_time(), 6), round(seconds, 6)))

    def let_go(self) -> None:
        self.freed += 1


async def test_every_vcpu_is_held_again_and_again_for_its_share(autojump_clock: trio.testing.MockClock) -> None:
    vcpus = [Held(), Held()]
    throttle = Throttle(vcpus)
    throttle.set(75)
    await trio.testing.wait_all_tasks_blocked()
    begun = trio.current_time()
    with trio.move_on_after(0.1):
        await throttle.serve()
    assert throttle.percent == 0
    for vcpu in vcpus:
        assert [round(at - begun, 6) for at, _ in vcpu.times] == [0.0, 0.04, 0.08]
        assert {seconds for _, seconds in vcpu.times} == {0.03}
        assert vcpu.freed


async def test_a_new_share_counts_at_once_and_none_frees_all(autojump_clock: trio.testing.MockClock) -> None:
    vcpu = Held()
    throttle = Throttle([vcpu])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(throttle.serve)
        await trio.sleep(1)
        assert vcpu.times == []
        autojump_clock.autojump_threshold = math.inf  # while a thread is at work, no time passes
        await trio.to_thread.run_sync(throttle.set, 99)
        await trio.testing.wait_all_tasks_blocked()
        assert [seconds for _, seconds in vcpu.times] == [0.99]
        autojump_clock.autojump_threshold = 0
        throttle.set(50)
        await trio.sleep(0.03)
        assert [seconds for _, seconds in vcpu.times[1:3]] == [0.01, 0.01]
        freed, count = vcpu.freed, len(vcpu.times)
        throttle.end()
        assert (vcpu.freed, throttle.percent) == (freed + 1, 0)
        await trio.sleep(10)
        assert len(vcpu.times) == count
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("percent", "counts"), [(-5, 0), (0, 0), (99, 99), (100, 99)])
async def test_a_share_is_from_0_to_99(percent: int, counts: int) -> None:
    throttle = Throttle([])
    throttle.set(percent)
    assert throttle.percent == counts


async def test_vcpus_that_execute_nothing_can_be_throttled_too(autojump_clock: trio.testing.MockClock) -> None:
    throttle = Throttle([IdleCpu(0)])
    throttle.set(20)
    with trio.move_on_after(1):
        await throttle.serve()


SPIN = "l: inc dword [0x8000]\n jmp l"


@pytest.mark.kvm
@pytest.mark.usefixtures("no_leaks")
async def test_a_held_vcpu_does_not_run_and_is_out_at_once_when_it_is_kicked() -> None:
    with TinyMachine() as m:
        m.boot(SPIN)
        vcpu = m.vcpus[0]
        async with trio.open_nursery() as nursery:
            ended: list[str] = []

            async def run() -> None:
                ended.append((await run_vcpu(vcpu, trio.CapacityLimiter(1))).reason)

            nursery.start_soon(run)
            with trio.fail_after(HANGS):
                while not m.word(0x8000):  # noqa: ASYNC110 - a guest does not tell
                    await trio.sleep(0.001)
                vcpu.hold(3600)
                before = -1
                while before != m.word(0x8000):
                    before = m.word(0x8000)
                    await trio.sleep(0.01)
                vcpu.hold(3600)  # has no effect
                vcpu.let_go()
                while m.word(0x8000) == before:  # noqa: ASYNC110 - likewise
                    await trio.sleep(0.001)
                vcpu.hold(3600)
                vcpu.kick()
                while not ended:  # noqa: ASYNC110 - the task's end is what is waited for
                    await trio.sleep(0.001)
            assert ended == ["kicked"]
        # What is not inside cannot be held, and the next time begins afresh.
        vcpu.hold(3600)
        vcpu.let_go()
        before = m.word(0x8000)
        stopper = threading.Thread(target=stop_when_it_runs, args=(m, before))
        assert vcpu.enter(stopper.start).reason == "kicked"
        stopper.join()


def stop_when_it_runs(m: TinyMachine, before: int) -> None:
    """Kick once the guest has counted on."""
    while m.word(0x8000) == before:
        pass
    m.vcpus[0].kick()
