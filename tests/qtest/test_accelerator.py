"""A machine with accelerator qtest: everything but KVM."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.phases.machine import DEFINITION, PATHS, bare, failure
from vmm.kvm.system import Kvm

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
async def test_it_does_not_move_to_another_process(tmp_path: Path) -> None:
    async with bare(tmp_path) as (_, client):
        await build(client)
        await client.execute("finish-machine-init")
        await client.execute("migrate-set-parameters", mode="cpr-transfer")
        channels = [
            {"channel-type": kind, "addr": {"transport": "socket", "type": "unix", "path": str(tmp_path / kind)}}
            for kind in ("main", "cpr")
        ]
        for command in ("migrate", "x-cpr-check"):
            assert await failure(client, command, channels=channels) == (
                f"{command}: a machine with accelerator qtest executes nothing that could go on elsewhere"
            )


async def test_it_is_not_copied_into_a_file(tmp_path: Path) -> None:
    async with bare(tmp_path) as (_, client):
        await build(client)
        await client.execute("finish-machine-init")
        assert await failure(client, "migrate", uri=f"file:{tmp_path}/copy") == (
            "migrate: a machine with accelerator qtest executes nothing that could go on elsewhere"
        )
