"""Decisions that a phase waits for: posted by a handler, carried out by the phase's body."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, final

import trio

from vmm.errors import InvalidState, VmmError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

ValueT = TypeVar("ValueT")


@final
class Turn(Generic[ValueT]):
    """A request that a handler posts and a phase's body carries out, after the handler has left the window.

    Awaiting it gives None when the machine has got where the request leads, or raises what kept it from there.
    """

    def __init__(self, value: ValueT, *, until: str | None = None) -> None:
        self.value: Final = value
        self.until: Final = until
        """Name of the phase whose window settles the turn; None for whichever opens next."""
        self.taken = False
        """Whether a phase has begun to carry it out, or has looked at it."""
        self._settled = trio.Event()
        self._error: VmmError | None = None
        self._callbacks: list[Callable[[], None]] = []

    @property
    def settled(self) -> bool:
        """Whether the outcome is known."""
        return self._settled.is_set()

    @property
    def failed(self) -> bool:
        """Whether the outcome is known to be an error."""
        return self._error is not None

    def succeed(self) -> None:
        """Settle with success. Later settlements change nothing."""
        self._settle(None)

    def fail(self, error: VmmError) -> None:
        """Settle with `error`. Later settlements change nothing."""
        self._settle(error)

    def _settle(self, error: VmmError | None) -> None:
        if not self._settled.is_set():
            self._error = error
            self._settled.set()
            for callback in self._callbacks:
                callback()

    def on_settled(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the turn is settled, at once if it is."""
        if self._settled.is_set():
            callback()
        else:
            self._callbacks.append(callback)

    async def wait(self) -> None:
        """Await it."""
        await self

    async def wait_settled(self) -> None:
        """Wait until the outcome is known, whatever it is. Whoever awaits the turn hears of an error."""
        await self._settled.wait()

    def __await__(self) -> Generator[Any, None, None]:
        yield from self._settled.wait().__await__()
        if self._error is not None:
            raise self._error


@final
class Inbox(Generic[ValueT]):
    """Where a lingering phase waits for the decision that moves it on."""

    def __init__(self, phase: str) -> None:
        self._phase = phase
        self._turns: list[Turn[ValueT]] = []
        self._arrived = trio.Event()
        self._closed = False

    def post(self, value: ValueT, *, until: str | None = None) -> Turn[ValueT]:
        """Post `value`. Never blocks."""
        turn = Turn(value, until=until)
        self.post_turn(turn)
        return turn

    def post_turn(self, turn: Turn[ValueT]) -> None:
        """Post a turn that was made before. Never blocks."""
        if self._closed:
            turn.fail(left(self._phase))
            return
        self._turns.append(turn)
        self._arrived.set()

    async def take(self) -> Turn[ValueT]:
        """Wait for the next decision."""
        while not self._turns:
            self._arrived = trio.Event()
            await self._arrived.wait()
        turn = self._turns.pop(0)
        turn.taken = True
        return turn

    def close(self) -> None:
        """Fail what is still posted, and all that comes."""
        self._closed = True
        for turn in self._turns:
            turn.fail(left(self._phase))
        self._turns.clear()


def left(phase: str) -> InvalidState:
    """Return what a decision fails with that comes, or is still there, when `phase` has been left."""
    return InvalidState(
        what="This decision",
        state=f"once phase {phase} has been left",
        instead="query-machine-phase says where the machine is",
    )
