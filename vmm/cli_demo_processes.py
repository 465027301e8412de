"""The processes that the demo starts, and ends in any case."""

from __future__ import annotations

import os
import signal
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final, final

import attrs
import trio

from vmm.errors import VmmError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


_ENDING: Final = 3.0
"""Seconds that a machine has to end in order, at the end of the demo or at Ctrl-C."""


@final
@attrs.frozen(kw_only=True)
class DemoFailed(VmmError):
    """The demo can't go on."""

    text = "The demo failed: {reason}"
    reason: str


@final
class Processes:
    """The processes that are the demo's to end, held by pidfds, so that no pid is mistaken for another's."""

    def __init__(self) -> None:
        self._pidfds: dict[int, int] = {}

    def add(self, pid: int) -> None:
        """End `pid`, too. A second time it is without effect."""
        if pid not in self._pidfds:
            self._pidfds[pid] = os.pidfd_open(pid)

    async def ended(self, pid: int) -> None:
        """Wait until `pid` has ended, and forget it."""
        await trio.lowlevel.wait_readable(self._pidfds[pid])
        os.close(self._pidfds.pop(pid))
        _reap(pid)

    async def end_all(self) -> None:
        """End what is left: in order if it can, and in any case."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pidfd in self._pidfds.values():
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, number)
            with trio.move_on_after(_ENDING):
                for pid in list(self._pidfds):
                    await self.ended(pid)


def _reap(pid: int) -> None:
    """Let go of a child that has ended. Does not block."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


@asynccontextmanager
async def started_processes() -> AsyncGenerator[Processes, None]:
    """Yield what the demo's processes are noted in; on leaving, all of them are ended."""
    processes = Processes()
    try:
        yield processes
    finally:
        # Bounded: SIGTERM, some seconds, SIGKILL.
        with trio.CancelScope(shield=True):
            await processes.end_all()
