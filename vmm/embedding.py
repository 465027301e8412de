"""A machine inside anybody's trio program: `async with vmm.machine(recipe) as m:`.

The program is one more session with every right; it sees what a client sees. Any number of machines live in one
process. Leaving the block ends the machine, phases innermost first; so does a cancel from outside.
"""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, final

import attrs
import trio

from vmm.capabilities import ADMIN, Grant
from vmm.errors import CommandAborted
from vmm.phases.boot import run_machine
from vmm.phases.start import Start
from vmm.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping

    from vmm.monitor.events import Occurrence
    from vmm.phases.foundation import Host

_EVENTS: Final = 4096
"""Events that may wait for a program that reads slowly; of more, the newest are dropped."""


@final
@attrs.frozen
class _Program:
    """The caller on whose behalf the embedding program's commands are executed."""

    name: str = "the embedding program"
    grant: Grant = ADMIN
    descriptors: dict[str, int] = attrs.Factory(dict)
    by_number: bool = True

    def take_descriptors(self) -> list[int]:
        """Return none: a program passes descriptors by other ways than SCM_RIGHTS."""
        return []


@final
class EmbeddedMachine:
    """A machine, as the program that started it has it."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._tree = host.tree
        self._program = _Program()

    @property
    def phase(self) -> str:
        """How far the machine is: no-machine, machine-created, accel-created, machine-initialized, machine-ready."""
        return self._tree.machine_phase

    @property
    def path(self) -> str:
        """The innermost open phase, below those that enclose it."""
        return self._tree.path

    @property
    def recipe(self) -> Recipe:
        """The commands that made the machine what it is."""
        return self._host.recorder.recipe()

    async def execute(self, command: str, /, **arguments: Any) -> Any:
        """Execute a QMP command and return its reply as JSON; `_` in an argument's name stands for `-`.

        Cancelling leaves a command that has begun running.

        Raises:
            VmmError: as a client's would fail.
        """
        wired = {name.replace("_", "-"): value for name, value in arguments.items()}
        reply = await self._host.table.execute(self._program, command, wired)
        # The same JSON that a client gets, and nothing that is shared with the machine.
        return json.loads(json.dumps(reply))

    @asynccontextmanager
    async def events(self) -> AsyncGenerator[AsyncIterator[Mapping[str, Any]], None]:
        """Watch the events from now on: ``async with m.events() as events: async for event in events: ...``.

        The iteration ends when the machine has ended.
        """
        send, receive = trio.open_memory_channel[dict[str, Any]](_EVENTS)

        def tell(occurrence: Occurrence) -> None:
            try:
                send.send_nowait(json.loads(occurrence.line))
            except (trio.WouldBlock, trio.BrokenResourceError):
                return  # A program that does not read must not stop the machine.
            if occurrence.body["event"] == "SHUTDOWN":
                send.close()
                self._host.events.unsubscribe(tell)

        self._host.events.subscribe(tell)
        try:
            with receive:
                yield receive
        finally:
            self._host.events.unsubscribe(tell)
            send.close()


@asynccontextmanager
async def machine(
    recipe: Recipe | Iterable[Mapping[str, Any]] = (), *, start: Start | None = None
) -> AsyncGenerator[EmbeddedMachine, None]:
    """Start a machine, replay `recipe` (QMP requests) in order, and end the machine when the block is left.

    An empty recipe gives a machine that waits in phase precreate. With `start`, its recipe is used instead.

    Raises:
        VmmError: a command of the recipe failed, or the machine did, in an exception group as trio has it.
    """
    if start is None:
        made = recipe if isinstance(recipe, Recipe) else Recipe.from_json("of the embedding program", list(recipe))
        start = Start(made)
    async with trio.open_nursery() as nursery:
        ended = trio.Event()

        async def run(*, task_status: trio.TaskStatus[Host]) -> None:
            await run_machine(start, task_status=task_status)
            ended.set()

        host: Host = await nursery.start(run)
        try:
            try:
                await host.tree.wait_begun("machine", _Program().name)
            except CommandAborted:
                await ended.wait()  # if the machine failed, this is cancelled, and its error is told instead
                raise
            yield EmbeddedMachine(host)
        finally:
            host.ending.end("host-ui")
