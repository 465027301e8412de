"""Commands that only wait, sent back to whoever asked: they have had no effect, and can be begun anew elsewhere.

A guest may be given away, and the sessions of its monitors with it, while a command waits for its turn. Where commands
wait, they wait by `Deferral.wait`; then it can be said of every other that it is finished in a moment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

import trio

from vmm.errors import CommandDeferred

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


@final
class Deferral:
    """Whether commands are deferred, and those that would be. On the loop."""

    def __init__(self) -> None:
        self._waiting: Final[set[trio.CancelScope]] = set()
        self._on = False
        self._over = trio.Event()

    def begin(self) -> None:
        """Defer all that wait, and those that would."""
        if not self._on:
            self._on, self._over = True, trio.Event()
            for scope in self._waiting:
                scope.cancel()

    def end(self) -> None:
        """Let commands wait again. Harmless if there is nothing to end."""
        self._on = False
        self._over.set()

    async def over(self) -> None:
        """Wait until commands are no longer deferred."""
        if self._on:
            await self._over.wait()

    async def wait(self, acquire: Callable[[], Awaitable[None]]) -> None:
        """Await `acquire()`, in which a command waits for its turn without having done anything.

        Raises:
            CommandDeferred: instead; then nothing was acquired.
        """
        if not self._on:
            with trio.CancelScope() as scope:
                self._waiting.add(scope)
                try:
                    await acquire()
                    return
                finally:
                    self._waiting.discard(scope)
        raise CommandDeferred
