"""Threads that share one migration's pages, each with a channel of its own: who waits for whom.

All of it is waited for without a look at a bell: whoever cancels them calls `abort`, which wakes them all.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Final, Generic, TypeVar, final

from vmm.migration.pump import ChannelBroken

JobT = TypeVar("JobT")

_FOREVER: Final = 1 << 62
"""More passes than there can be."""
_WAITING: Final = 2
"""Jobs that wait for a thread at most, besides that which it is at."""


class Aborted(ChannelBroken):
    """The others have stopped. Why, one of them says."""


@final
class JobQueues(Generic[JobT]):
    """A queue for each of some threads, and whoever fills them."""

    def __init__(self, threads: int) -> None:
        self._turn: Final = threading.Condition()
        self._jobs: Final[list[deque[JobT]]] = [deque() for _ in range(threads)]
        self._open = [0] * threads
        self._ended = False
        self._aborted = False

    def put(self, thread: int, job: JobT) -> None:
        """Add a job for thread number `thread`, waiting for room. Raises `Aborted`."""
        with self._turn:
            while len(self._jobs[thread]) >= _WAITING and not self._aborted:
                self._turn.wait()
            self._require_going()
            self._jobs[thread].append(job)
            self._open[thread] += 1
            self._turn.notify_all()

    def take(self, thread: int) -> JobT | None:
        """Return the next job of a thread, waiting for it; None if none will come. Raises `Aborted`."""
        with self._turn:
            while not self._jobs[thread] and not self._ended and not self._aborted:
                self._turn.wait()
            self._require_going()
            if not self._jobs[thread]:
                return None
            job = self._jobs[thread].popleft()
            self._turn.notify_all()
            return job

    def done(self, thread: int) -> None:
        """Note that the thread's last job is done."""
        with self._turn:
            self._open[thread] -= 1
            self._turn.notify_all()

    def drain(self) -> None:
        """Wait until all jobs are done. Raises `Aborted`."""
        with self._turn:
            while any(self._open) and not self._aborted:
                self._turn.wait()
            self._require_going()

    def end(self) -> None:
        """Let `take` return None once nothing is left; `begin` undoes it."""
        with self._turn:
            self._ended = True
            self._turn.notify_all()

    def begin(self) -> None:
        """Let `take` wait."""
        with self._turn:
            self._ended = False

    @property
    def over(self) -> bool:
        """Whether there is nothing left to do, nor will there be."""
        with self._turn:
            return self._ended and not any(self._open)

    def abort(self) -> None:
        """Wake whoever waits, for good."""
        with self._turn:
            self._aborted = True
            self._turn.notify_all()

    def _require_going(self) -> None:
        if self._aborted:
            raise Aborted


@final
class PassGate:
    """Keeps the threads of a destination together: none is in a pass before all have ended the one before.

    The threads of the channels say `ended` at the end of each pass, that of the stream `begins` at the beginning.
    """

    def __init__(self, threads: int) -> None:
        self._turn: Final = threading.Condition()
        self._passes = [0] * threads  # ended
        self._stream = 0  # the pass that the stream is in
        self._aborted = False

    def ended(self, thread: int, number: int) -> None:
        """Note that a channel has ended pass `number`; wait until the next one may begin. Raises `Aborted`."""
        with self._turn:
            self._passes[thread] = number
            self._turn.notify_all()
            while self._stream <= number and not self._aborted:
                self._turn.wait()
            self._require_going()

    def begins(self, number: int) -> None:
        """Wait until every channel has ended the pass before `number`; then let them go on. Raises `Aborted`."""
        with self._turn:
            while min(self._passes) < number - 1 and not self._aborted:
                self._turn.wait()
            self._require_going()
            self._stream = number
            self._turn.notify_all()

    def release(self) -> None:
        """Let them go on to their end: the stream has no further pass."""
        with self._turn:
            self._stream = _FOREVER
            self._turn.notify_all()

    def left(self, thread: int) -> None:
        """Note that a channel has come to its end: nobody waits for it any more."""
        with self._turn:
            self._passes[thread] = _FOREVER
            self._turn.notify_all()

    def abort(self) -> None:
        """Wake whoever waits, for good."""
        with self._turn:
            self._aborted = True
            self._turn.notify_all()

    def _require_going(self) -> None:
        if self._aborted:
            raise Aborted
