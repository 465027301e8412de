"""A machine inside a trio program."""

from __future__ import annotations

from typing import Any

import pytest
import trio

import vmm
from vmm.errors import RecipeInvalid, TokenNotGranted

OPTIONS = {"memory": {"size": 16 << 20}, "kernel": "builtin:heartbeat"}
MACHINE: dict[str, Any] = {"execute": "machine-set", "arguments": OPTIONS}
BUILT: list[dict[str, Any]] = [
    MACHINE,
    {"execute": "accel-set", "arguments": {"accel": "kvm"}},
    {"execute": "cpu-model-set", "arguments": {"model": "host"}},
    {"execute": "finish-machine-init"},
]

pytestmark = pytest.mark.usefixtures("no_leaks")


async def test_an_empty_recipe_waits_for_commands() -> None:
    async with vmm.machine() as m:
        assert m.phase == "no-machine"
        assert m.path == "boot/precreate"
        with pytest.raises(TokenNotGranted, match="'stop' needs may-run-vcpus"):
            await m.execute("stop")
        await m.execute("machine-set", memory={"size": 16 << 20})
        assert m.phase == "machine-created"


@pytest.mark.kvm
async def test_a_recipe_is_carried_out_before_the_block_begins() -> None:
    async with vmm.machine(BUILT) as m:
        assert m.phase == "machine-ready"
        assert await m.execute("query-status") == {"running": False, "status": "prelaunch"}
        assert [step.execute for step in m.recipe] == [request["execute"] for request in BUILT]


@pytest.mark.kvm
async def test_events_come_until_the_machine_has_ended() -> None:
    seen: list[str] = []
    async with vmm.machine(BUILT) as m, m.events() as events:
        await m.execute("cont")
        await m.execute("stop")
        await m.execute("quit")
        async for event in events:
            seen.append(event["event"])
    assert [name for name in seen if name in ("RESUME", "STOP", "SHUTDOWN")] == ["RESUME", "STOP", "SHUTDOWN"]


@pytest.mark.kvm
async def test_two_machines_live_in_one_process() -> None:
    async with vmm.machine(BUILT) as one, vmm.machine([{**MACHINE}]) as two:
        await one.execute("cont")
        assert (one.phase, two.phase) == ("machine-ready", "machine-created")
        await two.execute("quit")
        assert (await one.execute("query-status"))["status"] == "running"


@pytest.mark.kvm
async def test_a_cancel_from_outside_ends_the_machine() -> None:
    with trio.CancelScope() as scope:
        async with vmm.machine([*BUILT, {"execute": "cont"}]):
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught


async def test_a_recipe_that_fails_is_an_error_of_the_block() -> None:
    with pytest.RaisesGroup(
        pytest.RaisesExc(RecipeInvalid, match=r"command 1 \(machine-set\): memory.size: 5 is not"),
        flatten_subgroups=True,
    ):
        async with vmm.machine([{"execute": "machine-set", "arguments": {"memory": {"size": 5}}}]):
            pytest.fail("the machine was never built")


@pytest.mark.kvm
async def test_the_phase_is_that_of_the_last_command() -> None:
    async with vmm.machine() as m:
        seen = [m.phase]
        for command in ("machine-set", "accel-set", "cpu-model-set", "finish-machine-init"):
            await m.execute(command, **(OPTIONS if command == "machine-set" else {}))
            seen.append(m.phase)
    assert seen == ["no-machine", "machine-created", "accel-created", "machine-initialized", "machine-ready"]


@pytest.mark.kvm
async def test_a_device_is_plugged_and_unplugged_by_calls() -> None:
    async with vmm.machine(BUILT) as m, m.events() as events:
        await m.execute("device_add", driver="virtio-rng-device", id="rng0", max_bytes=1024)
        assert "device_add" in [step.execute for step in m.recipe]
        await m.execute("device_del", id="rng0")
        assert "device_add" not in [step.execute for step in m.recipe]
        await m.execute("quit")
        told = [event async for event in events if event["event"] == "DEVICE_DELETED"]
    assert [event["data"]["device"] for event in told] == ["rng0"]


@pytest.mark.kvm
async def test_a_machine_tells_its_own_events_and_no_other_s() -> None:
    async with vmm.machine(BUILT) as one, vmm.machine(BUILT) as two, one.events() as ones, two.events() as twos:
        await one.execute("cont")
        for m in (one, two):
            await m.execute("quit")
        names = [[event["event"] async for event in events] for events in (ones, twos)]
    assert ["RESUME" in seen for seen in names] == [True, False]
