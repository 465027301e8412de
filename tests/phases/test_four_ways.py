"""One machine, built by options, by a recipe file, by a client's commands, and from an incoming stream.

However it came about, it is the same recipe, the same tree of phases, tasks and tokens, and, byte for byte, the same
state and RAM before its guest runs.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, final

import attrs
import pytest
import trio
import trio.testing

import vmm
from tests.phases.machine import connected, start_of
from tests.phases.update_kit import channels, due
from vmm.phases.catalog import rank
from vmm.phases.machine import Machine
from vmm.phases.start import Start
from vmm.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from vmm.embedding import EmbeddedMachine

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

SIZE: Final = 16 << 20
OPTIONS: Final = (
    *("-S", "-m", "16", "-smp", "2", "-name", "four", "-kernel", "builtin:heartbeat", "-append", "region=64K"),
    *("-serial", "null", "-cpu", "host", "-object", "rng-builtin,id=entropy"),
    *("-device", "virtio-rng-device,id=rng0,rng=entropy,max-bytes=1024"),
)
COMMANDS: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    ("chardev-add", {"id": "serial0", "backend": {"type": "null", "data": {}}}),
    (
        "machine-set",
        {
            "type": "microvm",
            "name": "four",
            "memory": {"size": SIZE},
            "smp": {"cpus": 2},
            "kernel": "builtin:heartbeat",
            "append": "region=64K",
            "serial": ["serial0"],
        },
    ),
    ("accel-set", {"accel": "kvm"}),
    ("object-add", {"qom-type": "rng-builtin", "id": "entropy"}),
    ("device_add", {"driver": "virtio-rng-device", "id": "rng0", "rng": "entropy", "max-bytes": 1024}),
    ("cpu-model-set", {"model": "host"}),
    ("finish-machine-init", {}),
)
"""The same as `OPTIONS`, as somebody writes it who knows only the commands."""


# --- what is compared -----------------------------------------------------------------------------------------


@final
@attrs.frozen
class Seen:
    """All that can be told of a machine that has not run yet."""

    recipe: list[dict[str, Any]]
    tree: dict[str, Any]
    state: dict[str, Any]
    ram: str


async def look(machine: EmbeddedMachine, folder: Path, *, copied: bool = False) -> Seen:
    """Look at `machine`, whose files are in `folder`. With `copied`, at the state that a copy has of its chardevs.

    That is what the serial ports have not sent or read yet, under the ports' names; a monitor's is nothing of it.
    """
    await trio.testing.wait_all_tasks_blocked()
    built = machine._host.tree.view(Machine)
    if copied:
        machine._host.stores.declare_ports(built.state)
    sections: dict[str, tuple[int, dict[str, Any]]] = {
        it.name: (it.version, dict(it.state)) for it in built.state.save()
    }
    _, kvm = sections["kvm"]
    kvm["chips"] = timeless(kvm["chips"])
    digest = hashlib.sha256()
    for offset in range(0, SIZE, 1 << 20):
        digest.update(os.pread(built.memory.fd, 1 << 20, offset))
    return Seen(
        json.loads(json.dumps(machine.recipe.ordered(rank).to_json()).replace(str(folder), "FOLDER")),
        shape(await machine.execute("query-nursery-tree")),
        sections,
        digest.hexdigest(),
    )


def timeless(chips: dict[str, Any]) -> dict[str, Any]:
    """Leave out of KVM's chips what is time, which goes on whether or not a guest runs.

    The guest's clock, and the moment at which the state was read; and of the PIT's three counters when each was loaded:
    eight bytes at the end of each 24 (linux/kvm.h, struct kvm_pit_channel_state, count_load_time). What they were
    loaded with, and how, stays in.
    """
    pit = bytearray(chips["pit"])
    for counter in range(3):
        pit[24 * counter + 16 : 24 * counter + 24] = bytes(8)
    return {**{name: value for name, value in chips.items() if name not in ("clock", "moment")}, "pit": bytes(pit)}


def shape(phase: dict[str, Any]) -> dict[str, Any]:
    """Leave times out of a tree, and who is being lent a token, which is whoever asked."""
    tokens = [{name: value for name, value in token.items() if name != "lent"} for token in phase["tokens"]]
    left = {name: value for name, value in phase.items() if name != "seconds"}
    return {**left, "tokens": tokens, "children": [shape(child) for child in phase["children"]]}


def without_incoming(phase: dict[str, Any]) -> dict[str, Any]:
    """Take phase incoming out of a tree: where a guest came in, running is inside it.

    It has left nothing behind but the keeper of the vCPUs' threads, which is running's elsewhere.
    """
    children = []
    for child in phase["children"]:
        if child["phase"] == "incoming":
            assert (child["tokens"], child["window"]) == ([], False)
            left, (child,) = child["tasks"], child["children"]
            assert left in ([], ["vcpus"])
            child = {**child, "tasks": [*left, *child["tasks"]]}
        children.append(without_incoming(child))
    return {**phase, "path": phase["path"].replace("/incoming", ""), "children": children}


# --- the ways -------------------------------------------------------------------------------------------------


@asynccontextmanager
async def by_options(folder: Path) -> AsyncGenerator[EmbeddedMachine, None]:
    async with vmm.machine(start=start_of("-qmp", f"unix:{folder}/qmp", *OPTIONS)) as machine:
        yield machine


@asynccontextmanager
async def by_recipe_file(folder: Path) -> AsyncGenerator[EmbeddedMachine, None]:
    file = folder / "recipe"
    file.write_text(str(start_of("-qmp", f"unix:{folder}/qmp", *OPTIONS).recipe))
    async with vmm.machine(start=Start(Recipe.parse(str(file), file.read_text()))) as machine:
        yield machine


@asynccontextmanager
async def by_commands(folder: Path) -> AsyncGenerator[EmbeddedMachine, None]:
    async with vmm.machine(start=start_of("-qmp", f"unix:{folder}/qmp")) as machine:
        async with connected(folder / "qmp") as client:
            for command, arguments in COMMANDS:
                await client.execute(command, **arguments)
        yield machine


@asynccontextmanager
async def by_live_update(folder: Path) -> AsyncGenerator[EmbeddedMachine, None]:
    """An empty process becomes the machine; its monitor's socket is the source's."""
    where = channels(f"{folder}/main", f"{folder}/cpr")
    async with by_options(folder) as source, vmm.machine() as machine:
        await machine.execute("migrate-incoming", channels=where)
        await source.execute("migrate-set-parameters", mode="cpr-transfer")
        await arrival(source, machine, channels=where)
        await source.execute("quit")
        yield machine


@asynccontextmanager
async def by_copy(folder: Path) -> AsyncGenerator[EmbeddedMachine, None]:
    """A process with nothing but a monitor becomes the machine. The source's monitors stay with the source."""
    (folder / "source").mkdir()
    async with (
        by_options(folder / "source") as source,
        vmm.machine(start=start_of("-qmp", f"unix:{folder}/qmp")) as machine,
    ):
        await machine.execute("migrate-incoming", uri=f"unix:{folder}/main")
        await arrival(source, machine, uri=f"unix:{folder}/main")
        yield machine


async def arrival(source: EmbeddedMachine, machine: EmbeddedMachine, **where: Any) -> None:
    """Have the guest of `source` go where `machine` awaits it, and wait until it is there."""
    async with machine.events() as events, due("the guest to come"):
        await source.execute("migrate", **where)
        async for event in events:
            data = event.get("data", {})
            if event["event"] == "TOKEN_GRANTED" and data["phase"] == "running":
                return


WAYS: Final = (by_recipe_file, by_commands, by_live_update, by_copy)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
async def test_it_is_the_machine_of_the_command_line(
    tmp_path: Path, way: Callable[[Path], AbstractAsyncContextManager[EmbeddedMachine]]
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    async with by_options(here) as first:
        expected = await look(first, here)
        async with way(there) as machine:
            assert await machine.execute("query-status") == {"running": False, "status": "prelaunch"}
            if way is by_copy:
                expected = await look(first, here, copied=True)
            found = await look(machine, there, copied=way is by_copy)
            assert found.recipe == expected.recipe
            assert without_incoming(found.tree) == expected.tree
            assert found.state == expected.state
            assert found.ram == expected.ram
            # And it is one that runs.
            await machine.execute("cont")
            assert (await machine.execute("query-status"))["running"]


async def test_the_comparison_sees_every_difference(tmp_path: Path) -> None:
    """Else the test above would show less than it says: each part of a machine that is another one is another one."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    other = [option.replace("region=64K", "region=32K") for option in OPTIONS if option != "rng-builtin,id=entropy"]
    other = [option for option in other if not option.startswith(("-object", "-device", "virtio"))]
    async with by_options(here) as first, vmm.machine(start=start_of("-qmp", f"unix:{there}/qmp", *other)) as machine:
        expected, found = await look(first, here), await look(machine, there)
    assert found.recipe != expected.recipe
    assert found.tree != expected.tree
    assert found.state != expected.state
    assert found.ram != expected.ram
