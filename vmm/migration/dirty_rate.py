"""A measurement of how fast a guest writes to its memory: what is asked for, and what comes of it.

Source: QEMU qapi/migration.json (calc-dirty-rate), migration/dirtyrate.h (limits).
"""

from __future__ import annotations

from typing import Final, Literal, final

import attrs

from vmm.errors import OptionInvalid, Unsupported

TimeUnit = Literal["second", "millisecond"]
MeasureMode = Literal["page-sampling", "dirty-ring", "dirty-bitmap"]
MeasureStatus = Literal["unstarted", "measuring", "measured"]

SHORTEST: Final = 50
LONGEST: Final = 60_000
"""Milliseconds."""
FEWEST: Final = 128
MOST: Final = 16_384
SAMPLES: Final = 512
"""Pages of each GiB that are looked at, unless it is said otherwise."""


def milliseconds(value: int, unit: TimeUnit) -> int:
    """Return `value` in milliseconds."""
    return value * 1000 if unit == "second" else value


@final
@attrs.frozen
class Measurement:
    """One that is asked for, under way, or done."""

    time: int = 0
    """Milliseconds that it takes."""
    mode: MeasureMode = "page-sampling"
    samples: int = SAMPLES
    started: float = 0.0
    """When it began, seconds by the host's monotonic clock."""
    status: MeasureStatus = "unstarted"
    rate: int | None = None
    """MiB a second."""

    def check(self) -> None:
        """Raise `OptionInvalid` or `Unsupported` unless it can be."""
        if self.mode == "dirty-ring":
            instead = "use dirty-bitmap or page-sampling"
            raise Unsupported(what="Mode of calc-dirty-rate", name=self.mode, instead=instead)
        if not SHORTEST <= self.time <= LONGEST:
            wanted = f"from {SHORTEST} ms to {LONGEST // 1000} s"
            raise OptionInvalid(option="calc-time", value=f"{self.time} ms", wanted=wanted)
        if not FEWEST <= self.samples <= MOST:
            raise OptionInvalid(option="sample-pages", value=self.samples, wanted=f"from {FEWEST} to {MOST}")


@final
@attrs.frozen(kw_only=True)
class LimitedVcpu:
    """QEMU's DirtyLimitInfo: a vCPU that may write only so much. MiB a second."""

    cpu_index: int
    limit_rate: int
    current_rate: int
