"""What goes out to one client, without ever making the machine wait for it.

A line goes to the transport at once if it takes it; the rest waits here for `flush`. Replies are bounded by their
session, which reads no further request while many are unsent. Events come unasked, so they are bounded here: a client
that lets too many pile up is dropped.
"""

from __future__ import annotations

from collections import deque
from itertools import groupby
from typing import TYPE_CHECKING, Final, final

import attrs
import trio

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmm.monitor.ports import Transport


@final
@attrs.frozen
class Bounds:
    """How much may be unsent: of events, before the client is dropped; of all, before no more requests are read."""

    events: int = 10_000
    event_bytes: int = 16 << 20
    reading_stops_at: int = 256 << 10


@final
class Output:
    """The unsent lines of one client."""

    def __init__(self, transport: Transport, bounds: Bounds) -> None:
        self._transport: Final = transport
        self._bounds: Final = bounds
        self._lines: deque[tuple[bytes, bool]] = deque()  # each with whether it is an event
        self._size = 0
        self._events = 0
        self._event_bytes = 0
        self._filled = trio.lowlevel.ParkingLot()
        self._drained = trio.lowlevel.ParkingLot()
        self._held = False
        self.gone = False
        """The client hung up or was dropped; whatever is put is discarded."""
        self.dropped = ""
        """Why the client was dropped, for the log."""

    @property
    def unsent(self) -> bytes:
        """What was put and not sent."""
        return b"".join(line for line, _ in self._lines)

    @property
    def unsent_runs(self) -> list[tuple[bytes, bool]]:
        """The same in runs of events, and of what is none; each with whether it is of events."""
        runs = groupby(self._lines, key=lambda line: line[1])
        return [(b"".join(line for line, _ in lines), events) for events, lines in runs]

    def put_runs(self, runs: Iterable[tuple[bytes, bool]]) -> None:
        """Send what another output returned as `unsent_runs`."""
        for data, events in runs:
            for line in data.splitlines(keepends=True) if events else [data]:
                self.put(line, event=events)

    @property
    def has_room(self) -> bool:
        """Whether further requests should be read."""
        return self._size < self._bounds.reading_stops_at

    def put(self, line: bytes, *, event: bool = False) -> None:
        """Send `line`, now or later. Neither raises nor waits."""
        if self.gone:
            return
        if not self._lines and not self._held:
            try:
                sent = self._transport.send_nowait(line)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self.hang_up()
                return
            if sent == len(line):
                return
            line = line[sent:]
        self._lines.append((line, event))
        self._size += len(line)
        if event:
            self._events += 1
            self._event_bytes += len(line)
            if self._events > self._bounds.events or self._event_bytes > self._bounds.event_bytes:
                self.drop(f"did not read {self._events} events ({self._event_bytes} bytes)")
        self._filled.unpark_all()

    def hold(self) -> None:
        """Send nothing from now on; what is put piles up."""
        self._held = True

    def release(self) -> None:
        """Send again."""
        self._held = False
        self._filled.unpark_all()

    def drop(self, why: str) -> None:
        """Hang up on the client for `why`, words that follow "the client"."""
        self.dropped = why
        self.hang_up()

    def hang_up(self) -> None:
        """Close the transport and forget what is unsent."""
        self.gone = True
        self._lines.clear()
        self._size = self._events = self._event_bytes = 0
        self._transport.close()
        self._drained.unpark_all()

    async def wait_room(self) -> None:
        """Wait until further requests should be read, or the client is gone."""
        while not self.has_room:
            await self._drained.park()

    async def wait_flushed(self) -> None:
        """Wait until all is sent, or the client is gone."""
        while self._lines:
            await self._drained.park()

    async def flush(self) -> None:
        """Send what could not be sent at once. Runs until the client is gone or it is cancelled."""
        while not self.gone:
            if self._held or not self._lines:
                await self._filled.park()
                continue
            try:
                await self._transport.wait_sendable()
                if self._held or not self._lines:
                    continue
                line, event = self._lines[0]
                sent = self._transport.send_nowait(line)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self.hang_up()
                return
            self._size -= sent
            if event:
                self._event_bytes -= sent
            if sent == len(line):
                self._events -= event
                self._lines.popleft()
            else:
                self._lines[0] = (line[sent:], event)
            self._drained.unpark_all()
