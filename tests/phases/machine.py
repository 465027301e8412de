"""A machine in the test's own process: `run_machine` with a real KVM, and a client on its unix socket."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, final

import attrs
import pytest
import trio

from vmm.cli_options import Parser, add_run_options
from vmm.cli_recipe import recipe_of
from vmm.phases.boot import run_machine
from vmm.phases.catalog import rank
from vmm.phases.config import GoOn
from vmm.phases.start import Start
from vmm.qmp_client import CommandFailed, QmpClient, qmp_session
from vmm.recipe import Recipe, Step

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncGenerator, Mapping
    from pathlib import Path

    from vmm.nursery_tree import Tree
    from vmm.phases.foundation import Host

SIZE: Final = 16 << 20
DEFINITION: Final[Mapping[str, Any]] = {"kernel": "builtin:heartbeat", "memory": {"size": SIZE}, "append": "pages=1"}

WAY: Final[tuple[tuple[str, str, Mapping[str, Any]], ...]] = (
    ("precreate", "machine-set", DEFINITION),
    ("accel", "accel-set", {}),
    ("preconfig", "cpu-model-set", {}),
    ("devices", "finish-machine-init", {}),
    ("running", "cont", {}),
)
"""Each phase in which a machine built over the monitor lingers, and the command that leads on."""

PATHS: Final[Mapping[str, tuple[str, str]]] = {
    "precreate": ("no-machine", "boot/precreate"),
    "accel": ("machine-created", "boot/precreate/accel"),
    "preconfig": ("accel-created", "boot/precreate/accel/backends/preconfig"),
    "devices": ("machine-initialized", "boot/precreate/accel/backends/preconfig/devices"),
    "running": ("machine-ready", "boot/precreate/accel/backends/preconfig/devices/running"),
}
"""What `query-machine-phase` says in each."""


def monitor(path: Path, name: str = "mon0") -> tuple[Step, ...]:
    """Return the commands that make a monitor on unix socket `path`."""
    address = {"type": "unix", "data": {"path": str(path)}}
    backend = {"type": "socket", "data": {"addr": address, "server": True, "wait": False}}
    return (
        Step("chardev-add", {"id": name, "backend": backend}),
        Step("object-add", {"qom-type": "monitor-qmp", "id": f"qmp_{name}", "chardev": name}),
    )


def parse(*arguments: str) -> argparse.Namespace:
    """Parse the options of `trio-vmm run`."""
    parser = Parser("trio-vmm run", allow_abbrev=False)
    add_run_options(parser)
    return parser.parse_args(arguments)


def start_of(*arguments: str) -> Start:
    """Return what `trio-vmm run` starts with these options."""
    options = parse(*arguments)
    after = GoOn(start=not options.stopped) if options.preconfig else None
    return Start(recipe_of(options).ordered(rank), after_preconfig=after)


@final
@attrs.define(eq=False)
class Running:
    """A machine under way."""

    host: Host
    path: Path
    scope: trio.CancelScope
    ended: trio.Event = attrs.Factory(trio.Event)
    status: int | None = None
    """Exit status; None while it runs, and after a cancel."""

    @property
    def tree(self) -> Tree:
        """The machine's tree."""
        return self.host.table._tree

    def events(self) -> list[tuple[str, dict[str, Any]]]:
        """Return every event so far, in words of the monitor."""
        told = self.host.events.since(0)
        assert told is not None
        return [(str(event.body["event"]), dict(event.body.get("data", {}))) for event in told]  # type: ignore[call-overload]

    def lent(self) -> list[str]:
        """Return the commands to which a token is lent."""
        phase, found = self.tree.root, set[str]()
        while phase is not None:
            found |= {lending.command for lending in (phase.open_window.lendings if phase.open_window else ())}
            phase = phase.children[-1] if phase.children else None
        return sorted(found)


@asynccontextmanager
async def machine(start: Start, path: Path) -> AsyncGenerator[Running, None]:
    """Run a machine; when the block is left it must have ended, or be ended by a cancel from outside."""
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()
        made: list[Running] = []

        async def run(*, task_status: trio.TaskStatus[Host]) -> None:
            status = None
            try:
                with scope:
                    status = await run_machine(start, task_status=task_status)
            finally:
                for running in made:
                    running.status = status
                    running.ended.set()

        host: Host = await nursery.start(run)
        running = Running(host, path, scope)
        made.append(running)
        try:
            yield running
        finally:
            scope.cancel()


@asynccontextmanager
async def bare(tmp_path: Path, *steps: Step) -> AsyncGenerator[tuple[Running, QmpClient], None]:
    """Run a machine with a monitor and what `steps` make besides; connect a client."""
    path = tmp_path / "qmp"
    start = Start(Recipe("of this test", (*monitor(path), *steps)))
    async with machine(start, path) as running, connected(path) as client:
        yield running, client


@asynccontextmanager
async def connected(path: Path) -> AsyncGenerator[QmpClient, None]:
    """Connect to `path` as soon as it is there."""
    await appearance(path)
    async with qmp_session(str(path)) as client:
        yield client


async def appearance(path: Path) -> None:
    """Wait until `path` is there. The machine is in the same loop: each look is a turn of it."""
    with trio.fail_after(20):
        while not os.path.exists(path):  # noqa: ASYNC240
            await trio.lowlevel.checkpoint()


async def advance(client: QmpClient, phase: str) -> None:
    """Build the machine over the monitor as far as `phase`."""
    for here, command, arguments in WAY:
        if here == phase:
            return
        await client.execute(command, **arguments)
    raise AssertionError(phase)


async def failure(client: QmpClient, command: str, /, **arguments: Any) -> str:
    """Execute a command that must fail; return what it says."""
    with pytest.raises(CommandFailed) as caught:
        await client.execute(command, **arguments)
    assert caught.value.command == command
    return caught.value.desc


def sockets_in(directory: Path) -> list[str]:
    """Return what is left in `directory`."""
    return sorted(os.listdir(directory))
