"""`object-add` and `object-del` of the back ends of devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

import vmm
from tests.phases.machine import WAY
from tests.qtest.client import PATIENCE, SIZE, QtestClient, unix
from vmm.errors import VmmError

if TYPE_CHECKING:
    from pathlib import Path

    from vmm.embedding import EmbeddedMachine

pytestmark = pytest.mark.usefixtures("no_leaks")

BUILTIN: Final = {"qom-type": "rng-builtin", "id": "rng0"}
RANDOM: Final = {"qom-type": "rng-random", "id": "rng1", "filename": "/dev/urandom"}


async def advance(machine: EmbeddedMachine, phase: str) -> None:
    for here, command, arguments in WAY:
        if here == phase:
            return
        await machine.execute(command, **arguments)
    raise AssertionError(phase)


async def refusal(machine: EmbeddedMachine, command: str, /, **arguments: Any) -> str:
    with pytest.raises(VmmError) as caught:
        await machine.execute(command, **arguments)
    return str(caught.value)


def objects(machine: EmbeddedMachine) -> list[dict[str, Any]]:
    return [dict(step.arguments) for step in machine.recipe if step.execute == "object-add"]


@pytest.mark.parametrize("phase", ["precreate", "accel"])
async def test_back_ends_of_devices_come_after_the_accelerator(phase: str) -> None:
    async with vmm.machine() as machine:
        await advance(machine, phase)
        path = machine.path
        assert await refusal(machine, "object-add", **BUILTIN) == (
            f"Command 'object-add' needs may-create-backend:rng, which phase {path} does not grant; "
            "phases that grant it: backends (reached by accel-set), preconfig (reached by accel-set), "
            "devices (reached by cpu-model-set or x-exit-preconfig), running (reached by finish-machine-init or cont)"
        )


@pytest.mark.kvm
@pytest.mark.parametrize("phase", ["preconfig", "devices", "running"])
async def test_back_ends_of_devices_come_and_go(phase: str) -> None:
    async with vmm.machine() as machine:
        await advance(machine, phase)
        await machine.execute("object-add", **BUILTIN)
        await machine.execute("object-add", qom_type="rng-random", id="rng1")
        assert objects(machine) == [BUILTIN, RANDOM]
        assert await refusal(machine, "object-add", **BUILTIN) == "Object 'rng0' exists already; choose another name"
        await machine.execute("object-del", id="rng0")
        await machine.execute("object-del", id="rng1")
        assert objects(machine) == []
        assert await refusal(machine, "object-del", id="rng1") == "Object 'rng1' does not exist; there are: none"
        await machine.execute("object-add", **RANDOM)


@pytest.mark.kvm
async def test_what_can_be_no_source_is_refused_and_leaves_nothing() -> None:
    async with vmm.machine() as machine:
        await advance(machine, "preconfig")
        assert await refusal(machine, "object-add", **RANDOM | {"filename": "/etc/passwd"}) == (
            "Cannot read /etc/passwd: it is a regular file, not a character device such as /dev/urandom"
        )
        assert await refusal(machine, "object-add", **BUILTIN | {"filename": "/dev/urandom"}) == (
            "Command 'object-add': 'filename' is unexpected; there are 'qom-type', 'id'"
        )
        assert objects(machine) == []
        await machine.execute("object-add", **RANDOM)


@pytest.mark.kvm
async def test_a_recipe_with_a_source_makes_it_again() -> None:
    async with vmm.machine() as machine:
        await advance(machine, "preconfig")
        await machine.execute("object-add", **RANDOM)
        recipe = machine.recipe
    async with vmm.machine(recipe) as machine:
        assert machine.recipe.steps == recipe.steps


# --- what a monitor has had ---


async def chardev(machine: EmbeddedMachine, path: Path) -> None:
    """Make a socket chardev `c`."""
    await machine.execute("chardev-add", **unix("c", path).arguments)


async def serves_a_port(machine: EmbeddedMachine, path: Path) -> None:
    """Give chardev `c` to COM1 and see that it carries bytes both ways."""
    await machine.execute("chardev-add", **unix("q", path.with_name("q")).arguments)
    await machine.execute("object-add", qom_type="qtest", id="port", chardev="q")
    await machine.execute("machine-set", memory={"size": SIZE}, serial=["c"])
    await machine.execute("accel-set", accel="qtest")
    await machine.execute("cpu-model-set")
    with trio.fail_after(PATIENCE):
        async with await QtestClient.connect(path.with_name("q")) as guest, await trio.open_unix_socket(path) as client:
            await client.send_all(b"?")
            while not await guest.value("inb 0x3fd") & 1:
                await trio.lowlevel.checkpoint()
            assert await guest.value("inb 0x3f8") == ord("?")
            await guest.do("outb 0x3f8 0x21")
            assert await client.receive_some() == b"!"


@pytest.mark.parametrize("kind", ["monitor-qmp", "qtest"])
async def test_a_monitors_chardev_serves_a_device_after_it(kind: str, tmp_path: Path) -> None:
    async with vmm.machine() as machine:
        await chardev(machine, tmp_path / "c")
        await machine.execute("object-add", qom_type=kind, id="m", chardev="c")
        await machine.execute("object-del", id="m")
        await serves_a_port(machine, tmp_path / "c")


async def test_a_chardev_serves_a_device_after_an_object_that_could_not_be_made(tmp_path: Path) -> None:
    async with vmm.machine() as machine:
        await chardev(machine, tmp_path / "c")
        log = str(tmp_path / "none" / "log")
        assert await refusal(machine, "object-add", qom_type="qtest", id="m", chardev="c", log=log) == (
            f"Cannot write {log}: No such file or directory"
        )
        await serves_a_port(machine, tmp_path / "c")


@pytest.mark.parametrize("kind", ["monitor-qmp", "qtest"])
async def test_a_chardev_of_no_use_to_a_monitor_goes_on(kind: str, tmp_path: Path) -> None:
    async with vmm.machine() as machine:
        await machine.execute("chardev-add", id="c", backend={"type": "file", "data": {"out": str(tmp_path / "out")}})
        assert "needs a chardev of kind socket or stdio" in await refusal(
            machine, "object-add", qom_type=kind, id="m", chardev="c"
        )
        held = machine._host.stores.chardevs["c"].chardev
        assert held.put(b"!") == 1
