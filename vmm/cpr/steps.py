"""The named steps of a live update, for reports, error texts and fault tests.

A process can be told to stop itself (SIGSTOP) at one of them: `--x-cpr-stop-at source:offered`. So a test can kill,
stall or wake either side at an exact place, without a clock.
"""

from __future__ import annotations

import os
import signal
from typing import Final, final

from vmm.errors import OptionInvalid

SOURCE_STEPS: Final = ("connected", "described", "ready", "paused", "state-sent", "loaded", "offered", "given")
DESTINATION_STEPS: Final = (
    "accepted", "described", "built", "state-received", "loaded", "offer-seen", "taken", "running",
)  # fmt: skip
STEPS: Final = (
    *(f"source:{step}" for step in SOURCE_STEPS),
    *(f"destination:{step}" for step in DESTINATION_STEPS),
)


@final
class Steps:
    """Passes the steps of one side. Loop only."""

    def __init__(self, side: str, stop_at: str = "") -> None:
        self._side = side
        self._stop_at = stop_at
        self.current = "hello"

    def reach(self, step: str) -> None:
        """Note that `step` has been reached; stop this process if that was asked for."""
        self.current = step
        if self._stop_at == f"{self._side}:{step}":
            self._stop_at = ""
            os.kill(os.getpid(), signal.SIGSTOP)


def check_step(name: str) -> None:
    """Raise `OptionInvalid` unless `name` is empty or one of `STEPS`."""
    if name and name not in STEPS:
        raise OptionInvalid(option="--x-cpr-stop-at", value=name, wanted=f"one of {', '.join(STEPS)}")
