"""The settings and the progress of this machine's migrations."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final, final

import trio

from vmm.migration.capability_table import MigrationCapabilities
from vmm.migration.parameter_table import MigrationParameters
from vmm.migration.status import MigrationProgress, MigrationStatus

if TYPE_CHECKING:
    from vmm.migration.status import Side
    from vmm.monitor.events import EventHub


@final
class NothingUnderWay:
    """The facet of `may-cancel-migration` where there is nothing to cancel, which QEMU's clients do to be sure."""

    def cancel(self, by: str) -> None:
        """Do nothing."""


@final
class MigrationState:
    """Lives in phase precreate, so that a migration can be set up before there is a machine."""

    what: ClassVar[str] = "Migration"
    phase: ClassVar[str] = "precreate"

    def __init__(self, events: EventHub) -> None:
        self._events = events
        self.capabilities: Final = MigrationCapabilities()
        self.parameters: Final = MigrationParameters()
        self.progress: MigrationProgress | None = None
        """The last or the present migration; None before the first."""

    def begin(self, side: Side) -> MigrationProgress:
        """Begin a migration, forgetting the one before."""
        self.progress = MigrationProgress(side, self._observe, trio.current_time)
        self.progress.begin()
        return self.progress

    def failed(self, progress: MigrationProgress, reason: str) -> None:
        """Note that a migration has failed and all of it is undone."""
        progress.fail(reason)
        if progress.status is MigrationStatus.FAILING:
            progress.advance(MigrationStatus.FAILED)

    def _observe(self, status: MigrationStatus) -> None:
        if self.capabilities["events"]:
            self._events.emit("MIGRATION", {"status": status.value})
