"""Events: what happens to the machine, told to every client in command mode.

An event is encoded once, when somebody is told of it. Events whose rate is limited are told at once if the last one of
their kind is longer ago than the interval; of those in between, only the last is told, when the interval is over.

Events are numbered from 1. The number is not part of QMP; a transport whose clients come back (websocket) may show
it, and ask with `since` for what they missed.

Everything here belongs to the loop's thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Final, final

import attrs
import trio

from vmm.monitor.arguments import unstructure
from vmm.monitor.json_text import encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


@final
@attrs.frozen
class Event:
    """One kind of event. It is told at most once in `interval` seconds for each value of its data's member `key`."""

    name: str
    data: type | None = None
    interval: float = 0.0
    key: str | None = None


@final
@attrs.frozen(slots=False)
class Occurrence:
    """One event that was told."""

    number: int
    body: Mapping[str, object]

    @cached_property
    def line(self) -> bytes:
        """The body as it goes to a client that did not ask for `pretty`, with its line end."""
        return f"{encode(self.body)}\r\n".encode()


@final
@attrs.define
class _Limited:
    """The present interval of one rate-limited event: when it ends, and what to tell then."""

    ends: float
    held: dict[str, object] | None = None


@final
class EventHub:
    """Tells events to whoever subscribed.

    `history` is the number of events that `since` remembers. `now` gives the time for timestamps, in nanoseconds
    since 1970; intervals go by the loop's clock. Rate-limited events need `serve` to run.
    """

    def __init__(self, events: Iterable[Event], *, history: int = 1024, now: Callable[[], int] = time.time_ns) -> None:
        self._events: Final = {event.name: event for event in events}
        self._now = now
        self._subscribers: dict[Callable[[Occurrence], None], None] = {}
        self._last = 0
        self._history: deque[Occurrence] = deque(maxlen=history)
        self._limited: dict[tuple[str, object], _Limited] = {}
        self._limits_changed = trio.Event()
        self._held: list[Occurrence] | None = None

    def __iter__(self) -> Iterator[Event]:
        return iter(self._events.values())

    @property
    def last(self) -> int:
        """The number of the last event, 0 before the first."""
        return self._last

    def subscribe(self, tell: Callable[[Occurrence], None]) -> None:
        """Call `tell` with each event from now on. It must neither raise nor wait."""
        self._subscribers[tell] = None

    def unsubscribe(self, tell: Callable[[Occurrence], None]) -> None:
        """Undo `subscribe`; harmless if there is nothing to undo."""
        self._subscribers.pop(tell, None)

    def since(self, number: int) -> tuple[Occurrence, ...] | None:
        """Return the events after `number`; None if some of them are forgotten, or `number` was never given."""
        missed = self._last - number
        if not 0 <= missed <= len(self._history):
            return None
        return tuple(self._history)[len(self._history) - missed :]

    def emit(self, name: str, data: object = None, *, at: int | None = None) -> None:
        """Tell the event `name`. `data` is an object of the event's class, or a mapping of wire names.

        `at` is when it was, CLOCK_REALTIME in ns, where that is not now.

        Raises:
            KeyError: no such event is declared, which is a bug.
        """
        event = self._events[name]
        body: dict[str, object] = {"event": name}
        if data is not None:
            body["data"] = unstructure(data)
        seconds, nanoseconds = divmod(self._now() if at is None else at, 1_000_000_000)
        body["timestamp"] = {"seconds": seconds, "microseconds": nanoseconds // 1000}
        if event.interval > 0:
            self._emit_limited(event, body)
        else:
            self._tell(body)

    def _emit_limited(self, event: Event, body: dict[str, object]) -> None:
        data = body.get("data")
        which = (event.name, data.get(event.key) if event.key and isinstance(data, dict) else None)
        limited = self._limited.get(which)
        if limited is not None:
            limited.held = body
            return
        self._limited[which] = _Limited(trio.current_time() + event.interval)
        self._limits_changed.set()
        self._tell(body)

    def _tell(self, body: dict[str, object]) -> None:
        self._last += 1
        occurrence = Occurrence(self._last, body)
        self._history.append(occurrence)
        if self._held is not None:
            self._held.append(occurrence)
        else:
            self._tell_all(occurrence)

    def _tell_all(self, occurrence: Occurrence) -> None:
        for tell in tuple(self._subscribers):
            tell(occurrence)

    def hold(self) -> None:
        """Tell nothing until `release`: whoever is told has work to do, for which this is no time."""
        if self._held is None:
            self._held = []

    def release(self) -> None:
        """Tell what was held, in order. Idempotent; harmless without `hold`."""
        held, self._held = self._held, None
        for occurrence in held or ():
            self._tell_all(occurrence)

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Tell the events that were held back, each when its interval is over. Runs until it is cancelled."""
        task_status.started()
        while True:
            self._limits_changed = trio.Event()
            ends = min((limited.ends for limited in self._limited.values()), default=float("inf"))
            with trio.move_on_at(ends):
                await self._limits_changed.wait()
            for which, limited in list(self._limited.items()):
                if limited.ends > trio.current_time():
                    continue
                if limited.held is None:
                    del self._limited[which]
                else:
                    limited.ends = trio.current_time() + self._events[which[0]].interval
                    body, limited.held = limited.held, None
                    self._tell(body)
