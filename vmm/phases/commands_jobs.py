"""Commands on jobs, of whatever type."""

from __future__ import annotations

from typing import final

import attrs
import trio

from vmm.capabilities import MayCancelMigration, MayDismissJob, MayQuery
from vmm.monitor.ports import Caller
from vmm.phases.jobs import Job, Jobs, JobStatus, JobType


@final
@attrs.frozen(kw_only=True)
class JobInfo:
    """A job."""

    id: str
    type: JobType
    status: JobStatus
    current_progress: int
    """How much is done, in no unit; it never gets less."""
    total_progress: int
    """How much is to be done, as far as that is known now."""
    error: str | None = None
    """Why it was aborted."""


@final
@attrs.frozen(kw_only=True)
class JobId:
    """Arguments of `job-cancel` and `job-dismiss`."""

    id: str


def query_jobs(may: MayQuery) -> list[JobInfo]:
    """List the jobs that were not dismissed."""
    return [_info(job) for job in may.view(Jobs)]


def _info(job: Job) -> JobInfo:
    current, total = job.progress()
    return JobInfo(
        id=job.name, type=job.kind, status=job.status, current_progress=current, total_progress=total, error=job.error
    )


async def job_cancel(may: MayCancelMigration, query: MayQuery, caller: Caller, args: JobId) -> None:
    """Cancel a job, as `migrate_cancel` does; it has concluded once all is undone."""
    await trio.lowlevel.checkpoint()
    query.view(Jobs).find(args.id).require_cancellable()
    may.cancel(f"by {caller.name}")


async def job_dismiss(may: MayDismissJob, args: JobId) -> None:
    """Forget a job that has concluded; its name can be given again."""
    await trio.lowlevel.checkpoint()
    may.dismiss(args.id)
