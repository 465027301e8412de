"""The guest's output between a vCPU thread and the loop."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, final

from vmm.backends.chardev_state import BUFFER_LIMIT

if TYPE_CHECKING:
    from collections.abc import Callable, Generator


@final
class OutputBuffer:
    """At most `BUFFER_LIMIT` bytes. Any thread puts; the loop takes. No call waits for anything but the lock.

    It keeps what is put, or drops it (nobody is there to read), or refuses it (at rest). `ring` wakes the loop, from
    any thread, when there is something to take where there was nothing.
    """

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring: Final = ring
        self._lock: Final = threading.Lock()
        self._data = bytearray()
        self._limit = BUFFER_LIMIT
        self._drops = False
        self._short = False
        self._gathers = False

    # --- any thread ---

    def put(self, data: bytes) -> int:
        """Take bytes of `data` from its front; return how many."""
        with self._lock:
            if self._drops:
                return len(data)
            held = len(self._data)
            room = self._limit - held
            rings = not (held or self._gathers)
            if len(data) >= room:
                rings = True
                if len(data) > room:
                    self._short = True
                    data = data[: max(0, room)]
            self._data += data
        if rings and data:
            self._ring()
        return len(data)

    def room(self) -> int:
        """Return how many bytes `put` would take now. If none, the producer is told when that changes."""
        with self._lock:
            if self._drops:
                return BUFFER_LIMIT
            room = max(0, self._limit - len(self._data))
            if not room:
                self._short = True
            return room

    # --- the loop ---

    @property
    def held(self) -> int:
        """How many bytes there are to take, or a little more by now."""
        return len(self._data)

    def peek(self, limit: int) -> bytes:
        """Return the first bytes, at most `limit`, and leave them where they are."""
        with self._lock:
            return bytes(self._data[:limit])

    def sent(self, count: int) -> bool:
        """Forget the first `count` bytes. Returns whether the producer had found no room since it was told last."""
        with self._lock:
            del self._data[:count]
            return self._producer_was_short()

    @contextmanager
    def gathering(self) -> Generator[None, None, None]:
        """Ring only when there is more than there is room for: the loop looks again soon, by itself."""
        self._gathers = True
        try:
            yield
        finally:
            self._gathers = False

    def keep(self) -> None:
        """Keep what is put from now on."""
        with self._lock:
            self._limit = BUFFER_LIMIT
            self._drops = False

    def drop(self) -> bool:
        """Drop what is held, and what is put from now on. Returns what `sent` does."""
        with self._lock:
            self._data.clear()
            self._drops = True
            return self._producer_was_short()

    def drop_new(self) -> None:
        """Drop what is put from now on; what is held can still be taken."""
        with self._lock:
            self._drops = True

    def refuse(self) -> None:
        """Take nothing from now on: what is held is all there is."""
        with self._lock:
            self._limit = 0
            self._drops = False

    def load(self, content: bytes) -> None:
        """Put what a predecessor held before all else."""
        with self._lock:
            self._data[:0] = content

    def _producer_was_short(self) -> bool:
        short, self._short = self._short, False
        return short
