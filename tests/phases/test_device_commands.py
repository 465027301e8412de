"""`device_add`, `device_del` and `device-list-properties`, in every phase that admits them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

import vmm
from tests.leaks import Held
from tests.phases.test_objects import BUILTIN, RANDOM, advance, refusal
from vmm.errors import DeviceNotFound, VmmError
from vmm.phases.machine import Machine

if TYPE_CHECKING:
    from vmm.embedding import EmbeddedMachine

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

RNG: Final = "virtio-rng-device"
FIRST: Final = {"driver": RNG, "id": "device0", "bus": "virtio-mmio-bus.0", "period": 65536}
PHASES: Final = ("preconfig", "devices", "running")

phases = pytest.mark.parametrize("phase", PHASES)


def devices(machine: EmbeddedMachine) -> list[dict[str, Any]]:
    return [dict(step.arguments) for step in machine.recipe if step.execute == "device_add"]


async def tasks(machine: EmbeddedMachine) -> list[str]:
    """Names of the tasks of devices, oldest first."""
    found: list[str] = []

    def look(phase: dict[str, Any]) -> None:
        found.extend(name for name in phase["tasks"] if name.startswith("device "))
        for child in phase["children"]:
            look(child)

    look(await machine.execute("query-nursery-tree"))
    return found


def device_id(machine: EmbeddedMachine, slot: int) -> int:
    """What the guest reads as DeviceID in a slot; the other two registers are as they must be."""
    board = machine._host.tree.view(Machine)
    bus = board.slots._wiring.mmio
    base = 0xFEB0_0000 + 0x200 * slot
    assert (bus.read(base, 4), bus.read(base + 4, 4)) == (0x7472_6976, 2)
    return bus.read(base + 8, 4)


@phases
async def test_a_device_is_plugged_in_with_all_that_was_left_open(phase: str) -> None:
    async with vmm.machine() as machine:
        await advance(machine, phase)
        assert await machine.execute("device_add", driver=RNG) == {}
        assert devices(machine) == [FIRST]
        for here in PHASES[PHASES.index(phase) :]:
            if here != "running":
                await machine.execute({"preconfig": "cpu-model-set", "devices": "finish-machine-init"}[here])
        assert await tasks(machine) == ["device device0"]
        assert [device_id(machine, slot) for slot in range(8)] == [4, 0, 0, 0, 0, 0, 0, 0]
        assert devices(machine) == [FIRST]


@phases
async def test_a_device_is_taken_off(phase: str) -> None:
    async with vmm.machine() as machine, machine.events() as events:
        await advance(machine, phase)
        await machine.execute("object-add", **BUILTIN)
        await machine.execute("device_add", driver=RNG, rng="rng0", id="a")
        await machine.execute("device_add", driver=RNG, rng="rng0", id="b")
        assert await refusal(machine, "object-del", id="rng0") == "Object 'rng0' is in use by device a, b"
        await machine.execute("device_del", id="a")
        await machine.execute("device_del", id="/machine/peripheral/b")
        await machine.execute("object-del", id="rng0")
        assert devices(machine) == []
        assert await refusal(machine, "device_del", id="a") == "Device 'a' does not exist; there are: none"
        await machine.execute("quit")
        deleted = [event["data"] async for event in events if event["event"] == "DEVICE_DELETED"]
    assert deleted == [{"device": name, "path": f"/machine/peripheral/{name}"} for name in ("a", "b")]


@phases
async def test_what_cannot_be_plugged_in_is_refused_and_leaves_nothing(phase: str) -> None:
    async with vmm.machine() as machine:
        await advance(machine, phase)
        await machine.execute("object-add", **BUILTIN)
        await machine.execute("device_add", driver=RNG, id="a", bus="virtio-mmio-bus.3")
        there = devices(machine)
        for arguments, text in (
            (
                {"driver": "virtio-blk-device"},
                "Device driver 'virtio-blk-device' is not supported here; "
                "there is virtio-rng-device; devices for blocks and networks come later",
            ),
            ({"id": "a"}, "Device 'a' exists already; choose another name"),
            (
                {"id": "7up"},
                "id: '7up' is not an id: a letter, then letters, digits, '-', '.' and '_', at most 128 in all",
            ),
            ({"bus": "virtio-mmio-bus.3"}, "Bus 'virtio-mmio-bus.3' is in use by device a"),
            (
                {"bus": "pcie.0"},
                "Bus 'pcie.0' does not exist; there are: virtio-mmio-bus.0 to virtio-mmio-bus.7",
            ),
            ({"rng": "rng9"}, "Random source 'rng9' does not exist; there are: rng0"),
            ({"max-bytes": 0}, "max-bytes: 0 is not a number of bytes, 1 or more"),
            ({"period": 0}, "period: 0 is not a number of milliseconds, 1 or more"),
            (
                {"addr": "3"},
                "Command 'device_add': 'addr' is unexpected; there are 'rng', 'max-bytes', 'period'",
            ),
            ({"rng": 7}, "Command 'device_add': 'rng' must be a string, not 7"),
        ):
            assert await refusal(machine, "device_add", **{"driver": RNG, **arguments}) == text
        assert devices(machine) == there
        await machine.execute("object-del", id="rng0")


@phases
async def test_there_are_eight_slots(phase: str) -> None:
    async with vmm.machine() as machine:
        await advance(machine, phase)
        for _ in range(8):
            await machine.execute("device_add", driver=RNG)
        assert [device["bus"] for device in devices(machine)] == [f"virtio-mmio-bus.{slot}" for slot in range(8)]
        assert await refusal(machine, "device_add", driver=RNG) == (
            "device_add is not possible while all 8 virtio slots are taken; device_del frees one"
        )
        await machine.execute("device_del", id="device5")
        await machine.execute("device_add", driver=RNG, id="again")
        assert devices(machine)[-1] == {**FIRST, "id": "again", "bus": "virtio-mmio-bus.5"}


async def test_a_device_that_does_not_exist_has_a_class_of_its_own() -> None:
    async with vmm.machine() as machine:
        await advance(machine, "preconfig")
        for command, arguments in (
            ("device_del", {"id": "a"}),
            ("device_add", {"driver": RNG, "rng": "a"}),
            ("device-list-properties", {"typename": "a"}),
        ):
            with pytest.raises(DeviceNotFound):
                await machine.execute(command, **arguments)


@pytest.mark.parametrize("phase", ["precreate", "accel"])
async def test_before_the_accelerator_there_is_nothing_to_plug_into(phase: str) -> None:
    async with vmm.machine() as machine:
        await advance(machine, phase)
        assert (await refusal(machine, "device_add", driver=RNG)).startswith(
            f"Command 'device_add' needs may-plug-device:devices, which phase {machine.path} does not grant; "
            "phases that grant it: preconfig (reached by accel-set), devices "
        )


async def test_the_recipe_of_a_hot_plugged_device_makes_it_before_the_machine_runs() -> None:
    async with vmm.machine() as machine:
        await advance(machine, "running")
        await machine.execute("object-add", **RANDOM)
        await machine.execute("device_add", driver=RNG, rng="rng1", bus="virtio-mmio-bus.4", max_bytes=1024)
        recipe = machine.recipe
    from vmm.phases.catalog import rank

    async with vmm.machine(recipe.ordered(rank)) as machine:
        assert machine.phase == "machine-ready"
        assert device_id(machine, 4) == 4
        assert machine.recipe.ordered(rank).steps == recipe.ordered(rank).steps


async def test_plugging_in_and_taking_off_a_hundred_times_leaves_nothing() -> None:
    async with vmm.machine() as machine:
        await advance(machine, "running")
        await machine.execute("cont")
        await machine.execute("object-add", **RANDOM)
        (vcpu,) = machine._host.tree.view(Machine).vcpus
        while not vcpu.thread_id:  # which is named by then
            await trio.lowlevel.checkpoint()
        before = Held.now()
        for _ in range(100):
            await machine.execute("device_add", driver=RNG, rng="rng1")
            assert device_id(machine, 0) == 4
            await machine.execute("device_del", id="device0")
            assert device_id(machine, 0) == 0
        assert await tasks(machine) == []
        assert Held.now().not_in(before) == []
        assert "virtio-mmio-bus.0" not in machine._host.tree.view(Machine).state.order()


async def test_a_reset_keeps_what_is_plugged_in() -> None:
    async with vmm.machine() as machine:
        await advance(machine, "running")
        await machine.execute("device_add", driver=RNG)
        (device,) = machine._host.tree.view(Machine).slots.devices
        with device.lock:
            device.write(0x70, 4, 3)
        await machine.execute("system_reset")
        assert machine._host.tree.view(Machine).slots.devices == (device,)
        assert device.state.transport.status == 0
        assert device_id(machine, 0) == 4


async def test_what_a_driver_can_be_told_is_listed() -> None:
    async with vmm.machine() as machine:
        assert await machine.execute("device-list-properties", typename=RNG) == [
            {"name": "rng", "type": "str"},
            {"name": "max-bytes", "type": "int"},
            {"name": "period", "type": "int", "default-value": 65536},
        ]
        with pytest.raises(VmmError) as caught:
            await machine.execute("device-list-properties", typename="e1000")
        assert str(caught.value) == "Device type 'e1000' does not exist; there are: virtio-rng-device"
