"""Tasks that a phase leaves behind, which end in the reverse order of their start.

Nesting of nurseries alone does not give that order when a cancel comes from outside: trio delivers it to every task at
once. So each resident runs in a shielded scope of its own, and whoever opened the phase cancels these scopes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar, final

import attrs
import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

ValueT = TypeVar("ValueT")


@final
class _ShieldingStatus(Generic[ValueT]):
    """Passes `started` on, and shields the resident from then on: until then its starter's cancel must reach it.

    It must reach it afterwards too if it came just before: then trio leaves the task with its starter, who waits for
    the task's end and would wait for ever.
    """

    def __init__(self, scope: trio.CancelScope, status: trio.TaskStatus[ValueT], nursery: trio.Nursery) -> None:
        self._scope = scope
        self._status = status
        self._nursery = nursery
        self._task = trio.lowlevel.current_task()

    def started(self, value: Any = None) -> None:
        self._status.started(value)
        self._scope.shield = self._task.parent_nursery is self._nursery


@final
@attrs.define(eq=False)
class Resident:
    """A task that a phase leaves behind."""

    name: str
    _scope: trio.CancelScope = attrs.Factory(trio.CancelScope)
    _left: trio.Event = attrs.Factory(trio.Event)

    async def leave(self) -> None:
        """Cancel the task and wait until it has left. The task bounds its own clean-up."""
        self._scope.cancel()
        await self._left.wait()


@final
class Residents:
    """The tasks of one phase that outlive its window. They end in the reverse order of their start."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._here: list[Resident] = []

    @property
    def names(self) -> list[str]:
        """Names of the tasks, oldest first."""
        return [resident.name for resident in self._here]

    def start_soon(self, name: str, fn: Callable[..., Awaitable[object]], *args: Any) -> Resident:
        """Start `fn(*args)` as a resident, without waiting for anything."""
        resident = Resident(name)
        resident._scope.shield = True
        self._here.append(resident)
        self._nursery.start_soon(self._run, resident, fn, *args, name=name)
        return resident

    async def start(self, name: str, fn: Callable[..., Awaitable[object]], *args: Any) -> Resident:
        """Start `fn(*args, task_status=...)` and return when it has called `task_status.started()`."""
        resident = Resident(name)
        await self._nursery.start(self._run_started, resident, fn, *args, name=name)
        return resident

    async def _run(self, resident: Resident, fn: Callable[..., Awaitable[object]], *args: Any) -> None:
        try:
            with resident._scope:
                await fn(*args)
        finally:
            self._here.remove(resident)
            resident._left.set()

    async def _run_started(
        self,
        resident: Resident,
        fn: Callable[..., Awaitable[object]],
        *args: Any,
        task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        self._here.append(resident)
        status = _ShieldingStatus(resident._scope, task_status, self._nursery)

        async def with_status() -> None:
            await fn(*args, task_status=status)

        await self._run(resident, with_status)

    async def leave_all(self) -> None:
        """Cancel all of them, last started first, each once the one before has left."""
        while self._here:
            await self._here[-1].leave()
