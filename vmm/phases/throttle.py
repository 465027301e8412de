"""Slowing the guest down: every vCPU is kept out of it for a share of the time."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, final

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from vmm.phases.vcpus import GuestCpu

SLICE: Final = 0.01
"""Seconds that the guest runs between two times that it does not. Source: QEMU, migration/cpu-throttle.c."""
MOST: Final = 99
"""Percent."""


@final
class Throttle:
    """Holds the vCPUs of one machine. A vCPU waits on its own thread, and is out at once when it is kicked.

    A stop of the guest needs nothing else than at other times: who is held is kicked like any other.
    """

    def __init__(self, vcpus: Sequence[GuestCpu]) -> None:
        """On the loop."""
        self._vcpus: Final = tuple(vcpus)
        self._percent = 0
        self._changed = trio.Event()
        self._loop: Final = trio.lowlevel.current_trio_token()

    @property
    def percent(self) -> int:
        """The share of the time, from 0 to 99, in which no vCPU runs."""
        return self._percent

    def set(self, percent: int) -> None:
        """Change it; 0 ends it. Any thread."""
        percent = max(0, min(percent, MOST))
        if percent != self._percent:
            self._percent = percent
            self._loop.run_sync_soon(self._wake)

    def end(self) -> None:
        """Let every vCPU run freely from now on. On the loop."""
        self._percent = 0
        self._wake()

    @asynccontextmanager
    async def serving(self) -> AsyncGenerator[None, None]:
        """Do it in the block; behind it nobody is held."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.serve)
            yield
            nursery.cancel_scope.cancel()

    async def serve(self) -> None:
        """Do it, until cancelled; afterwards nobody is held."""
        try:
            while True:
                self._changed = changed = trio.Event()
                share = self._percent / 100
                if not share:
                    await changed.wait()
                    continue
                for vcpu in self._vcpus:
                    vcpu.hold(SLICE * share / (1 - share))
                with trio.move_on_after(SLICE / (1 - share)):
                    await changed.wait()
        finally:
            self._percent = 0
            self._let_go()

    def _wake(self) -> None:
        self._let_go()
        self._changed.set()

    def _let_go(self) -> None:
        for vcpu in self._vcpus:
            vcpu.let_go()
