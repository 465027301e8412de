"""A small tree of phases for tests, with a log of all that its observer is told."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, final

import attrs
import trio

from vmm.capabilities import ADMIN, MayQuery, MayQuit, MaySetMigrationCap
from vmm.errors import NameTaken
from vmm.nursery_tree import Lending, open_tree

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping

    from vmm.capabilities import AnyToken, Mint
    from vmm.decisions import Turn
    from vmm.nursery_tree import Phase, Window

LEFT = "This decision is not possible once phase {} has been left; query-machine-phase says where the machine is"
"""What a decision fails with that comes too late, with the phase's name to be filled in."""


@attrs.define(eq=False)
class Facet:
    """Stands for anything that a token leads to; notes its uses."""

    uses: list[str] = attrs.Factory(list)

    def end(self, cause: str) -> None:
        """As `may-quit` has it."""
        self.uses.append(cause)

    def update(self, changes: Mapping[str, Any]) -> None:
        """As `may-set-migration-cap` has it."""
        self.uses += changes


@final
@attrs.frozen
class Basic:
    """What the outermost window of these tests grants."""

    query: MayQuery
    quit: MayQuit


@final
@attrs.frozen
class Settings:
    """What an inner window of these tests grants."""

    set_migration_cap: MaySetMigrationCap


@final
@attrs.frozen
class Nothing:
    """A window without tokens."""


@final
@attrs.define(eq=False)
class Log:
    """What an observer was told, in words."""

    lines: list[str] = attrs.Factory(list)
    events: list[tuple[str, dict[str, object]]] = attrs.Factory(list)

    def observe(self, event: str, data: Mapping[str, object]) -> None:
        """Note an event."""
        self.events.append((event, dict(data)))
        if event == "PHASE_CHANGED":
            self.lines.append(f"{'open' if data['opened'] else 'leave'} {data['path']}")
        else:
            self.lines.append(f"{event.removeprefix('TOKEN_').lower()} {data['token']} of {data['path']}")

    def note(self, line: str) -> None:
        """Note something else."""
        self.lines.append(line)

    async def resident(self, name: str, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """A resident that notes its start and its end, which takes it a few turns of the loop."""
        self.note(f"start {name}")
        try:
            task_status.started()
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                for _ in range(3):
                    await trio.lowlevel.checkpoint()
            self.note(f"end {name}")


@asynccontextmanager
async def tree(log: Log | None = None) -> AsyncGenerator[Phase, None]:
    """Open a root phase named `boot`."""
    async with open_tree("boot", (log or Log()).observe) as phase:
        yield phase


def basic(facet: Any = None) -> Callable[[Mint], Basic]:
    """Return the builder of a window that grants may-query and may-quit."""
    found: Any = facet or Facet()
    return lambda mint: Basic(query=mint(MayQuery, found), quit=mint(MayQuit, found))


def settings(facet: Any = None) -> Callable[[Mint], Settings]:
    """Return the builder of a window that grants may-set-migration-cap."""
    return lambda mint: Settings(set_migration_cap=mint(MaySetMigrationCap, facet or Facet()))


def nothing(mint: Mint) -> Nothing:
    """Build a window without tokens."""
    return Nothing()


def grants_of(*kinds: type[AnyToken]) -> Callable[[Mint], Any]:
    """Return the builder of a window that grants `kinds`, all over one facet."""
    made = attrs.make_class("Made", [kind.wire_name.replace("-", "_") for kind in kinds], frozen=True)
    return lambda mint: made(*(mint(kind, Facet()) for kind in kinds))


def lending(command: str = "command", holder: str = "qmp0/1", *kinds: type[AnyToken]) -> Lending:
    """Return a lending as the command table makes them."""
    return Lending(command, holder, kinds or (MayQuery,), trio.current_time())


def over(turn: Turn[Any]) -> bool:
    """Whether it is settled, asked so that a type checker takes no answer for the last."""
    return turn.settled


def refusal(name: str = "serial0") -> NameTaken:
    """Return an error that is expected."""
    return NameTaken(what="Chardev", name=name)


def window_of(phase: Phase) -> Window[Any] | None:
    """Return the open window, as `over` does."""
    return phase.open_window


def reserved_for(phase: Phase) -> str | None:
    """Return whom the machine is reserved for, as `over` does."""
    return phase.tree.reserved_for


def looked_up(
    phase: Phase, *kinds: type[AnyToken], scope: str | None = None, grant: Any = ADMIN, holder: str = "qmp0/1"
) -> tuple[AnyToken, Window[Any]]:
    """Look a token up for a command that is called so."""
    return phase.tree.find("some-command", kinds, scope, grant, holder)


def out_of_order(lines: list[str], opening: tuple[str, ...], closing: tuple[str, ...]) -> list[str]:
    """Return what is wrong with `lines` if what they say to open has to be closed in the reverse order."""
    stack: list[str] = []
    faults: list[str] = []
    for line in lines:
        verb, _, name = line.partition(" ")
        if verb in opening:
            stack.append(name)
        elif verb in closing:
            if not stack or stack[-1] != name:
                faults.append(f"{line}, where {stack[-1] if stack else 'nothing'} was the last opened")
            if name in stack:
                stack.remove(name)
    return faults + [f"{name} was never closed" for name in stack]
