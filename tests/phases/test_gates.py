from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import attrs
import pytest
import trio

from vmm.kvm.exits import Stop
from vmm.phases.gates import Exits, GivenUp, StartingGates
from vmm.phases.vcpus import VcpuGang

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.kvm.exits import StopReason

pytestmark = pytest.mark.usefixtures("no_leaks")

PARTIES = 3


@attrs.define(eq=False)
class ThreadCpu:
    """A vCPU whose guest is a thread that waits to be kicked."""

    index: int
    thread_id: int = 0
    has_thread: bool = True
    guest_ran: bool = False
    ends: StopReason = "kicked"
    _kicked: threading.Event = attrs.Factory(threading.Event)

    async def run(
        self, threads: trio.CapacityLimiter, *, entered: Callable[[], object], left: Callable[[Stop], object]
    ) -> Stop:
        self._kicked.clear()
        stop = Stop(self.ends, "", {})

        def guest() -> None:
            entered()
            self.guest_ran = True
            self._kicked.wait()
            left(stop)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._kick_at_cancel)
            await trio.to_thread.run_sync(guest, limiter=threads)
            nursery.cancel_scope.cancel()
        return stop

    async def _kick_at_cancel(self) -> None:
        # A test that fails is not to wait for its threads for ever.
        try:
            await trio.sleep_forever()
        finally:
            self._kicked.set()

    def kick(self) -> None:
        self._kicked.set()

    def hold(self, seconds: float) -> None:
        raise AssertionError("nobody is throttled here")

    def let_go(self) -> None:
        raise AssertionError("nobody is throttled here")


KICKED = Stop("kicked", "", {})


def failed(_cpu: object, stop: Stop) -> None:
    raise AssertionError(stop)


def gang() -> tuple[VcpuGang, list[ThreadCpu]]:
    cpus = [ThreadCpu(index) for index in range(PARTIES)]
    return VcpuGang(cpus, failed), cpus


def is_running(vcpus: VcpuGang) -> bool:
    return vcpus.running


async def test_threads_wait_until_all_are_let_in() -> None:
    gates = StartingGates(PARTIES)
    moments: list[int] = []
    async with trio.open_nursery() as nursery:
        for _ in range(PARTIES):
            nursery.start_soon(trio.to_thread.run_sync, lambda: moments.append(gates.passed()))
        await gates.all_there()
        assert moments == []
        began = time.monotonic_ns()
        gates.open()
    assert gates.first_entry() == min(moments) >= began
    assert len(moments) == PARTIES


async def test_threads_that_are_sent_home_have_not_passed() -> None:
    gates = StartingGates(1)

    def pass_through() -> None:
        with pytest.raises(GivenUp):
            gates.passed()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, pass_through)
        await gates.all_there()
        gates.give_up()
    assert gates.first_entry() is None


async def test_a_gang_that_stands_by_has_entered_nothing_and_starts_at_once() -> None:
    vcpus, cpus = gang()
    async with trio.open_nursery() as nursery:
        await nursery.start(vcpus.serve)
        await vcpus.stand_by()
        assert not is_running(vcpus)
        assert not any(cpu.guest_ran for cpu in cpus)
        began = time.monotonic_ns()
        first = vcpus.start_now()
        assert is_running(vcpus)
        entered = await vcpus.entered()
        assert began <= entered <= time.monotonic_ns()
        # Of two that enter at once either may be told of as the first.
        assert first is None or began <= first <= time.monotonic_ns()
        await vcpus.stop()
        assert all(cpu.guest_ran for cpu in cpus)
        assert not is_running(vcpus)
        # And once more, as any other.
        vcpus.start_nowait()
        await vcpus.entered()
        await vcpus.stop()
        nursery.cancel_scope.cancel()


async def test_a_stop_calls_a_gang_off_that_stands_by() -> None:
    vcpus, cpus = gang()
    async with trio.open_nursery() as nursery:
        await nursery.start(vcpus.serve)
        await vcpus.stand_by()
        await vcpus.stop()
        assert not any(cpu.guest_ran for cpu in cpus)
        vcpus.start_nowait()
        await vcpus.entered()
        assert is_running(vcpus)
        await vcpus.stop()
        nursery.cancel_scope.cancel()


async def test_a_cancel_sends_a_gang_home_that_stands_by() -> None:
    vcpus, cpus = gang()
    async with trio.open_nursery() as nursery:
        await nursery.start(vcpus.serve)
        await vcpus.stand_by()
        nursery.cancel_scope.cancel()
    assert not any(cpu.guest_ran for cpu in cpus)


async def test_a_gang_is_halted_before_its_tasks_have_ended_and_starts_again_once_they_have() -> None:
    vcpus, _ = gang()
    async with trio.open_nursery() as nursery:
        await nursery.start(vcpus.serve)
        vcpus.start_nowait()
        await vcpus.entered()
        await vcpus.halt()
        await vcpus.stop()
        assert not is_running(vcpus)
        vcpus.start_nowait()
        await vcpus.entered()
        await vcpus.stop()
        nursery.cancel_scope.cancel()


async def test_a_gang_that_has_not_begun_is_halted_all_the_same() -> None:
    vcpus, cpus = gang()
    async with trio.open_nursery() as nursery:
        await nursery.start(vcpus.serve)
        await vcpus.halt()
        vcpus.start_nowait()  # and halted before the first turn of its tasks
        await vcpus.halt()
        assert not any(cpu.guest_ran for cpu in cpus)
        nursery.cancel_scope.cancel()


async def test_a_vcpu_that_fails_as_it_is_halted_is_heard_of_before() -> None:
    cpu = ThreadCpu(0, ends="internal-error")
    heard: list[Stop] = []
    vcpus = VcpuGang([cpu], lambda _, stop: heard.append(stop))
    async with trio.open_nursery() as nursery:
        await nursery.start(vcpus.serve)
        vcpus.start_nowait()
        await vcpus.entered()
        await vcpus.halt()
        assert [stop.reason for stop in heard] == ["internal-error"]
        nursery.cancel_scope.cancel()


def test_exits_are_seen_when_all_are_out_and_as_often_as_asked() -> None:
    exits = Exits(2)
    exits.note(KICKED)
    assert not exits.are_all_kicked()
    exits.note(KICKED)
    assert exits.are_all_kicked()
    assert exits.are_all_kicked()
