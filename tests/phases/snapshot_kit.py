"""Machines of this process with a directory of snapshots, and jobs that are waited for."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio

import vmm
from tests.phases.copy_kit import HANGS, commands, ticked

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from vmm.embedding import EmbeddedMachine


def directory(folder: Path, name: str = "s0") -> dict[str, Any]:
    """Return the command that makes `folder` a directory of snapshots."""
    arguments = {"qom-type": "snapshot-directory", "id": name, "path": str(folder)}
    return {"execute": "object-add", "arguments": arguments}


@asynccontextmanager
async def with_snapshots(folder: Path, **options: Any) -> AsyncGenerator[EmbeddedMachine, None]:
    """Run a machine whose snapshots are in `folder`, and whose guest ticks."""
    async with vmm.machine([directory(folder), *commands(**options)]) as machine:
        await ticked(machine, 5)
        yield machine


async def begin(machine: EmbeddedMachine, what: str, tag: str, job: str = "j0", **more: Any) -> None:
    """Begin job `job`: `what` is save, load or delete."""
    arguments = {"job_id": job, "tag": tag, "devices": [], "vmstate": "s0"}
    if what == "delete":
        arguments = {"job_id": job, "tag": tag, "devices": ["s0"]}
    await machine.execute(f"snapshot-{what}", **{**arguments, **more})


async def concluded(machine: EmbeddedMachine, job: str = "j0") -> dict[str, Any]:
    """Wait for the end of a job, dismiss it, and return what was said of it."""
    with trio.fail_after(HANGS):
        while (info := await _job(machine, job))["status"] != "concluded":  # noqa: ASYNC110 - its event is not waited for
            await trio.sleep(0.005)
    await machine.execute("job-dismiss", id=job)
    return info


async def _job(machine: EmbeddedMachine, name: str) -> dict[str, Any]:
    return next(dict(job) for job in await machine.execute("query-jobs") if job["id"] == name)


async def done(machine: EmbeddedMachine, what: str, tag: str, **more: Any) -> None:
    """Do it, with success."""
    await begin(machine, what, tag, **more)
    info = await concluded(machine)
    assert "error" not in info, info
    assert info["type"] == f"snapshot-{what}"


async def failed(machine: EmbeddedMachine, what: str, tag: str, **more: Any) -> str:
    """Do it, without success; return why the job has failed."""
    await begin(machine, what, tag, **more)
    info = await concluded(machine)
    return str(info["error"])


async def tags(machine: EmbeddedMachine) -> list[str]:
    """Return the tags of the snapshots there are."""
    return [snapshot["tag"] for snapshot in await machine.execute("x-query-snapshots")]
