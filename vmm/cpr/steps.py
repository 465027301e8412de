"""The named steps of a live update, for `query-migrate`, reports, error texts and fault tests.

A process can be told to stop itself (SIGSTOP) at one of them: `--x-cpr-stop-at source:offered`. So a test can kill,
stall, starve or wake either side at an exact place, without a clock.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Final, final

from vmm.errors import OptionInvalid

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

SOURCE_STEPS: Final = (
    "begun", "connected", "greeted", "described", "ready", "main-connected", "paused", "state-sent", "loaded",
    "offered", "given",
)  # fmt: skip
DESTINATION_STEPS: Final = (
    "accepted", "greeted", "received", "described", "built", "paused", "state-received", "loaded", "offer-seen",
    "taken", "running",
)  # fmt: skip
STEPS: Final = (
    *(f"source:{step}" for step in SOURCE_STEPS),
    *(f"destination:{step}" for step in DESTINATION_STEPS),
)

MEANING: Final[Mapping[str, str]] = {
    "source:begun": "nobody is connected yet, and no cell made",
    "source:connected": "the CPR channel is connected; phase migrating is open",
    "source:greeted": "it knows who the destination is; the recipe and the descriptors are sent next",
    "source:described": "they are sent",
    "source:ready": "the destination has built all of it",
    "source:main-connected": "the main channel is connected too; the guest is paused next",
    "source:paused": "the guest stands; its state is saved and sent next, with the descriptors that have come",
    "source:state-sent": "that is done",
    "source:loaded": "the destination has it; the guest is offered next",
    "source:offered": "the cell says so",
    "source:given": "the destination runs it",
    "destination:accepted": "a source has connected",
    "destination:greeted": "it knows who that is",
    "destination:received": "recipe and descriptors are here; nothing is adopted yet",
    "destination:described": "they are checked and adopted; the machine is built next",
    "destination:built": "the machine is built, and the source told so next",
    "destination:paused": "the source has paused the guest, and its state comes",
    "destination:state-received": "it is here and checked, and applied next",
    "destination:loaded": "it is applied, and the source told so",
    "destination:offer-seen": "the guest is offered; the cell is asked next",
    "destination:taken": "the guest is this process's; nothing runs yet",
    "destination:running": "its vCPUs were let in; chardevs and listeners follow",
}
"""What is done when a step is reached, and what follows."""


@final
class Steps:
    """Passes the steps of one side. Loop only."""

    def __init__(self, side: str, stop_at: str = "") -> None:
        self._side = side
        self._stop_at = stop_at
        self._note: Callable[[str], None] | None = None
        self.current = "hello"

    def follow(self, note: Callable[[str], None]) -> None:
        """Tell `note` the present step and each later one."""
        self._note = note
        note(self.current)

    def reach(self, step: str) -> None:
        """Note that `step` has been reached; stop this process if that was asked for."""
        self.current = step
        if self._note is not None:
            self._note(step)
        if self._stop_at == f"{self._side}:{step}":
            self._stop_at = ""
            os.kill(os.getpid(), signal.SIGSTOP)


def check_step(name: str) -> None:
    """Raise `OptionInvalid` unless `name` is empty or one of `STEPS`."""
    if name and name not in STEPS:
        raise OptionInvalid(option="--x-cpr-stop-at", value=name, wanted=f"one of {', '.join(STEPS)}")
