"""`object-add` and `object-del` of the back ends of devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pytest

import vmm
from tests.phases.machine import WAY
from vmm.errors import VmmError

if TYPE_CHECKING:
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
