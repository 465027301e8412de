"""Which of the gaps between a guest's ticks is the one that a pause made: the guest's clock against the host's."""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import TYPE_CHECKING, Final, final

from vmm.guests.heartbeat import read_header

if TYPE_CHECKING:
    from vmm.guests.heartbeat import HeartbeatHeader, Read

_ENTRY: Final = struct.Struct("<IIQ")
_SLACK: Final = 1.0
"""Milliseconds by which the two clocks may be apart as they are compared here."""


@final
class TickClock:
    """Learns how the guest's TSC relates to the wall clock, from its newest tick, which is the better the younger."""

    def __init__(self) -> None:
        self._offset = float("inf")

    def sample(self, read: Read, now: float) -> int:
        """Compare the clocks; `now` is the wall clock's, in ms. Return how many ticks there are."""
        header = read_header(read)
        if header is None or not header.head:
            return 0
        (_, _, tsc), *_ = _entries(read, header, header.head - 1, header.head)
        self._offset = min(self._offset, now - tsc / header.tsc_khz)
        return header.head

    def gaps(self, read: Read, began: float, ended: float) -> tuple[float, float]:
        """Return the longest time between two ticks around the pause, from `began` to `ended`, and else; all in ms."""
        header = read_header(read)
        assert header is not None, "the guest has ticked before"
        first = max(0, header.head - header.ring_entries + 1)
        times = [tsc / header.tsc_khz for _, _, tsc in _entries(read, header, first, header.head)]
        around = other = 0.0
        for tick, following in pairwise(times):
            inside = tick + self._offset < ended + _SLACK and following + self._offset > began - _SLACK
            around, other = (max(around, following - tick), other) if inside else (around, max(other, following - tick))
        return around, other


def _entries(read: Read, header: HeartbeatHeader, first: int, end: int) -> list[tuple[int, int, int]]:
    """Read the ring's entries of ticks `first` to `end`."""
    ring = read(header.ring_address, header.ring_entries * _ENTRY.size) if end - first > 1 else b""
    if not ring:
        return [_ENTRY.unpack(read(header.ring_address + first % header.ring_entries * _ENTRY.size, _ENTRY.size))]
    return [_ENTRY.unpack_from(ring, tick % header.ring_entries * _ENTRY.size) for tick in range(first, end)]
