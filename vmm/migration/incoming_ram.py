"""How much of a guest's RAM has come, as `query-migrate` shows it where it comes in.

Nothing is counted for that alone: whoever reads a stream, and takes pages out of it, knows how far it is.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, final

import attrs

from vmm.kvm.memory import PAGE_SIZE
from vmm.migration.status import MigrationRamStats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.kvm.faults import PagesFromLink
    from vmm.migration.inflow import Inflow
    from vmm.migration.multifd_intake import MultifdIntake
    from vmm.migration.page_chunks import PageIntake


@final
class IncomingRam:
    """What comes in a stream. Made on the loop, and asked there, while threads read."""

    def __init__(self, size: int, flow: Inflow, multifd: MultifdIntake | None, intakes: Sequence[PageIntake]) -> None:
        """`size` is that of all RAM, in bytes; `intakes` take pages out of the stream and its further channels."""
        self._size: Final = size
        self._flow: Final = flow
        self._multifd: Final = multifd
        self._intakes: Final = intakes
        self._begun: Final = time.monotonic()
        self.complete = False
        """Whether the stream has come to its end."""

    def statistics(self) -> MigrationRamStats:
        """Return it.

        What remains of a file is known. Of what comes over a connection it is all that has not come: nobody tells which
        pages do not come at all, as they are zero.
        """
        came = self._flow.offset + (self._multifd.bytes if self._multifd is not None else 0)
        data = sum(intake.data_pages for intake in self._intakes)
        zero = sum(intake.zero_pages for intake in self._intakes)
        seconds = max(time.monotonic() - self._begun, 1e-6)
        return MigrationRamStats(
            transferred=came,
            remaining=0 if self.complete else self._remaining(zero),
            total=self._size,
            duplicate=zero,
            normal=data,
            normal_bytes=data * PAGE_SIZE,
            mbps=round(came * 8 / 1e6 / seconds, 3),
            pages_per_second=round(data / seconds),
            page_size=PAGE_SIZE,
            multifd_bytes=self._multifd.bytes if self._multifd is not None else 0,
        )

    def _remaining(self, zero: int) -> int:
        if (left := self._flow.left) is not None:
            return min(left, self._size)
        here = sum(len(intake.received) for intake in self._intakes)  # a page that came twice counts once
        return max(self._size - (here + zero) * PAGE_SIZE, 0)


def with_postcopy(before: MigrationRamStats, pages: PagesFromLink) -> MigrationRamStats:
    """Return it while the guest runs: `before` is what had come until then, the rest comes as `pages`."""
    report = pages.report()
    size = report.moved * PAGE_SIZE
    return attrs.evolve(
        before,
        transferred=before.transferred + size,
        remaining=before.total - report.passed * PAGE_SIZE,
        normal=before.normal + report.moved,
        normal_bytes=before.normal_bytes + size,
        postcopy_bytes=size,
        postcopy_requests=report.faults,
    )
