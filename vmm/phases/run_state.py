"""Whether the guest runs, and if not, why: QEMU's RunState, published to `query-status`.

Source: QEMU qapi/run-state.json (RunState).
"""

from __future__ import annotations

from typing import ClassVar, Final, Literal, Protocol, final, get_args

RunStateName = Literal[
    "debug", "inmigrate", "internal-error", "io-error", "paused", "postmigrate", "prelaunch", "finish-migrate",
    "restore-vm", "running", "save-vm", "shutdown", "suspended", "watchdog", "guest-panicked", "colo",
]  # fmt: skip

RUN_STATES: Final[tuple[RunStateName, ...]] = get_args(RunStateName)


def run_state_named(name: object) -> RunStateName | None:
    """Return the run state that hostile input `name` names; None where there is none."""
    return next((state for state in RUN_STATES if state == name), None)


NEEDS_RESET: Final = frozenset({"internal-error", "guest-panicked", "shutdown", "io-error"})
"""States that only a reset leads out of: the vCPUs have nothing sensible to execute."""


class Emit(Protocol):
    """Tells an event."""

    def __call__(self, name: str, *, at: int | None = None) -> None:
        """Tell the event `name`, of the moment `at`, CLOCK_REALTIME in ns, or of now."""


@final
class RunState:
    """The run state of one machine. Written by phases, read through `may-query`."""

    what: ClassVar[str] = "The run state"
    phase: ClassVar[str] = "boot"

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self.name: RunStateName = "prelaunch"
        self.failure: str = ""
        """Why the guest cannot go on, in a sentence; empty where it can."""
        self.has_run = False
        """Whether vCPUs have ever executed guest code here."""

    @property
    def running(self) -> bool:
        """Whether vCPUs execute guest code."""
        return self.name == "running"

    def runs(self, *, since: int | None = None) -> None:
        """The vCPUs were started, `since` on CLOCK_REALTIME in ns, or just now: state running, event RESUME."""
        self.name = "running"
        self.has_run = True
        self.failure = ""
        self._emit("RESUME", at=since)

    def stands(self, name: RunStateName, *, failure: str = "") -> None:
        """The vCPUs are out, for the reason `name`: event STOP if they ran before."""
        ran, self.name, self.failure = self.running, name, failure
        if ran:
            self._emit("STOP")
