"""A machine with accelerator qtest goes from one process to another, and its qtest with it. No KVM."""

from __future__ import annotations

import os
import socket
import struct
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.phases.update_kit import begin_update, outcome
from tests.qtest.client import PATIENCE, QtestClient, machine
from tests.qtest.test_virtio import AVAILABLE, BUFFER, DESCRIPTORS, QUEUE_NOTIFY, SLOT, USED, Driver
from tests.qtest.update import hand_over, here, successor
from vmm.errors import MigrationRefused, StateRejected, VmmError
from vmm.hw import board
from vmm.hw.doorbell import open_doorbell
from vmm.hw.virtio.rng import QuotaState
from vmm.monitor.unix import SocketMonitor
from vmm.phases.luggage import Luggage
from vmm.phases.machine import Machine
from vmm.phases.qtest import TrafficLog
from vmm.phases.qtest_clients import QtestClients
from vmm.phases.vcpus import VcpuGang

if TYPE_CHECKING:
    from pathlib import Path

    from tests.phases.machine import Running
    from vmm.qtest.session import QtestSession

pytestmark = pytest.mark.usefixtures("no_leaks")


async def test_clock_lines_and_registers_are_as_if_nothing_had_been(tmp_path: Path) -> None:
    async with machine(tmp_path) as bench:
        await bench.qmp.execute("cont")
        await bench.qtest.do("clock_step 1234567890123")
        await bench.qtest.do("outb 0x70 0x00")
        seconds = await bench.qtest.do("inb 0x71")
        await bench.qtest.do("outb 0x80 0x42")
        await bench.qtest.do("set_irq_in ioapic unnamed-gpio-in 9 1")
        async with successor(tmp_path / "new") as (_, client, where):
            await hand_over(bench.qmp, where)
            await here(client)
            assert await client.execute("query-status") == {"running": True, "status": "running"}
            async with await QtestClient.connect(bench.path) as qtest:
                assert await qtest.value("clock_step 0") == 1234567890123
                assert await qtest.do("inb 0x71") == seconds
                assert await qtest.value("inb 0x80") == 0x42
                await qtest.do("irq_intercept_in ioapic")
                await qtest.do("set_irq_in ioapic unnamed-gpio-in 9 1")
                assert await qtest.changes() == []
                await qtest.do("set_irq_in ioapic unnamed-gpio-in 9 0")
                assert await qtest.changes() == ["lower 9"]


async def test_a_client_keeps_its_connection_and_notices_nothing(tmp_path: Path) -> None:
    log = tmp_path / "log"
    async with machine(tmp_path, log=str(log)) as bench:
        await bench.qmp.execute("cont")
        client = bench.qtest
        await client.do("clock_step 1000")
        await client.do("irq_intercept_in ioapic")
        await client.stream.send_all(b"outb 0x80 0x1")
        async with successor(tmp_path / "new") as (_, other, where):
            await hand_over(bench.qmp, where)
            await client.stream.send_all(b"2\n")
            assert await client.reply() == "OK"
            assert await client.value("inb 0x80") == 0x12
            assert await client.value("clock_step 0") == 1000
            await client.do("set_irq_in ioapic unnamed-gpio-in 9 1")
            assert await client.changes() == ["raise 9"]
            assert (await client.ask("irq_intercept_out uart0")).startswith("FAIL Interception at 'uart0' is not")
            async with await QtestClient.connect(bench.path) as second:
                assert await second.value("inb 0x80") == 0x12
            await here(other)
            async with successor(tmp_path / "newer") as (_, third, where):
                await hand_over(other, where)
                assert await client.value("inb 0x80") == 0x12
                await client.do("set_irq_in ioapic unnamed-gpio-in 9 0")
                assert await client.changes() == ["lower 9"]
                await here(third)
    lines = (await trio.Path(log).read_text()).splitlines()
    said = [line.partition("] ")[2] for line in lines]
    times = [float(line[4:].partition("]")[0]) for line in lines]
    # The client and the second one have come and gone, once each, and the clock of the log went on.
    assert [said.count(word) for word in ("OPENED", "CLOSED", "outb 0x80 0x12")] == [2, 2, 1]
    assert times == sorted(times)


async def test_lines_that_are_under_way_are_carried_out_once_and_in_order(tmp_path: Path) -> None:
    async with machine(tmp_path) as bench:
        await bench.qmp.execute("cont")
        told: list[int] = []
        over = trio.Event()
        client = bench.qtest

        async def pump() -> None:
            count = 0
            while not over.is_set():
                await client.send(*["clock_step 1"] * 50)
                count += 50
            await client.send("endianness")

        async def read() -> None:
            while (answer := await client.reply()) != "OK little":
                told.append(int(answer.removeprefix("OK ")))

        async with successor(tmp_path / "new") as (_, other, where), trio.open_nursery() as nursery:
            nursery.start_soon(pump)
            nursery.start_soon(read)
            await hand_over(bench.qmp, where)
            await here(other)
            over.set()
        assert told == list(range(1, len(told) + 1))
        assert len(told) > 50


async def test_what_a_client_has_not_read_goes_along(tmp_path: Path) -> None:
    async with machine(tmp_path) as bench:
        await bench.qmp.execute("cont")
        client = bench.qtest
        # More than the socket holds.
        await client.send("irq_intercept_in ioapic", "memset 0x100000 0x80000 0x5a", "read 0x100000 0x80000")
        await client.send("set_irq_in ioapic unnamed-gpio-in 9 1", "inb 0x80")
        async with successor(tmp_path / "new") as (_, other, where):
            await hand_over(bench.qmp, where)
            await here(other)
            with trio.fail_after(PATIENCE):
                assert [await client.reply() for _ in range(2)] == ["OK", "OK"]
                assert await client.reply() == f"OK 0x{'5a' * 0x80000}"
                assert [await client.line() for _ in range(3)] == ["IRQ raise 9", "OK", "OK 0x0000"]


async def test_after_an_update_that_failed_a_client_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with machine(tmp_path) as bench:
        await bench.qmp.execute("cont")
        client = bench.qtest

        def refuse() -> object:
            raise MigrationRefused(reason="in the pause")

        monkeypatch.setattr(bench.running.host.stores, "changed_descriptors", refuse)
        with pytest.RaisesGroup(pytest.RaisesExc(VmmError, match="in the pause"), flatten_subgroups=True):
            async with successor(tmp_path / "new") as (_, _other, where):
                await begin_update(bench.qmp, where)
                await client.send(*["clock_step 1"] * 2000)
                await trio.sleep_forever()  # until the successor ends
        with trio.fail_after(PATIENCE):
            assert [await client.reply() for _ in range(2000)] == [f"OK {number}" for number in range(1, 2001)]
        assert (await outcome(bench.qmp))["status"] == "failed"
        async with await QtestClient.connect(bench.path) as second:
            assert await second.value("clock_step 1") == 2001


# --- what may not be ---


def clients(name: str = "q") -> QtestClients:
    log = TrafficLog(name, lambda _: None)
    return QtestClients(name, SocketMonitor(name, never, lambda _: None), never, log, held=True)


def never(*_: object) -> QtestSession:
    raise AssertionError


def section(*numbers: int) -> dict[str, Any]:
    session = {"unread": b"", "overlong": False, "unsent": [], "intercepted": None}
    return {"log_began": 0, "sessions": [{"number": number, "state": session} for number in numbers]}


@pytest.mark.parametrize(
    ("state", "fault"),
    [
        (section(1), "descriptor monitor/q/session-1 did not come"),
        (section(2), "Descriptor 'monitor/q/session-2' is a character device, not a stream socket"),
        (section(3, 3), "a session is there twice"),
        ({"log_began": 0}, "qtest-server/q.sessions is missing"),
        (
            {**section(3), "sessions": [{"number": 3, "state": {**section(3)["sessions"][0]["state"], "unread": 7}}]},
            "qtest-server/q.sessions[0].state.unread is 0x7, not 0 to 2162945 bytes",
        ),
    ],
)
def test_a_section_that_cannot_be_is_refused(state: dict[str, Any], fault: str) -> None:
    ours, theirs = socket.socketpair()
    with theirs, closing(Luggage()) as luggage:
        null = os.open("/dev/null", os.O_RDONLY)
        luggage.add({"monitor/q/session-2": null, "monitor/q/session-3": ours.detach()})
        with pytest.raises(StateRejected) as caught:
            clients().load(luggage, 1, state)
        assert fault in str(caught.value)


def test_clients_that_came_and_are_not_taken_up_are_let_go() -> None:
    ours, theirs = socket.socketpair()
    with theirs, closing(Luggage()) as luggage:
        luggage.add({"monitor/q/session-3": ours.detach()})
        with closing(clients()) as comers:
            comers.load(luggage, 1, section(3))()
        theirs.setblocking(False)
        assert theirs.recv(1) == b""


async def test_what_is_left_of_a_quota_of_random_bytes_goes_along(tmp_path: Path) -> None:
    def quota_of(running: Running) -> QuotaState:
        ((plugged),) = running.tree.view(Machine).slots._plugged.values()
        state = plugged.worker._quota.save()
        return QuotaState(left=state.left, ends_in=state.ends_in // 3600_000_000_000)

    async with machine(tmp_path) as bench:
        device = {"driver": "virtio-rng-device", "bus": f"virtio-mmio-bus.{SLOT}", "max-bytes": 10}
        await bench.qmp.execute("device_add", **device, period=7_200_000)
        await bench.qmp.execute("cont")
        driver = Driver(bench.qtest)
        await driver.start()
        await driver.request(4)
        with trio.fail_after(PATIENCE):
            while quota_of(bench.running).left != 6:
                await trio.lowlevel.checkpoint()
        async with successor(tmp_path / "new") as (running, other, where):
            await hand_over(bench.qmp, where)
            await here(other)
            assert quota_of(running) == QuotaState(left=6, ends_in=1)


# --- eventfds ---


async def test_a_doorbell_rung_before_in_and_after_the_pause_is_served_once_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with machine(tmp_path) as bench:
        await bench.qmp.execute("device_add", driver="virtio-rng-device", bus=f"virtio-mmio-bus.{SLOT}")
        await bench.qmp.execute("cont")
        driver = Driver(bench.qtest)
        await driver.start()
        stores, vm = bench.running.host.stores, bench.running.tree.view(Machine)
        changed = stores.changed_descriptors
        memory, doorbell = vm.memory, board.virtio_addresses(SLOT).start + QUEUE_NOTIFY

        def offer(number: int) -> None:
            """Put one more buffer into the queue, as the guest would."""
            memory.write(DESCRIPTORS + 16 * number, struct.pack("<QIHH", BUFFER + 0x1000 * number, 16, 2, 0))
            memory.write(AVAILABLE + 4 + 2 * number, number.to_bytes(2, "little"))
            memory.write(AVAILABLE + 2, (number + 1).to_bytes(2, "little"))

        def in_the_pause() -> tuple[dict[str, int], list[str]]:
            offer(1)
            assert vm.accelerator.ring(doorbell, 4, 0, port=False)
            return changed()

        gang = VcpuGang.halt

        async def halt(self: VcpuGang) -> None:
            offer(0)
            assert vm.accelerator.ring(doorbell, 4, 0, port=False)
            await gang(self)

        monkeypatch.setattr(VcpuGang, "halt", halt)
        monkeypatch.setattr(stores, "changed_descriptors", in_the_pause)
        async with successor(tmp_path / "new") as (running, other, where):
            await hand_over(bench.qmp, where)
            await here(other)
            offer(2)
            await bench.qtest.do(f"writel {doorbell:#x} 0")
            with trio.fail_after(PATIENCE):
                while int.from_bytes(memory.read(USED + 2, 2), "little") < 3:
                    await trio.lowlevel.checkpoint()
            await bench.qtest.do(f"writel {doorbell:#x} 0")
            assert await bench.qtest.value("inb 0x80") == 0
            ring = memory.read(USED + 2, 2 + 3 * 8)
            assert struct.unpack("<H6I", ring) == (3, 0, 16, 1, 16, 2, 16)
            assert running.tree.view(Machine).slots.devices[0].state.requests.next_used == 3


@pytest.mark.parametrize("level", [False, True])
async def test_an_irqfd_written_at_the_pause_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: bool
) -> None:
    async with machine(tmp_path) as bench:
        await bench.qmp.execute("cont")
        await bench.qtest.do("irq_intercept_in ioapic")
        vm = bench.running.tree.view(Machine).accelerator.vm
        with open_doorbell() as bell, open_doorbell() as acknowledged:
            resample = acknowledged.fd if level else None
            vm.assign_irqfd(bell.fd, 9, resample_fd=resample)
            gang = VcpuGang.halt

            async def halt(self: VcpuGang) -> None:
                await gang(self)
                os.eventfd_write(bell.fd, 1)  # the last thing before the quiet

            monkeypatch.setattr(VcpuGang, "halt", halt)
            async with successor(tmp_path / "new") as (running, other, where):
                await hand_over(bench.qmp, where)
                await here(other)
                assert await bench.qtest.changes() == ["raise 9", "lower 9"]
                if level:
                    await acknowledged.wait_rung()
                vm.deassign_irqfd(bell.fd, 9)
                new = running.tree.view(Machine).accelerator.vm
                new.assign_irqfd(bell.fd, 9, resample_fd=resample)
                os.eventfd_write(bell.fd, 1)
                assert [await bench.qtest.interrupt() for _ in range(2)] == ["raise 9", "lower 9"]
                assert await bench.qtest.changes() == []
                new.deassign_irqfd(bell.fd, 9)
