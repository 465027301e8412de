"""Read what the guests `heartbeat`, `deadline` and `dirtier` recorded in their RAM, and judge it.

The layout is that of `layout.h`, beside this file; `tests/guests/test_heartbeat.py` compares the two. A reader may look
while the guest runs: entries below `head` are complete, and those that could have been overwritten while they were read
are left out.

What the counts mean, for somebody who moved or updated a guest under way:

    sequence gaps   ticks below `head` whose entry is not there: RAM lost writes
    repeats         entries that changed after they had been read, or a `head` that went back: the guest ran twice
    torn            entries or pages that are half one thing and half another
    lost, repeated  pages of the checked region, as the guest itself found them on its next pass
    largest gap     the longest time the guest did not tick: what it felt of a pause
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import ClassVar, Final, final

import attrs

from vmm.errors import StateRejected

Read = Callable[[int, int], bytes]
"""Reads `size` bytes of guest-physical memory at `address`."""

HEADER_ADDRESS: Final = 0x0020_0000
MAGIC: Final = 0x5441_4542
VERSION: Final = 1
RING_CHECK: Final = 0x4B43_4954
RING_LIMIT: Final = 65536
PIT_HZ: Final = 1193182

HEARTBEAT: Final = 1
DEADLINE: Final = 2
DIRTIER: Final = 3

_ENTRY: Final = struct.Struct("<IIQ")
_LOW: Final = 0xFFFF_FFFF


@final
@attrs.frozen
class HeartbeatHeader:
    """The header as the guest keeps it; fields as in `struct header` of layout.h, in that order."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<10I5Q4IQ6I")

    magic: int
    version: int
    guest: int
    rate_hz: int
    tsc_khz: int
    tsc_source: int
    period_tsc: int
    ring_address: int
    ring_entries: int
    lines: int
    head: int
    largest_gap: int
    largest_gap_tick: int
    missed: int
    late: int
    region_address: int
    region_pages: int
    region_generation: int
    region_cursor: int
    pages_checked: int
    lost: int
    repeated: int
    torn: int
    first_bad_kind: int
    first_bad_address: int
    reserved: int


def read_header(read: Read) -> HeartbeatHeader | None:
    """Read the header, or return None as long as no such guest has started.

    Raises:
        StateRejected: the guest's layout is not the one read here, or makes no sense.
    """
    header = HeartbeatHeader(*HeartbeatHeader.LAYOUT.unpack(read(HEADER_ADDRESS, HeartbeatHeader.LAYOUT.size)))
    if header.magic != MAGIC:
        return None
    faults = []
    if header.version != VERSION:
        faults.append(f"version {header.version}, {VERSION} is read here")
    if header.guest not in (HEARTBEAT, DEADLINE, DIRTIER):
        faults.append(
            f"guest {header.guest} is none of {HEARTBEAT} (heartbeat), {DEADLINE} (deadline) and {DIRTIER} (dirtier)"
        )
    if header.ring_entries.bit_count() != 1 or header.ring_entries > RING_LIMIT:
        faults.append(f"a ring of {header.ring_entries} entries, not a power of two up to {RING_LIMIT}")
    if not (header.rate_hz and header.tsc_khz and header.period_tsc):
        faults.append(f"rate {header.rate_hz} Hz, TSC {header.tsc_khz} kHz and period {header.period_tsc} have a zero")
    if faults:
        raise StateRejected(section="heartbeat header", faults=tuple(faults))
    return header


@final
@attrs.frozen(kw_only=True)
class HeartbeatReport:
    """What one look at the guest found. Times are by the guest's TSC.

    The counts of ticks and pages since the guest's start come from its header; the others are of this look's window,
    which reaches from the last look (or the oldest entry in the ring) to the newest tick.
    """

    header: HeartbeatHeader
    tsc_khz: int
    ticks: int
    """Ticks since the guest started."""
    window: int
    """Entries examined."""
    expected: float
    """Ticks that the time between the window's first and last tick has room for; `window - 1` if none is missing."""
    sequence_gaps: int
    repeats: int
    torn: int
    backwards: int
    """Ticks whose time stamp is not later than the one before."""
    window_gap_ms: float
    """Longest time between two ticks of the window."""
    gaps_ms: tuple[float, ...]
    """Every time between two ticks of the window that is longer than 1.5 periods, oldest first."""

    @property
    def largest_gap_ms(self) -> float:
        """Longest time between two ticks since the guest started."""
        return self.header.largest_gap / self.tsc_khz

    @property
    def missing(self) -> float:
        """Ticks of the window that never came, to about one; below zero if some came too many."""
        return self.expected - max(self.window - 1, 0)

    @property
    def region_faults(self) -> int:
        """Pages that the guest did not find as it had left them."""
        return self.header.lost + self.header.repeated + self.header.torn

    @property
    def intact(self) -> bool:
        """Nothing lost, repeated or torn. Late ticks are no damage; see `gaps_ms` for them."""
        return not (self.sequence_gaps or self.repeats or self.torn or self.backwards or self.region_faults)

    def __str__(self) -> str:
        head = self.header
        text = (
            f"{self.ticks} ticks, largest gap {self.largest_gap_ms:.2f} ms; {head.pages_checked} pages checked; "
            f"ring: {self.sequence_gaps} lost, {self.repeats} repeated, {self.torn} torn, {self.backwards} backwards; "
            f"pages: {head.lost} lost, {head.repeated} repeated, {head.torn} torn"
        )
        return f"{text}, first at {head.first_bad_address:#x}" if head.first_bad_kind else text


@final
class HeartbeatReader:
    """Looks at one guest again and again.

    `read` may be that of the process before a live update at one look and of the one after it at the next: use
    `follow`. Not for several threads at once. Give `tsc_khz` where KVM's own figure is known (KVM_GET_TSC_KHZ): the
    guest may have had to measure it, to about 0.1 %.
    """

    def __init__(self, read: Read, *, tsc_khz: int | None = None) -> None:
        self._read = read
        self._tsc_khz = tsc_khz
        self._next = 0
        self._last: tuple[int, int] | None = None  # number and TSC of the newest tick seen

    def follow(self, read: Read) -> None:
        """Go on in another process's view of the same RAM."""
        self._read = read

    def look(self) -> HeartbeatReport | None:
        """Examine what is new since the last look; None as long as no such guest has started.

        Reads up to 1 MiB of guest memory and takes up to some 50 ms of processor time for a full ring.

        Raises:
            StateRejected: as `read_header`.
        """
        header = read_header(self._read)
        if header is None:
            return None
        repeats = self._check_past(header)
        first = max(self._next, header.head - header.ring_entries)
        entries = self._entries(header, first)
        after = read_header(self._read)
        if after is not None:  # what the guest may have overwritten meanwhile: its next entry's slot included
            first_safe = max(first, after.head + 1 - header.ring_entries)
            entries, first = entries[first_safe - first :], first_safe
        return self._judge(header, first, entries, repeats)

    def _check_past(self, header: HeartbeatHeader) -> int:
        """Return 1, and start afresh, if what the last look saw is no longer so."""
        if self._last is None:
            return 0
        number, tsc = self._last
        changed = header.head <= number
        if not changed and number > header.head - header.ring_entries:
            changed = self._entries(header, number, number + 1)[0] != _entry(number, tsc)
        if changed:
            self._last, self._next = None, 0
        return int(changed)

    def _entries(self, header: HeartbeatHeader, first: int, end: int | None = None) -> list[tuple[int, int, int]]:
        """Read the entries of ticks `first` to `end` (default: head), in at most two pieces."""
        end = header.head if end is None else end
        found: list[tuple[int, int, int]] = []
        while first < end:
            slot = first % header.ring_entries
            count = min(end - first, header.ring_entries - slot)
            piece = self._read(header.ring_address + slot * _ENTRY.size, count * _ENTRY.size)
            found.extend(_ENTRY.iter_unpack(piece))
            first += count
        return found

    def _judge(
        self, header: HeartbeatHeader, first: int, entries: list[tuple[int, int, int]], repeats: int
    ) -> HeartbeatReport:
        tsc_khz = self._tsc_khz or header.tsc_khz
        period = _period(header, tsc_khz)
        lost = torn = backwards = 0
        gaps: list[float] = []
        largest = 0
        previous = start = self._last
        window = len(entries) + (previous is not None)
        for number, entry in enumerate(entries, first):
            sequence, check, tsc = entry
            if check != _check(sequence, tsc):
                torn += 1
                continue
            if sequence != number & _LOW:
                lost += 1
                continue
            start = start or (number, tsc)
            if previous is not None and previous[0] == number - 1:
                gap = tsc - previous[1]
                backwards += gap <= 0
                largest = max(largest, gap)
                if gap > period * 1.5:
                    gaps.append(gap / tsc_khz)
            previous = (number, tsc)
        self._last, self._next = previous, max(self._next, header.head)
        return HeartbeatReport(
            header=header,
            tsc_khz=tsc_khz,
            ticks=header.head,
            window=window,
            expected=(previous[1] - start[1]) / period if start and previous else 0.0,
            sequence_gaps=lost,
            repeats=repeats,
            torn=torn,
            backwards=backwards,
            window_gap_ms=largest / tsc_khz,
            gaps_ms=tuple(gaps),
        )


def _check(sequence: int, tsc: int) -> int:
    return sequence ^ (tsc & _LOW) ^ (tsc >> 32) ^ RING_CHECK


def _entry(number: int, tsc: int) -> tuple[int, int, int]:
    return number & _LOW, _check(number & _LOW, tsc), tsc


def _period(header: HeartbeatHeader, tsc_khz: int) -> float:
    """Return the exact distance of two ticks in TSC cycles: the PIT's divisor is rounded, the deadline is not."""
    if header.guest == DEADLINE:
        return header.period_tsc
    return (PIT_HZ // header.rate_hz) * tsc_khz * 1000 / PIT_HZ
