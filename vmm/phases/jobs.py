"""Jobs: work of some length that a command has begun, and that somebody watches by its name.

Each is dismissed by hand: what has concluded stays, with its error if it had one, until `job-dismiss`, so that a client
that was away still learns what became of it. A command that failed leaves no job.

Source: QEMU qapi/job.json (JobStatus, JobInfo), docs of the job API.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar, Final, Literal, final, get_args

from vmm.errors import BackendNotFound, InvalidState, NameTaken, OptionInvalid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

JobStatus = Literal[
    "undefined", "created", "running", "paused", "ready", "standby", "waiting", "pending", "aborting", "concluded",
    "null",
]  # fmt: skip
"""In the order of QEMU's enumeration. No job here is ever paused, ready or standby."""

JobType = Literal[
    "commit", "stream", "mirror", "backup", "create", "amend", "snapshot-load", "snapshot-save", "snapshot-delete",
    "migrate",
]  # fmt: skip
"""QEMU's, and `migrate`, which it has not: a migration, or live update, outgoing or incoming."""

STEPS: Final[Mapping[JobStatus, frozenset[JobStatus]]] = {
    "undefined": frozenset({"created"}),
    "created": frozenset({"running", "null"}),
    "running": frozenset({"waiting", "aborting"}),
    "waiting": frozenset({"pending"}),
    "pending": frozenset({"concluded"}),
    "aborting": frozenset({"concluded"}),
    "concluded": frozenset({"null"}),
}
"""Where each status may lead; `null` is the end, in which a job is forgotten."""

STATUSES: Final[tuple[JobStatus, ...]] = get_args(JobStatus)

_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,126}")


@final
class Job:
    """One job. Made by `Jobs.create`; every change of its status is told to `observe`, with the job's name.

    Args:
        progress: says how much is done, and of how much. Not asked any more once the job has ended.
        no_cancel: why the job cannot be cancelled, as what follows "is not possible" in a sentence, and what to do
            instead; None where it can.
    """

    def __init__(
        self,
        name: str,
        kind: JobType,
        *,
        progress: Callable[[], tuple[int, int]],
        no_cancel: tuple[str, str] | None,
        observe: Callable[[str, JobStatus], None],
    ) -> None:
        self.name: Final = name
        self.kind: Final = kind
        self._progress: Callable[[], tuple[int, int]] = progress
        self._no_cancel = no_cancel
        self._observe: Final = observe
        self._status: JobStatus = "undefined"
        self.error: str | None = None
        """Why it was aborted, in a sentence."""

    @property
    def status(self) -> JobStatus:
        """The present status."""
        return self._status

    def start(self) -> None:
        """The work begins."""
        self._enter("running")

    def succeed(self) -> None:
        """The work is done."""
        self._keep_progress()
        for status in ("waiting", "pending", "concluded"):
            self._enter(status)

    def fail(self, reason: str) -> None:
        """The work has ended early, and is undone, for `reason`, a sentence."""
        self._keep_progress()
        self._enter("aborting")
        self.error = reason
        self._enter("concluded")

    def require_cancellable(self) -> None:
        """Raise `InvalidState` unless the job can be cancelled now."""
        if self._status not in ("created", "running"):
            state = f"once it is {self._status}"
            raise InvalidState(what=f"job-cancel of {self.name!r}", state=state, instead="job-dismiss forgets it")
        if self._no_cancel is not None:
            state, instead = self._no_cancel
            raise InvalidState(what=f"job-cancel of {self.name!r}", state=state, instead=instead)

    def progress(self) -> tuple[int, int]:
        """Return how much is done, and of how much, in no unit; what is done never gets less."""
        return self._progress()

    def _keep_progress(self) -> None:
        last = self._progress()
        self._progress = lambda: last

    def _enter(self, status: JobStatus) -> None:
        if status not in STEPS.get(self._status, frozenset()):
            raise RuntimeError(f"job {self.name}: {self._status} does not lead to {status}")
        self._status = status
        self._observe(self.name, status)


@final
class Jobs:
    """The jobs of one machine that were not dismissed. The facet of `may-dismiss-job`."""

    what: ClassVar[str] = "Jobs"
    phase: ClassVar[str] = "boot"

    def __init__(self, emit: Callable[[str, Mapping[str, object]], None]) -> None:
        self._emit = emit
        self._jobs: Final[dict[str, Job]] = {}

    def check(self, name: str) -> None:
        """Check the name of a new job.

        Raises:
            OptionInvalid: it is not well-formed.
            NameTaken: there is such a job, which was not dismissed.
        """
        if not _NAME.fullmatch(name):
            wanted = "a name: a letter, then letters, digits, '-', '_' and '.', at most 127 in all"
            raise OptionInvalid(option="job-id", value=name, wanted=wanted)
        if name in self._jobs:
            raise NameTaken(what="Job", name=name)

    def create(
        self,
        name: str,
        kind: JobType,
        *,
        progress: Callable[[], tuple[int, int]],
        no_cancel: tuple[str, str] | None = None,
    ) -> Job:
        """Make a job in status created. Raises as `check` does; for the arguments see `Job`."""
        self.check(name)
        job = self._jobs[name] = Job(name, kind, progress=progress, no_cancel=no_cancel, observe=self._tell)
        job._enter("created")
        return job

    def withdraw(self, job: Job) -> None:
        """Forget a job that has not begun: the command that was to begin it has failed."""
        job._enter("null")
        del self._jobs[job.name]

    def find(self, name: str) -> Job:
        """Return a job. Raises `BackendNotFound`."""
        if name not in self._jobs:
            known = f"; there are: {', '.join(sorted(self._jobs)) or 'none'}"
            raise BackendNotFound(what="Job", name=name, known=known)
        return self._jobs[name]

    def dismiss(self, name: str) -> None:
        """Forget a job that has concluded. Raises `BackendNotFound`, `InvalidState`."""
        job = self.find(name)
        if job.status != "concluded":
            instead = "wait until it has concluded, which event JOB_STATUS_CHANGE tells"
            raise InvalidState(what=f"job-dismiss of {name!r}", state=f"while it is {job.status}", instead=instead)
        job._enter("null")
        del self._jobs[name]

    def __iter__(self) -> Iterator[Job]:
        """Go through all jobs, oldest first."""
        return iter(self._jobs.values())

    def _tell(self, name: str, status: JobStatus) -> None:
        self._emit("JOB_STATUS_CHANGE", {"id": name, "status": status})
