"""The gaps between the ticks of the guest `heartbeat`, on the host's clock."""

from __future__ import annotations

import struct
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Final, final

import attrs

from bench.machines import BenchFailed
from vmm.guests.heartbeat import read_header

if TYPE_CHECKING:
    from vmm.guests.heartbeat import HeartbeatHeader, Read

_ENTRY: Final = struct.Struct("<IIQ")  # vmm/guests/layout.h, struct ring_entry

SAMPLES: Final = 40
"""Looks at the newest tick. One that is caught right after it came tells how the two clocks stand to each other."""


@final
@attrs.frozen
class Gap:
    """The time between two ticks; times are in milliseconds, on CLOCK_REALTIME where they are absolute."""

    began: float
    ended: float

    @property
    def length(self) -> float:
        """How long it was."""
        return self.ended - self.began


def gaps_from(read: Read, first: int) -> list[Gap]:
    """Return the gaps between all ticks since the one numbered `first`. The guest must be ticking."""
    header = _header(read)
    offset = offset_of(read)
    if header.head - first >= header.ring_entries:
        raise BenchFailed(f"{header.head - first} ticks are more than the guest keeps")
    times = [_time(read, header, number) + offset for number in range(first, header.head)]
    return [Gap(*pair) for pair in pairwise(times)]


def newest(read: Read) -> int:
    """Return the number of ticks so far; 0 as long as the guest has not started."""
    header = read_header(read)
    return header.head if header is not None else 0


def offset_of(read: Read) -> float:
    """Return how far the host's clock is ahead of the guest's, in ms. The guest must be ticking."""
    return min(_sample(read) for _ in range(SAMPLES))


@final
@attrs.frozen
class Bearing:
    """How the two clocks stood to each other, in ms: at `guest` on the guest's, the host's was `ahead` of it."""

    guest: float
    ahead: float

    def drift_to(self, later: Bearing) -> float:
        """Return by how much the host's clock gains on the guest's, whose rate the guest may have had to measure."""
        return (later.ahead - self.ahead) / (later.guest - self.guest)

    def on_host(self, guest: float, drift: float) -> float:
        """Return when it was `guest` on the guest's clock, on the host's."""
        return guest + self.ahead + drift * (guest - self.guest)


def bearing_of(read: Read) -> Bearing:
    """Take a bearing. The guest must be ticking."""
    ahead = offset_of(read)
    return Bearing(tick_at(read, newest(read) - 1), ahead)


def tick_at(read: Read, number: int) -> float:
    """Return when the guest ticked for the time `number`, counted from 0, in ms on its own clock."""
    return _time(read, _header(read), number)


def period_of(read: Read) -> float:
    """Return the time between two ticks in ms, as the guest was told to have it."""
    return 1000 / _header(read).rate_hz


def _header(read: Read) -> HeartbeatHeader:
    header = read_header(read)
    if header is None:
        raise BenchFailed("the guest heartbeat has not started")
    return header


def _time(read: Read, header: HeartbeatHeader, number: int) -> float:
    slot = header.ring_address + number % header.ring_entries * _ENTRY.size
    tsc: int = _ENTRY.unpack(read(slot, _ENTRY.size))[2]
    return tsc / header.tsc_khz


def _sample(read: Read) -> float:
    """Return how far the host's clock is ahead of the guest's newest tick."""
    header = _header(read)
    ahead = time.time() * 1e3 - _time(read, header, header.head - 1)
    time.sleep(0.0003)
    return ahead
