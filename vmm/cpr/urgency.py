"""The loop's thread before all ordinary ones, for as long as the guest stands.

On a host whose CPUs are busy a pause is mostly waiting for one of them, once for each hop between the two processes.
Where the host permits (root, CAP_SYS_NICE, RLIMIT_RTPRIO), the two loops run under SCHED_RR meanwhile; elsewhere
nothing changes. Source: sched(7).
"""

from __future__ import annotations

import os
from typing import Final, final

_PRIORITY: Final = 1
"""The least there is above all ordinary threads."""


@final
class Urgency:
    """Raises the thread that calls `begin`, and puts it back by `close`."""

    def __init__(self) -> None:
        self._before: tuple[int, os.sched_param] | None = None

    def begin(self) -> None:
        """Raise this thread, if the host permits."""
        before = os.sched_getscheduler(0), os.sched_getparam(0)
        try:
            # Threads that are made meanwhile, and vCPUs above all, stay ordinary.
            os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(_PRIORITY))
        except PermissionError:
            return
        self._before = before

    def close(self) -> None:
        """Put the thread back. Idempotent; harmless without `begin`."""
        if self._before is not None:
            policy, parameters = self._before
            self._before = None
            os.sched_setscheduler(0, policy, parameters)
