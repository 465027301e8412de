"""The settings and the progress of this machine's migrations."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Final, final

import attrs
import trio

from vmm.errors import MigrationCancelled, MigrationRefused, OptionInvalid, StreamCorrupt, Unsupported
from vmm.migration.capability_table import MigrationCapabilities
from vmm.migration.dirty_rate import LimitedVcpu, Measurement
from vmm.migration.parameter_table import MigrationParameters
from vmm.migration.status import IDLE, MigrationProgress, MigrationStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from vmm.errors import VmmError
    from vmm.migration.status import Side
    from vmm.monitor.events import EventHub
    from vmm.phases.absent_pages import AbsentPages
    from vmm.phases.jobs import Job, Jobs, JobType

_INCOMING: Final = (
    "for what comes in",
    "cancel it where it comes from; a live update that is only awaited is given up by x-cpr-abandon",
)
_LOADING: Final = (
    "while a snapshot is put in the guest's place",
    "load another one once it is over",
)
"""Why a job cannot be cancelled that brings a guest here, and what to do instead."""


@final
@attrs.frozen
class Wishes:
    """What was asked of one migration besides where it goes: settings for its time alone, and a job."""

    capabilities: Mapping[str, bool] = attrs.Factory(dict)
    parameters: Mapping[str, Any] = attrs.Factory(dict)
    job: str | None = None
    """The job's name."""
    kind: JobType = "migrate"
    """What is asked for, where it is a job."""


NO_WISHES: Final = Wishes()


@final
class MigrationState:
    """Lives in phase precreate, so that a migration can be set up before there is a machine."""

    what: ClassVar[str] = "Migration"
    phase: ClassVar[str] = "precreate"

    def __init__(self, events: EventHub, jobs: Jobs) -> None:
        self._events = events
        self._jobs = jobs
        self._job: Job | None = None
        self.capabilities: Final = MigrationCapabilities()
        self.parameters: Final = MigrationParameters()
        self.progress: MigrationProgress | None = None
        """The last or the present migration; None before the first."""
        self.absent: AbsentPages | None = None
        """The RAM of the guest that comes from a file as it is used, or has come; None where none came so."""
        self.dirty_rate = Measurement()
        """The last or the present measurement of what the guest writes."""
        self.limited: tuple[LimitedVcpu, ...] = ()
        """The vCPUs that are limited in what they write."""

    def note_limited(self, limited: tuple[LimitedVcpu, ...]) -> None:
        """Note which vCPUs are limited in what they write, and what they do."""
        self.limited = limited

    def note_rate(self, measurement: Measurement) -> None:
        """Note how such a measurement goes."""
        self.dirty_rate = measurement

    def check(self, wishes: Wishes) -> None:
        """Raise a `VmmError` unless `wishes` can be granted; change nothing."""
        self.capabilities.check(wishes.capabilities)
        self.parameters.check(wishes.parameters)
        if wishes.job is not None:
            self._jobs.check(wishes.job)

    @contextmanager
    def attempt(self, side: Side, wishes: Wishes) -> Iterator[None]:
        """Grant `wishes`, all or none, to the migration that `begin` begins in the block; until it is over.

        If none begins they are taken back. Raises as `check` does.
        """
        before = self.progress
        self._grant(side, wishes)
        try:
            yield
        finally:
            if self.progress is before:
                self._take_back(None)

    def settings(self) -> dict[str, Any]:
        """Return what was set, and not what is lent to one migration, for a successor: JSON."""
        return {"capabilities": dict(self.capabilities.chosen), "parameters": dict(self.parameters.chosen)}

    def inherit(self, settings: object) -> Callable[[], None]:
        """Check what a predecessor returned as `settings`; return what sets it, but for what was set here itself.

        Raises:
            StreamCorrupt: it is none, or of a program that had more to set.
        """
        if settings is None:  # of a program that kept them
            return lambda: None
        parts = ("capabilities", "parameters")
        if not isinstance(settings, dict) or settings.keys() != set(parts):
            raise StreamCorrupt(
                reason="the message that the guest is paused has settings without capabilities or parameters"
            )
        kept = [settings[part] for part in parts]
        if not all(isinstance(part, dict) for part in kept):
            raise StreamCorrupt(reason="the message that the guest is paused has settings that are no objects")
        capabilities, parameters = kept
        try:
            wrong = next((name for name, state in capabilities.items() if not isinstance(state, bool)), None)
            if wrong is not None:
                raise OptionInvalid(
                    option=f"Migration capability {wrong}", value=capabilities[wrong], wanted="on or off"
                )
            # Each by the rules of all: those that were set here come out on top, and must go with them.
            own = self.capabilities.chosen, self.parameters.chosen
            self.capabilities.check({**capabilities, **own[0]})
            self.parameters.check({**parameters, **own[1]})
        except (OptionInvalid, Unsupported, MigrationRefused) as error:
            raise StreamCorrupt(reason=f"the settings of the source: {error}") from error

        def apply() -> None:
            self.capabilities.inherit(capabilities)
            self.parameters.inherit(parameters)

        return apply

    def begin(self, side: Side) -> MigrationProgress:
        """Begin a migration, forgetting the one before."""
        self.progress = MigrationProgress(side, self._observe, trio.current_time)
        self.progress.begin()
        if self._job is not None:
            self._job.start()
        return self.progress

    def ended(self, progress: MigrationProgress, error: VmmError) -> None:
        """Note that a migration has come to nothing because of `error`, a cancel perhaps, and all of it is undone."""
        if isinstance(error, MigrationCancelled):
            progress.advance(MigrationStatus.CANCELLING)
            progress.advance(MigrationStatus.CANCELLED)
        else:
            self.failed(progress, str(error))

    def tell_pass(self, number: int) -> None:
        """Tell that a pass over the guest's RAM begins."""
        if self.capabilities["events"]:
            self._events.emit("MIGRATION_PASS", {"pass": number})

    def failed(self, progress: MigrationProgress, reason: str) -> None:
        """Note that a migration has failed and all of it is undone."""
        progress.fail(reason)
        if progress.status is MigrationStatus.FAILING:
            progress.advance(MigrationStatus.FAILED)

    def forget(self) -> None:
        """Forget a migration that was awaited: the machine did not get to where it would have come in."""
        self.progress = None
        self._take_back(MigrationStatus.CANCELLED)

    def _grant(self, side: Side, wishes: Wishes) -> None:
        self.check(wishes)
        # From here on nothing fails.
        self.capabilities.lend(wishes.capabilities)
        self.parameters.lend(wishes.parameters)
        if wishes.job is not None:
            incoming = _LOADING if wishes.kind == "snapshot-load" else _INCOMING
            no_cancel = incoming if side == "target" else None
            self._job = self._jobs.create(wishes.job, wishes.kind, progress=self._progress, no_cancel=no_cancel)

    def _take_back(self, status: MigrationStatus | None) -> None:
        """Take back what was granted; `status` is that of the end, None if there was no beginning."""
        self.capabilities.give_back()
        self.parameters.give_back()
        job = self._job
        if job is None:
            return
        if status is None:
            self._jobs.withdraw(job)
        elif status is MigrationStatus.COMPLETED:
            job.succeed()
        else:
            error = self.progress.info().error_desc if self.progress is not None else None
            job.fail(error or f"The {'migration' if job.kind == 'migrate' else 'snapshot'} was cancelled")
        self._job = None

    def _progress(self) -> tuple[int, int]:
        """Return the bytes of RAM that were moved, and one more for all the rest, of those that there are."""
        if self.progress is None or self._job is None or self._job.status == "created":
            return 0, 1
        ram = self.progress.ram
        if self.progress.status is MigrationStatus.COMPLETED:  # also where pages come as they are used
            return ram.total + 1, ram.total + 1
        return ram.total - ram.remaining, ram.total + 1

    def _observe(self, status: MigrationStatus) -> None:
        if self.capabilities["events"]:
            self._events.emit("MIGRATION", {"status": status.value})
        if status in IDLE:
            self._take_back(status)
