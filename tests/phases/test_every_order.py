"""Preconfig is left in every order of the commands that lead out of it, and after each of them comes the end.

The thread of October 2024 feared for the clean-up of a machine that is ended before it is one ("net: cleanup for
preconfig phase"). Here whatever was built is closed in reverse, wherever the machine stands.
"""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

from tests.phases.admission_rig import HANGS, Rig, open_rig, opened, unexpected
from tests.qmp.kit import HALT, flat_guest
from tests.trees import out_of_order
from vmm.recipe import Step

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]


def preconfig(folder: Path) -> tuple[Step, ...]:
    """Return what leads to phase preconfig, of a machine whose guest does nothing at all."""
    return Step("machine-set", {"memory": {"size": 2 << 20}, "kernel": flat_guest(folder, HALT)}), Step("accel-set")


WAYS: Final = ("cont", "finish-machine-init", "x-exit-preconfig", "migrate-incoming", "loadvm")

LEADS: Final[Mapping[tuple[str, str], str]] = {
    ("preconfig", "cont"): "running",
    ("preconfig", "x-exit-preconfig"): "devices",
    ("preconfig", "migrate-incoming"): "incoming",
    ("preconfig", "loadvm"): "running",
    ("devices", "cont"): "running",
    ("devices", "finish-machine-init"): "running",
    ("devices", "migrate-incoming"): "incoming",
    ("devices", "loadvm"): "running",
    # Whether the guest runs once it is here is all that there is to say while it is awaited.
    ("incoming", "cont"): "incoming",
    ("running", "cont"): "running",
    ("running", "loadvm"): "running",
}
"""In which phase each command leads where. Everywhere else it is refused, and the machine stays."""


def orders() -> Iterator[tuple[str, ...]]:
    """Yield each order of any of the ways, each way once at most: what may come before the end."""
    for length in range(len(WAYS) + 1):
        yield from itertools.permutations(WAYS, length)


async def send(rig: Rig, command: str, folder: Path) -> bool:
    """Send a command; return whether it was carried out."""
    arguments: dict[str, Any] = {
        "migrate-incoming": {"uri": f"unix:{rig.source.main}"},
        "loadvm": {"name": str(folder / "state")},
    }.get(command, {})
    return "return" in await rig.ask("admin", command, arguments)


async def walk(rig: Rig, order: tuple[str, ...], folder: Path) -> None:
    """Send the commands in `order`; each leads where it should, or nowhere."""
    phase = "preconfig"
    for number, command in enumerate(order):
        expected = LEADS.get((phase, command))
        assert await send(rig, command, folder) == (expected is not None), (order[: number + 1], rig.path)
        phase = expected or phase
        assert rig.path.rsplit("/", 1)[-1] == phase, (order[: number + 1], rig.path)


async def ended(rig: Rig) -> None:
    """Wait for the end; all must have been closed in reverse, and no socket be left."""
    with trio.fail_after(HANGS):
        await rig.ended.wait()
    assert unexpected(rig.failure) == []
    assert out_of_order(opened(rig.told()), ("open", "granted"), ("leave", "revoked")) == []
    assert os.listdir(rig.sockets) == []


async def save(folder: Path) -> None:
    """Save a guest of the same machine, which ran, to `folder`/state."""
    async with open_rig(folder, *preconfig(folder)) as rig:
        await rig.admin("cont")
        await rig.admin("migrate", {"uri": f"file:{folder}/state"})
        await rig.wait_path(f"{RUNNING}/postmigrate")
        await rig.admin("quit")
        await ended(rig)


RUNNING: Final = "boot/precreate/accel/backends/preconfig/devices/running"


async def settled(rig: Rig) -> None:
    """Wait until the start recipe is through."""
    await rig.wait_path("boot/precreate/accel/backends/preconfig")
    await rig.admin("migrate-set-parameters")


@pytest.mark.long
async def test_quit_comes_after_any_order_of_the_ways_out_of_preconfig(tmp_path: Path) -> None:
    await save(tmp_path)
    steps, held = preconfig(tmp_path), sorted(os.listdir("/proc/self/fd"))
    for order in orders():
        async with open_rig(tmp_path, *steps) as rig:
            await settled(rig)
            await walk(rig, order, tmp_path)
            await rig.admin("quit")
            await ended(rig)
        assert sorted(os.listdir("/proc/self/fd")) == held, order


async def test_a_cancel_comes_after_any_order_of_the_ways_out_of_preconfig(tmp_path: Path) -> None:
    await save(tmp_path)
    steps, held = preconfig(tmp_path), sorted(os.listdir("/proc/self/fd"))
    for order in (order for order in orders() if len(order) <= 2):
        async with open_rig(tmp_path, *steps) as rig:
            await settled(rig)
            await walk(rig, order, tmp_path)
            rig.scope.cancel()
            await ended(rig)
        assert sorted(os.listdir("/proc/self/fd")) == held, order


@pytest.mark.parametrize("command", ["cont", "migrate-incoming", "loadvm"])
async def test_a_cancel_comes_while_a_command_leads_out_of_preconfig(tmp_path: Path, command: str) -> None:
    """At each turn of the loop, from the moment at which the command was sent until it had been carried out."""
    await save(tmp_path)
    steps, places = preconfig(tmp_path), set[str]()
    for turns in range(0, 60, 2):
        async with open_rig(tmp_path, *steps) as rig, trio.open_nursery() as nursery:
            await settled(rig)
            nursery.start_soon(send, rig, command, tmp_path)
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            places.add(rig.path.rsplit("/", 1)[-1])
            rig.scope.cancel()
            await ended(rig)
    assert len(places) >= 2, "it was cancelled at one place only"
