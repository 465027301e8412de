"""Snapshots as they are carried out in phase running: saved while the guest runs, put in its place, removed."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any, final

import attrs
import trio

from vmm.errors import VmmError
from vmm.migration.address import FileAddress
from vmm.phases.copy_plan import CopyPlan

if TYPE_CHECKING:
    from vmm.backends.snapshots import SnapshotDirectory
    from vmm.decisions import Turn
    from vmm.nursery_tree import Phase
    from vmm.phases.jobs import Jobs
    from vmm.phases.migration_state import Wishes
    from vmm.phases.running import Run

_NO_CANCEL = ("of a removal", "it is over in a moment")


@final
@attrs.frozen(eq=False)
class SavePlan:
    """A snapshot that is to be made."""

    directory: SnapshotDirectory
    tag: str
    job: Wishes

    def close(self) -> None:
        """Do nothing: the directory is the object's."""

    @property
    def wishes(self) -> Wishes:
        """The job, with each page at its place, and the guest running meanwhile."""
        capabilities = {"mapped-ram": True, "background-snapshot": True, "x-ignore-shared": False}
        return attrs.evolve(self.job, capabilities=capabilities)


@final
@attrs.frozen(eq=False)
class DeletePlan:
    """A snapshot that is to be removed."""

    directory: SnapshotDirectory
    tag: str
    job: str

    def close(self) -> None:
        """Do nothing."""

    async def carry_out(self, jobs: Jobs, turn: Turn[Any]) -> None:
        """Remove it, as a job, which has begun when `turn` is settled. Raises `NameTaken`."""
        job = jobs.create(self.job, "snapshot-delete", progress=lambda: (0, 1), no_cancel=_NO_CANCEL)
        job.start()
        turn.succeed()
        try:
            await trio.to_thread.run_sync(self.directory.remove, self.tag)
        except VmmError as error:
            job.fail(str(error))
        else:
            job.succeed()


async def run_snapshot(running: Phase, run: Run, plan: SavePlan, turn: Turn[Any]) -> None:
    """Make a snapshot. Raises `VmmError` only before that has begun; later failures are the job's."""
    from vmm.phases.saving import run_saving  # Few guests are saved.

    with closing(plan.directory.begin(plan.tag)) as part:
        address = FileAddress(plan.directory.path_of(plan.tag), 0)
        await run_saving(running, run, CopyPlan(address, part.writer, finish=part.finish), turn)
