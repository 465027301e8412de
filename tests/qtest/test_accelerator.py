"""A machine with accelerator qtest: everything but KVM."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from tests.phases.machine import DEFINITION, PATHS, bare
from tests.phases.update_kit import outcome
from tests.qtest.client import machine
from vmm.errors import StateRejected
from vmm.hw.irq import IrqLines
from vmm.hw.state import describe
from vmm.kvm.system import Kvm
from vmm.qtest.clock import VirtualClock
from vmm.qtest.state import QtestSection, QtestState

if TYPE_CHECKING:
    from pathlib import Path

    from vmm.qmp_client import QmpClient

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
def no_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make KVM impossible to open."""

    def refuse(path: str = "") -> Kvm:
        raise AssertionError(f"{path or '/dev/kvm'} was opened")

    monkeypatch.setattr(Kvm, "open", refuse)


def open_files() -> set[str]:
    """Return what this process has open."""
    names = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            names.add(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:  # the one that the listing itself used
            continue
    return names


async def build(client: QmpClient, cpus: int = 1) -> None:
    """Build a machine as far as devices."""
    await client.execute("machine-set", **DEFINITION, smp={"cpus": cpus})
    await client.execute("accel-set", accel="qtest")
    await client.execute("cpu-model-set")


@pytest.mark.usefixtures("no_kvm")
async def test_all_phases_are_passed_without_kvm(tmp_path: Path) -> None:
    async with bare(tmp_path) as (_, client):
        await build(client)
        await client.execute("finish-machine-init")
        info = await client.execute("query-machine-phase")
        assert (info["phase"], info["path"]) == PATHS["running"]
        assert not any("kvm" in name for name in open_files())


@pytest.mark.usefixtures("no_kvm")
async def test_vcpus_are_listed_and_no_thread_runs_them(tmp_path: Path) -> None:
    async with bare(tmp_path) as (_, client):
        await build(client, cpus=3)
        await client.execute("cont")
        found = await client.execute("query-cpus-fast")
        assert [(cpu["cpu-index"], cpu["thread-id"]) for cpu in found] == [(0, 0), (1, 0), (2, 0)]


@pytest.mark.usefixtures("no_kvm")
async def test_it_is_run_stopped_and_reset_as_any_machine(tmp_path: Path) -> None:
    async with bare(tmp_path) as (running, client):
        await build(client)
        await client.execute("cont")
        assert await client.execute("query-status") == {"running": True, "status": "running"}
        await client.execute("system_reset")
        assert await client.execute("query-status") == {"running": True, "status": "running"}
        await client.execute("stop")
        assert await client.execute("query-status") == {"running": False, "status": "paused"}
        await client.execute("cont")
        told = [name for name, _ in running.events() if name in ("STOP", "RESUME", "RESET")]
        assert told == ["RESUME", "RESET", "STOP", "RESUME"]
        await client.execute("quit")
        await running.ended.wait()
        assert running.status == 0


@pytest.mark.usefixtures("no_kvm")
async def test_the_clock_and_the_lines_go_into_a_file_and_come_out_of_it(tmp_path: Path) -> None:
    path = tmp_path / "copy"
    async with machine(tmp_path) as bench:
        await bench.qmp.execute("finish-machine-init")
        await bench.qtest.do("clock_step 5000000000")
        await bench.qtest.do("set_irq_in ioapic unnamed-gpio-in 9 1")
        events = [{"capability": "events", "state": True}]
        await bench.qmp.execute("migrate", uri=f"file:{path}", capabilities=events)
        assert (await outcome(bench.qmp))["status"] == "completed"
        await bench.qmp.execute("cont")
        await bench.qtest.do("clock_step 1000")
        await bench.qtest.do("set_irq_in ioapic unnamed-gpio-in 9 0")
        await bench.qmp.execute("loadvm", name=str(path))
        assert await bench.qtest.value("clock_step 0") == 5_000_000_000
        await bench.qtest.do("irq_intercept_in ioapic")
        await bench.qtest.do("set_irq_in ioapic unnamed-gpio-in 9 0")
        assert await bench.qtest.changes() == ["lower 9"]


@pytest.mark.parametrize(
    ("state", "fault"),
    [
        ({"epoch_ns": 0, "now_ns": -1, "high": 0}, "qtest.now_ns is -0x1, not an integer from 0x0 to"),
        ({"epoch_ns": 0, "now_ns": 0, "high": 1 << 24}, "qtest.high is 0x1000000, not an integer"),
        ({"epoch_ns": 0, "now_ns": 0}, "qtest.high is missing"),
    ],
)
def test_state_that_cannot_be_is_refused(state: dict[str, int], fault: str) -> None:
    section = QtestSection(VirtualClock(0), IrqLines())
    with pytest.raises(StateRejected) as caught:
        section.load(1, state)
    assert fault in str(caught.value)


def test_stored_state_of_every_version_is_read() -> None:
    clock, lines = VirtualClock(0), IrqLines()
    section = QtestSection(clock, lines)
    assert describe(QtestState) == STORED["fields"]
    section.load(1, STORED["busy"])()
    assert (clock.epoch_ns, clock.now_ns, lines.high()) == (1_700_000_000_000_000_000, 123_456_789, 1 << 23 | 1 << 4)
    assert section.save() == STORED["busy"]


STORED: dict[str, Any] = {
    "fields": {
        "epoch_ns": "an integer from -9223372036854775808 to 9223372036854775807",
        "now_ns": "an integer from 0x0 to 0x7fffffffffffffff",
        "high": "an integer from 0x0 to 0xffffff",
    },
    "busy": {"epoch_ns": 1_700_000_000_000_000_000, "now_ns": 123_456_789, "high": 1 << 23 | 1 << 4},
}
"""Version 1. Once released it never changes."""
