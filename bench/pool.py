"""Memory that a benchmark holds, so that what is measured gets pages that were in use a moment ago.

A free page may have gone back to where the machine got it from, a hypervisor most of all, and then its first use is
many times slower than that of another. Which kind a process meets depends on what was run before it. So a benchmark of
memory holds as much as a step will need, and frees it just before that step, for both sides alike.
"""

from __future__ import annotations

import mmap
from typing import Final, final

from bench.host import available_mib
from bench.machines import BenchFailed

PIECE_MIB: Final = 64

MARGIN_MIB: Final = 1024
"""Memory that stays free."""

_POPULATE_WRITE: Final = 23
"""MADV_POPULATE_WRITE, linux/mman.h; since Linux 5.14."""


@final
class Pool:
    """Memory that is held. In MiB, in pieces of `PIECE_MIB`."""

    def __init__(self) -> None:
        self._pieces: list[mmap.mmap] = []

    @property
    def mib(self) -> int:
        """How much is held."""
        return len(self._pieces) * PIECE_MIB

    def hold(self, mib: int) -> None:
        """Hold `mib` or a little more, every page of it touched. Raises `BenchFailed` if there is not so much."""
        missing = -(-mib // PIECE_MIB) - len(self._pieces)
        if available_mib() < missing * PIECE_MIB + MARGIN_MIB:
            raise BenchFailed(f"{missing * PIECE_MIB} MiB more are needed than the {available_mib()} MiB that are free")
        for _ in range(missing):
            piece = mmap.mmap(-1, PIECE_MIB << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._pieces.append(piece)
            piece.madvise(_POPULATE_WRITE)

    def free(self, mib: int) -> None:
        """Give `mib` of it, or a little more, back to the kernel; all of it if that is less."""
        for _ in range(min(-(-mib // PIECE_MIB), len(self._pieces))):
            self._pieces.pop().close()

    def close(self) -> None:
        """Give all of it back."""
        self.free(self.mib)
