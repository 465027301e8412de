"""Where the threads of vCPUs wait for a guest that is not theirs to run yet, and where they are seen to leave it.

For both ends of the guest's pause. The loop waits here for threads without a turn of its own, at most for a moment.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final, final

import trio

if TYPE_CHECKING:
    from vmm.kvm.exits import Stop

_MOMENT: Final = 0.002
"""Seconds that the loop waits at most for threads that were let in: as long as they need, and no longer where the host
is too busy to run them."""


class GivenUp(Exception):
    """The guest is not to be run; not an error."""


@final
class StartingGates:
    """A gate for each of some threads. They are let in all together, or sent home.

    A start inside the guest's pause then makes no thread and no task, and each thread needs the interpreter once.
    """

    def __init__(self, parties: int) -> None:
        self._gates: Final = [threading.Lock() for _ in range(parties)]
        for gate in self._gates:
            gate.acquire()
        self._waiting = list(self._gates)
        self._here = 0
        self._all_here = trio.Event()
        self._loop: Final = trio.lowlevel.current_trio_token()
        self._given_up = False
        self._entries: list[int] = []
        self._to_pass = list(range(parties))  # from which each takes one at once with nobody else, the last takes 0
        self._all_passed = threading.Lock()
        self._all_passed.acquire()

    def passed(self) -> int:
        """Wait to be let in; return when that was, CLOCK_MONOTONIC in ns. Called once on each thread.

        Raises:
            GivenUp: it was sent home.
        """
        gate = self._waiting.pop()
        self._loop.run_sync_soon(self._arrived)
        gate.acquire()
        if self._given_up:
            raise GivenUp
        now = time.monotonic_ns()
        self._entries.append(now)
        if self._to_pass.pop() == 0:
            self._all_passed.release()
        return now

    def _arrived(self) -> None:
        self._here += 1
        if self._here == len(self._gates):
            self._all_here.set()

    async def all_there(self) -> None:
        """Wait until every thread waits, or is about to."""
        await self._all_here.wait()

    def open(self) -> None:
        """Let all in."""
        for gate in self._gates:
            gate.release()

    def give_up(self) -> None:
        """Send all home."""
        self._given_up = True
        self.open()

    def first_entry(self) -> int | None:
        """Wait a moment for all that were let in; return when the first of them was about to enter, if it was."""
        self._all_passed.acquire(timeout=_MOMENT)
        return self._entries[0] if self._entries else None


@final
class Exits:
    """Counts threads that have left the guest."""

    def __init__(self, parties: int) -> None:
        self._to_come: Final = list(range(parties))  # as in `StartingGates`
        self._stops: Final[list[Stop]] = []
        self._all: Final = threading.Lock()
        self._all.acquire()

    def note(self, stop: Stop) -> None:
        """Note that a thread is out, and why. Called once on each."""
        self._stops.append(stop)
        if self._to_come.pop() == 0:
            self._all.release()

    def are_all_kicked(self) -> bool:
        """Wait a moment for all of them; say whether they are out, and for no reason but a kick."""
        if not self._all.acquire(timeout=_MOMENT):
            return False
        self._all.release()
        return all(stop.reason == "kicked" for stop in self._stops)
