from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import attrs
import trio
import trio.testing

from tests.conformance.devices import Bench
from tests.hw.virtio.driver import BUFFERS, NEXT, WRITE, Driver
from vmm.errors import HostFileRefused
from vmm.hw.board import virtio_addresses
from vmm.hw.codec import StateCodec
from vmm.hw.doorbell import open_doorbell
from vmm.hw.virtio.mmio import NEEDS_RESET, VirtioMmio
from vmm.hw.virtio.rng import Quota, QuotaState, RngWorker, VirtioRng, VirtioRngState

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


@attrs.define(eq=False)
class Source:
    """Gives what it is told to give, and waits for more."""

    answers: list[bytes | HostFileRefused] = attrs.Factory(list)
    asked: list[int] = attrs.Factory(list)
    more: trio.Event = attrs.Factory(trio.Event)

    async def read(self, size: int) -> bytes:
        await trio.lowlevel.checkpoint()
        self.asked.append(size)
        while not self.answers:
            self.more = trio.Event()
            await self.more.wait()
        answer = self.answers.pop(0)
        if isinstance(answer, HostFileRefused):
            raise answer
        return answer[:size]

    def give(self, *answers: bytes | HostFileRefused) -> None:
        self.answers += answers
        self.more.set()


@attrs.define(eq=False)
class Rig:
    """A device with its task, and a driver that has started it."""

    bench: Bench
    device: VirtioMmio
    worker: RngWorker
    driver: Driver
    source: Source
    complaints: list[str]

    def kick(self) -> None:
        self.driver.write(0x50, 0)

    async def settle(self) -> None:
        await trio.testing.wait_all_tasks_blocked()


@asynccontextmanager
async def rig(quota: Quota | None = None) -> AsyncGenerator[Rig, None]:
    bench, source, complaints = Bench(), Source(), list[str]()
    with open_doorbell() as bell:
        device = VirtioMmio(
            name="virtio-mmio-bus.0",
            addresses=(virtio_addresses(0),),
            irq=bench.line,
            ram=bench.ram,
            function=VirtioRng(),
            kick=bell.ring,
            held=False,
        )
        worker = RngWorker(device, bell, source, quota or Quota(None, 1), complaints.append)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.serve)
            driver = Driver(device, bench.ram)
            driver.start()
            yield Rig(bench, device, worker, driver, source, complaints)
            nursery.cancel_scope.cancel()


async def test_each_request_gets_bytes_of_its_own_and_the_driver_an_interrupt() -> None:
    async with rig() as it:
        first, second = it.driver.request(0, 4), it.driver.request(1, 6)
        it.source.give(b"abcd", b"efghij")
        it.kick()
        await it.settle()
        assert it.source.asked == [4, 6]
        assert it.driver.used() == [(0, 4), (1, 6)]
        assert (it.bench.ram.read(first, 4), it.bench.ram.read(second, 6)) == (b"abcd", b"efghij")
        assert it.bench.line.is_up()


async def test_a_request_may_get_fewer_bytes_than_it_has_room_for() -> None:
    async with rig() as it:
        it.driver.request(0, 100)
        it.source.give(b"abc")
        it.kick()
        await it.settle()
        assert it.driver.used() == [(0, 3)]


async def test_a_huge_request_gets_a_page() -> None:
    async with rig() as it:
        it.driver.describe(0, 0x4000, 0x8000, WRITE)
        it.driver.offer(0)
        it.source.give(bytes(0x8000))
        it.kick()
        await it.settle()
        assert it.driver.used() == [(0, 4096)]


async def test_a_request_waits_in_its_queue_until_there_are_bytes() -> None:
    async with rig() as it:
        it.driver.request(0)
        it.kick()
        await it.settle()
        assert it.driver.used() == []
        assert it.device.state.requests.next_available == 0
        it.source.give(b"abc")
        await it.settle()
        assert it.driver.used() == [(0, 3)]


async def test_what_came_while_the_device_was_at_rest_is_answered_afterwards() -> None:
    async with rig() as it:
        it.driver.request(0)
        it.kick()
        await it.settle()
        it.worker.hold()
        it.bench.ram.writes.clear()
        it.source.give(b"abc", b"defg")
        it.driver.request(1)
        it.kick()
        await it.settle()
        assert it.bench.ram.writes == []
        assert it.source.answers == [b"abc", b"defg"], "nothing is read meanwhile"
        it.worker.go_on()
        await it.settle()
        assert it.driver.used() == [(0, 3), (1, 4)]


async def test_bytes_that_came_too_late_for_their_request_are_the_next_ones() -> None:
    async with rig() as it:
        it.driver.request(0)
        it.kick()
        await it.settle()
        it.driver.write(0x70, 0)
        it.source.give(b"abcdef")
        await it.settle()
        it.bench.ram.data[:] = bytes(len(it.bench.ram.data))
        it.driver.start()
        first, second = it.driver.request(0, 4), it.driver.request(1, 4)
        it.kick()
        await it.settle()
        assert it.driver.used() == [(0, 4), (1, 2)]
        assert (it.bench.ram.read(first, 4), it.bench.ram.read(second, 4)) == (b"abcd", b"ef\0\0")


async def test_a_reset_in_the_middle_of_a_request_ends_it() -> None:
    async with rig() as it:
        it.driver.request(0)
        it.kick()
        await it.settle()
        it.driver.write(0x70, 0)
        it.bench.ram.writes.clear()
        it.source.give(b"abc")
        await it.settle()
        assert it.bench.ram.writes == []


async def test_a_request_with_something_to_read_or_without_room_needs_a_reset() -> None:
    for flags, length in ((0, 16), (WRITE, 0)):
        async with rig() as it:
            it.driver.describe(0, BUFFERS, length, flags)
            it.driver.offer(0)
            it.kick()
            await it.settle()
            assert it.driver.status() & NEEDS_RESET
            assert it.device.fault == "a request for random bytes must have room for some, and nothing to read"
            assert it.source.asked == []


async def test_parts_are_filled_one_after_the_other() -> None:
    async with rig() as it:
        it.driver.describe(0, BUFFERS, 2, NEXT | WRITE, 1)
        it.driver.describe(1, BUFFERS + 0x10, 2, WRITE)
        it.driver.offer(0)
        it.source.give(b"abcd")
        it.kick()
        await it.settle()
        assert (it.bench.ram.read(BUFFERS, 3), it.bench.ram.read(BUFFERS + 0x10, 2)) == (b"ab\0", b"cd")


async def test_a_source_that_fails_is_told_once_and_tried_at_each_kick() -> None:
    async with rig() as it:
        it.driver.request(0)
        dry = HostFileRefused(action="read", path="/dev/dry", reason="Input/output error")
        text = "Cannot read /dev/dry: Input/output error; the guest's request waits"
        for _ in range(3):
            it.source.give(dry)
            it.kick()
            await it.settle()
            assert it.complaints == [text]
        it.source.give(b"abc")
        it.kick()
        await it.settle()
        assert it.driver.used() == [(0, 3)]
        it.driver.request(1)
        it.source.give(dry)
        it.kick()
        await it.settle()
        assert it.complaints == [text, text]


async def test_a_request_that_a_source_failed_is_answered_without_another_kick(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with rig() as it:
        it.driver.request(0)
        dry = HostFileRefused(action="read", path="/dev/dry", reason="Input/output error")
        it.source.give(dry, dry, dry, b"abc")
        it.kick()
        await trio.sleep(2.5)
        assert it.driver.used() == []
        assert len(it.source.asked) == 3, "once a second"
        await trio.sleep(1)
        assert it.driver.used() == [(0, 3)]
        assert it.complaints == ["Cannot read /dev/dry: Input/output error; the guest's request waits"]
        await trio.sleep(60)
        assert len(it.source.asked) == 4, "nothing is left to try"


async def test_a_request_that_a_source_failed_is_left_alone_while_the_device_is_at_rest(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with rig() as it:
        it.driver.request(0)
        it.source.give(HostFileRefused(action="read", path="/dev/dry", reason="Input/output error"))
        it.kick()
        await trio.sleep(0.5)
        it.worker.hold()
        it.source.give(b"abc")
        await trio.sleep(60)
        assert (it.driver.used(), len(it.source.asked)) == ([], 1)
        it.worker.go_on()
        await trio.sleep(0.5)
        assert it.driver.used() == [(0, 3)]


async def test_a_quota_holds_the_guest_back_until_the_period_is_over(autojump_clock: trio.testing.MockClock) -> None:
    async with rig(Quota(5, 10)) as it:
        for index in range(3):
            it.driver.request(index, 4)
        it.source.give(b"aaaa", b"bbbb", b"cccc", b"dddd")
        it.kick()
        await trio.sleep(9.9)
        assert it.driver.used() == [(0, 4), (1, 1)]
        await trio.sleep(0.2)
        assert it.driver.used() == [(0, 4), (1, 1), (2, 4)]


async def test_a_quota_is_whole_again_in_a_new_period(autojump_clock: trio.testing.MockClock) -> None:
    quota = Quota(5, 10)
    assert await quota.wait() == 5
    quota.spend(3)
    assert await quota.wait() == 2
    await trio.sleep(10)
    assert await quota.wait() == 5
    quota.spend(5)
    began = trio.current_time()
    assert await quota.wait() == 5
    assert trio.current_time() - began == 10


async def test_what_is_left_of_a_quota_goes_along(autojump_clock: object) -> None:
    before, after, smaller = Quota(5, 10), Quota(5, 10), Quota(2, 1)
    assert before.save() == QuotaState()
    before.spend(2)
    await trio.sleep(4)
    saved = before.save()
    assert saved == QuotaState(left=3, ends_in=6_000_000_000)
    after.load(saved)
    smaller.load(saved)
    assert (await after.wait(), await smaller.wait()) == (3, 2)
    after.spend(3)
    smaller.spend(2)
    begun = trio.current_time()
    assert (await smaller.wait(), round(trio.current_time() - begun, 6)) == (2, 1)
    assert (await after.wait(), round(trio.current_time() - begun, 6)) == (5, 6)


async def test_a_quota_that_knows_of_no_period_begins_with_a_whole_one(autojump_clock: object) -> None:
    quota, unlimited = Quota(5, 10), Quota(None, 10)
    quota.spend(5)
    quota.load(QuotaState())
    assert await quota.wait() == 5
    unlimited.load(QuotaState(left=0, ends_in=1))
    assert unlimited.save() == QuotaState()


def test_an_older_program_gets_a_state_without_the_quota() -> None:
    (downgrade,) = VirtioRngState.SCHEMA.downgrades
    fields = StateCodec.of(VirtioRngState).dump(VirtioRngState(quota=QuotaState(left=1, ends_in=2)))
    assert StateCodec.of(VirtioRngState).load(downgrade(fields), 1) == VirtioRngState()
