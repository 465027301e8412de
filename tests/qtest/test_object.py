"""qtest as an object of a machine: who is lent what, when, and what becomes of its clients."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import pytest
import trio

from tests.phases.machine import bare, failure, sockets_in
from tests.qtest.client import PATIENCE, SIZE, QtestClient, before_machine, build, machine, qtest_object, unix
from vmm.capabilities import MayInject
from vmm.monitor.command import Need
from vmm.phases.chain import phases_granting
from vmm.recipe import Step

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("no_leaks")

REACHED = (
    "phases that grant it: devices (reached by cpu-model-set or x-exit-preconfig), "
    "running (reached by finish-machine-init or cont)"
)


# --- phases and tokens ---


async def test_it_answers_before_there_is_a_machine_and_says_what_is_missing(tmp_path: Path) -> None:
    async with before_machine(tmp_path) as bench:
        assert await bench.qtest.ask("inb 0x80") == (
            f"FAIL Command 'inb' needs may-inject, which phase boot/precreate does not grant; {REACHED}"
        )
        assert await bench.qtest.ask("endianness") == "OK little"


@pytest.mark.parametrize(
    "line",
    [
        *("inb 0", "inw 0", "inl 0", "outb 0 0", "outw 0 0", "outl 0 0", "readb 0", "readw 0", "readl 0", "readq 0"),
        *("writeb 0 0", "writew 0 0", "writel 0 0", "writeq 0 0", "read 0 1", "write 0 1 0x00", "b64read 0 1"),
        *("b64write 0 1 AA==", "memset 0 1 0", "clock_step", "clock_step 1", "clock_set 1", "irq_intercept_in ioapic"),
        *("irq_intercept_out rtc", "set_irq_in ioapic unnamed-gpio-in 1 1"),
    ],
)
async def test_no_command_reaches_a_machine_without_a_token(tmp_path: Path, line: str) -> None:
    async with before_machine(tmp_path) as bench:
        command = line.split()[0]
        assert (await bench.qtest.ask(line)).startswith(f"FAIL Command '{command}' needs may-inject, which phase")


async def test_one_client_goes_through_all_phases(tmp_path: Path) -> None:
    async with before_machine(tmp_path) as bench:
        answers = []
        for command, arguments in (
            ("machine-set", {"memory": {"size": SIZE}}),
            ("accel-set", {"accel": "qtest"}),
            ("cpu-model-set", {}),
            ("finish-machine-init", {}),
            ("cont", {}),
            ("stop", {}),
        ):
            answers.append((await bench.qtest.ask("writeb 0x1000 0x5a"))[:4])
            await bench.qmp.execute(command, **arguments)
        assert await bench.qtest.value("readb 0x1000") == 0x5A
        assert answers == ["FAIL", "FAIL", "FAIL", "OK", "OK", "OK"]


async def test_a_line_waits_until_the_recipe_that_the_machine_began_with_has_been_carried_out(tmp_path: Path) -> None:
    steps = (
        unix("qt", tmp_path / "qt"),
        qtest_object(),
        Step("machine-set", {"memory": {"size": SIZE}}),
        Step("accel-set", {"accel": "qtest"}),
        Step("cpu-model-set", {}),
        Step("finish-machine-init", {}),
    )
    async with bare(tmp_path, *steps) as (running, _):
        async with await QtestClient.connect(tmp_path / "qt") as client:
            assert await client.value("readb 0") == 0
        assert [name for name, data in running.events() if data.get("phase") == "running"]


async def test_the_tree_shows_the_token_where_it_is_granted(tmp_path: Path) -> None:
    async with machine(tmp_path) as bench:
        await bench.qmp.execute("finish-machine-init")
        granted = [data["phase"] for name, data in bench.running.events() if data.get("token") == "may-inject"]
        assert granted == ["devices", "devices", "running"]  # granted, revoked, granted


def test_the_token_is_withheld_while_a_guest_changes_hands() -> None:
    granting = phases_granting([Need("access", (MayInject,), None)])
    assert granting == ["devices", "running", "migrating", "postcopy"]


async def test_it_is_listed_with_the_monitors(tmp_path: Path) -> None:
    async with before_machine(tmp_path) as bench:
        await bench.qtest.do("endianness")
        assert {"id": "qtest0", "grant": "qtest", "clients": 1, "chardev": "qt"} in await bench.qmp.execute(
            "query-monitors"
        )


# --- the machine's clock ---


async def test_time_passes_by_clock_commands_alone(tmp_path: Path) -> None:
    async with machine(tmp_path) as bench:
        assert await bench.qtest.ask("clock_step 1000") == "OK 1000"
        assert await bench.qtest.ask("clock_step 0") == "OK 1000"
        assert await bench.qtest.ask("clock_set 5000") == "OK 5000"
        assert await bench.qtest.ask("clock_set 4999") == (
            "FAIL clock_set: 4999 is not possible: the clock is at 5000 ns, and goes on, never back, and to "
            "2**63 - 1 at most"
        )
        assert await bench.qtest.ask("clock_step") == (
            "FAIL clock_step to the next timer is not possible while no timer runs; say how many nanoseconds"
        )


# --- KVM ---


@pytest.mark.kvm
async def test_with_kvm_ports_and_memory_are_reached_and_the_clock_is_not(tmp_path: Path) -> None:
    async with machine(tmp_path, accel="kvm") as bench:
        client = bench.qtest
        await client.do("writel 0x2000 0xcafe")
        assert await client.do("readl 0x2000") == "0x000000000000cafe"
        await client.do("outb 0x80 0x21")
        assert await client.do("inb 0x80") == "0x0021"
        for command in ("clock_step", "clock_set"):
            assert await client.ask(f"{command} 1") == (
                f"FAIL {command} is not possible with accelerator kvm, whose time passes by itself; "
                "use accelerator qtest"
            )


@pytest.mark.kvm
async def test_with_kvm_interrupts_of_devices_are_told(tmp_path: Path) -> None:
    async with machine(tmp_path, accel="kvm") as bench:
        await bench.qtest.do("irq_intercept_in ioapic")
        await bench.qtest.do("set_irq_in ioapic unnamed-gpio-in 5 1")
        await bench.qtest.do("set_irq_in ioapic unnamed-gpio-in 5 0")
        assert await bench.qtest.changes() == ["raise 5", "lower 5"]


# --- making and ending it ---


async def test_a_machine_has_one(tmp_path: Path) -> None:
    async with before_machine(tmp_path) as bench:
        step = unix("qt2", tmp_path / "qt2")
        await bench.qmp.execute(step.execute, **step.arguments)
        wanted = {"qom-type": "qtest", "id": "other", "chardev": "qt2"}
        assert await failure(bench.qmp, "object-add", **wanted) == (
            "object-add of qtest 'other' is not possible while 'qtest0' is there; a machine has one; object-del ends it"
        )
        await bench.qmp.execute("object-del", id="qtest0")
        assert await bench.qtest.line() is None
        await bench.qmp.execute("object-add", **wanted)
        async with await QtestClient.connect(tmp_path / "qt2") as client:
            assert await client.ask("endianness") == "OK little"


async def test_it_needs_a_socket_of_its_own(tmp_path: Path) -> None:
    async with bare(tmp_path) as (_, qmp):
        await qmp.execute("chardev-add", id="n", backend={"type": "null", "data": {}})
        wanted = {"qom-type": "qtest", "id": "q"}
        assert await failure(qmp, "object-add", **wanted, chardev="n") == (
            "Monitor over a chardev of kind 'null' is not supported here; "
            "a monitor needs a chardev of kind socket or stdio"
        )
        assert await failure(qmp, "object-add", **wanted, chardev="mon0") == (
            "Chardev 'mon0' is in use by monitor qmp_mon0"
        )
        assert await failure(qmp, "object-add", **wanted, chardev="none") == (
            "Chardev 'none' does not exist; there are: mon0, n"
        )
        await qmp.execute("chardev-remove", id="n")  # Nothing has kept it.


async def test_it_connects_where_its_chardev_is_a_client(tmp_path: Path) -> None:
    """libqtest and QEMUQtestMachine listen."""
    path = tmp_path / "listening"
    with trio.socket.socket(trio.socket.AF_UNIX) as listener:
        await listener.bind(str(path))
        listener.listen()
        async with bare(tmp_path, unix("qt", path, server=False), qtest_object()) as (_, qmp):
            with trio.fail_after(PATIENCE):
                sock, _ = await listener.accept()
            async with QtestClient(trio.SocketStream(sock)) as client:
                await build(qmp)
                assert await client.ask("writeb 0x10 1") == "OK"
                await qmp.execute("quit")
                with trio.fail_after(PATIENCE):
                    assert await client.line() is None


async def test_a_second_client_finds_what_the_first_has_left(tmp_path: Path) -> None:
    async with machine(tmp_path) as bench:
        await bench.qtest.do("writeb 0x10 7")
        await bench.qtest.do("irq_intercept_in ioapic")
        await bench.qtest.stream.send_all(b"writeb 0x10 8")  # and no end of line
        await bench.qtest.stream.aclose()
        async with await QtestClient.connect(bench.path) as second:
            assert await second.value("readb 0x10") == 7
            await second.do("irq_intercept_in ioapic")


async def test_only_one_client_intercepts(tmp_path: Path) -> None:
    async with machine(tmp_path) as bench:
        await bench.qtest.do("irq_intercept_in ioapic")
        await bench.qtest.do("irq_intercept_in ioapic")
        assert await bench.qtest.ask("irq_intercept_out rtc") == (
            "FAIL Interception at 'rtc' is not possible once there is one at 'ioapic'; connect anew to choose another"
        )
        async with await QtestClient.connect(bench.path) as second:
            assert await second.ask("irq_intercept_in ioapic") == (
                "FAIL A second interception of interrupts is not possible while another client has one; end that"
            )


async def test_a_client_that_hangs_up_leaves_the_machine_alone(tmp_path: Path) -> None:
    async with machine(tmp_path) as bench:
        await bench.qtest.stream.aclose()
        await bench.qmp.execute("finish-machine-init")
        assert (await bench.qmp.execute("query-status"))["status"] == "prelaunch"


async def test_nothing_is_left_on_disk(tmp_path: Path) -> None:
    async with machine(tmp_path) as bench:
        await bench.qmp.execute("quit")
        await bench.running.ended.wait()
    assert sockets_in(tmp_path) == []


# --- the log ---


async def test_every_line_is_logged(tmp_path: Path) -> None:
    log = tmp_path / "log"
    async with before_machine(tmp_path, log=str(log)) as bench:
        await build(bench.qmp)
        await bench.qtest.do("irq_intercept_in ioapic")
        await bench.qtest.do("set_irq_in ioapic unnamed-gpio-in 5 1")
        assert (await bench.qtest.ask("nonsense")).startswith("FAIL")
        await bench.qtest.stream.aclose()
        await bench.qmp.execute("object-del", id="qtest0")
    found = [re.sub(r"\+\d+\.\d{6}", "+T", line) for line in log.read_text().splitlines()]
    assert found[:7] == [
        "[I +T] OPENED",
        "[R +T] irq_intercept_in ioapic",
        "[S +T] OK",
        "[R +T] set_irq_in ioapic unnamed-gpio-in 5 1",
        "[S +T] IRQ raise 5",
        "[S +T] OK",
        "[R +T] nonsense",
    ]
    assert found[-1] == "[I +T] CLOSED"


async def test_a_log_that_cannot_be_opened_is_an_error_of_object_add(tmp_path: Path) -> None:
    async with bare(tmp_path, unix("qt", tmp_path / "qt")) as (_, qmp):
        wanted = {"qom-type": "qtest", "id": "q", "chardev": "qt"}
        assert await failure(qmp, "object-add", **wanted, log=str(tmp_path / "none" / "log")) == (
            f"Cannot write {tmp_path}/none/log: No such file or directory"
        )
        await qmp.execute("object-add", **wanted, log="none")


async def test_a_log_that_takes_no_more_is_told_of_and_given_up(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async with machine(tmp_path) as bench:
        await bench.qtest.stream.aclose()
        await bench.qmp.execute("object-del", id="qtest0")
        await bench.qmp.execute("object-add", **qtest_object(log="/dev/full").arguments)
        async with await QtestClient.connect(bench.path) as client:
            assert await client.value("readb 0") == 0
            assert not [fd for fd in os.listdir("/proc/self/fd") if _leads_to(fd) == "/dev/full"]
    assert capfd.readouterr().err.count(
        "trio-vmm: qtest 'qtest0' cannot write its log: No space left on device; the rest is not logged\n"
    ) == 1  # fmt: skip


def _leads_to(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return ""
