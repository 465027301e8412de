"""The clock of a machine in which time passes only when it is told to."""

from __future__ import annotations

from typing import Final, final

from vmm.errors import OptionInvalid

LAST: Final = (1 << 63) - 1
"""Nanoseconds; the clock goes no further. It is what fits a signed 64-bit number, some 292 years."""


@final
class VirtualClock:
    """Nanoseconds since the machine was made, moved by hand. On the loop."""

    def __init__(self, epoch_ns: int) -> None:
        """Begin at 0, which is `epoch_ns` of Unix time."""
        self.epoch_ns = epoch_ns
        self.now_ns = 0

    def time_ns(self) -> int:
        """Return Unix time in nanoseconds, for the devices that tell the time of day."""
        return self.epoch_ns + self.now_ns

    def step(self, ns: int) -> int:
        """Let `ns` nanoseconds pass, 0 or more; return the time then. `OptionInvalid` beyond `LAST`."""
        return self.move("clock_step", ns, self.now_ns + ns)

    def set(self, ns: int) -> int:
        """Go on to `ns`; return it. `OptionInvalid` for a time that is past, or beyond `LAST`."""
        return self.move("clock_set", ns, ns)

    def move(self, what: str, given: int, to: int) -> int:
        """Go on to `to`, because `what` was told `given`."""
        if not self.now_ns <= to <= LAST:
            wanted = f"possible: the clock is at {self.now_ns} ns, and goes on, never back, and to 2**63 - 1 at most"
            raise OptionInvalid(option=what, value=given, wanted=wanted)
        self.now_ns = to
        return to
