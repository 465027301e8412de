"""Machines that are saved in a file, and come from there again."""

from __future__ import annotations

import os
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import trio

from tests.phases.machine import Running, machine, monitor, parse
from vmm.cli_resume import resumed
from vmm.cli_save import save
from vmm.cli_watch import Interruption
from vmm.guests.heartbeat import HeartbeatReader
from vmm.phases.catalog import rank
from vmm.phases.machine import Machine
from vmm.phases.start import Start
from vmm.recipe import Recipe, Step

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from vmm.qmp_client import QmpClient

SIZE: Final = 16 << 20
HANGS: Final = 30.0


def steps(folder: Path, *, file: bool, serial: bool = False) -> tuple[Step, ...]:
    """Return a machine's recipe, its RAM in a file or not, its serial port too."""
    made: list[Step] = []
    options: dict[str, Any] = {"memory": {"size": SIZE}, "kernel": "builtin:heartbeat", "append": "region=64K pages=1"}
    if file:
        backend = {"qom-type": "memory-backend-file", "id": "m0", "size": SIZE, "share": True}
        made.append(Step("object-add", {**backend, "mem-path": str(folder / "ram")}))
        options["memory-backend"] = "m0"
    if serial:
        made.append(
            Step("chardev-add", {"id": "s0", "backend": {"type": "file", "data": {"out": str(folder / "ser")}}})
        )
        options["serial"] = ["s0"]
    more = [Step(name) for name in ("accel-set", "cpu-model-set", "finish-machine-init", "cont")]
    return (*monitor(folder / "qmp"), *made, Step("machine-set", options), *more)


@asynccontextmanager
async def begun(recipe: Recipe, path: Path, *, autostart: bool = True) -> AsyncGenerator[Running, None]:
    """Run `recipe`, whose last command has been carried out."""
    done = trio.Event()
    start = Start(recipe.ordered(rank), begun=done.set, autostart=autostart)
    async with machine(start, path) as running:
        with trio.fail_after(HANGS):
            await done.wait()
        yield running


@asynccontextmanager
async def original(folder: Path, *, file: bool = True, serial: bool = False) -> AsyncGenerator[Running, None]:
    async with begun(Recipe("of this test", steps(folder, file=file, serial=serial)), folder / "qmp") as running:
        await ticked(running, 5)
        yield running


@asynccontextmanager
async def again(folder: Path, *options: str, whole: bool = False) -> AsyncGenerator[Running, None]:
    recipe = resumed(str(folder / "saved"), parse(*options), whole=whole)
    async with begun(recipe, folder / "qmp", autostart="-S" not in options) as running:
        yield running


def ticks(running: Running) -> int:
    report = HeartbeatReader(running.tree.view(Machine).memory.read).look()
    return 0 if report is None else report.ticks


async def ticked(running: Running, count: int) -> None:
    reader = HeartbeatReader(running.tree.view(Machine).memory.read)
    with trio.fail_after(HANGS):
        while (report := reader.look()) is None or report.ticks < count:  # noqa: ASYNC110 - a guest does not tell
            await trio.sleep(0.005)
    assert report.intact, str(report)


async def saved(folder: Path, *, file: bool = True, serial: bool = False) -> int:
    """Save a machine in `folder`, which ends it; return how often its guest had ticked."""
    async with original(folder, file=file, serial=serial) as running:
        memory = running.tree.view(Machine).memory
        reader = HeartbeatReader(memory.read)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(save, str(folder / "qmp"), folder / "saved", Interruption())
            with trio.fail_after(HANGS):
                await running.ended.wait()
        assert running.status == 0
        del reader
    return 5


def files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


async def status(client: QmpClient) -> str:
    return str((await client.execute("query-status"))["status"])


def grown(path: Path, count: int) -> list[bytes]:
    """Wait until a file has `count` lines; return those that it has, but for one that is not whole."""
    deadline = time.monotonic() + HANGS
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline, f"{path} does not get {count} lines"
        time.sleep(0.01)
    return [line.rstrip(b"\r") for line in path.read_bytes().split(b"\n")[:-1]]
