"""The loop's thread before all ordinary ones, and no garbage collected, for as long as the guest stands.

On a host whose CPUs are busy a pause is mostly waiting for one of them, once for each hop between the two processes.
Where the host permits (root, CAP_SYS_NICE, RLIMIT_RTPRIO), the two loops run under SCHED_RR meanwhile; elsewhere
nothing changes. Source: sched(7).

A full collection takes as long as several pauses. It is for cycles alone, and of these so little comes up meanwhile
that it can wait.
"""

from __future__ import annotations

import gc
import os
from typing import Final, final

_PRIORITY: Final = 1
"""The least there is above all ordinary threads."""
_FIRST_ANYWAY: Final = (os.SCHED_FIFO, os.SCHED_RR, 6)  # the last is SCHED_DEADLINE, which Python does not name


@final
class Urgency:
    """Raises the thread that calls `begin`, and puts it back by `close`."""

    def __init__(self) -> None:
        self._before: tuple[int, os.sched_param] | None = None
        self._collects = False

    def begin(self) -> None:
        """Hold garbage off, and raise this thread, if the host permits."""
        # Of two at a time, in one process, the one that held it off lets it come.
        self._collects = gc.isenabled()
        gc.disable()
        before = os.sched_getscheduler(0), os.sched_getparam(0)
        if before[0] & ~os.SCHED_RESET_ON_FORK in _FIRST_ANYWAY:
            return
        try:
            # Threads that are made meanwhile, and vCPUs above all, stay ordinary.
            os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(_PRIORITY))
        except PermissionError:
            return
        self._before = before

    def close(self) -> None:
        """Put back what was. Idempotent; harmless without `begin`."""
        if self._collects:
            self._collects = False
            gc.enable()
        if self._before is not None:
            policy, parameters = self._before
            self._before = None
            os.sched_setscheduler(0, policy, parameters)
