"""The command `trio-vmm update`, and a machine for it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING

import trio
import trio.testing

from tests.phases.update_kit import (
    PROGRAM,
    Bench,
    Process,
    Ram,
    answering_pid,
    due,
    holds,
    open_bench,
    settled,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


async def update(bench: Bench, *options: str, qmp: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command to its end. That its pipes end too shows that nobody else holds them."""
    command = [*PROGRAM, "update", "--qmp", qmp or bench.qmp, *options]
    async with due("the end of trio-vmm update"):
        done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


@asynccontextmanager
async def machine() -> AsyncGenerator[tuple[Bench, Process], None]:
    """A machine that must be where it was in the end, untouched."""
    async with open_bench() as bench:
        console = bench.console()
        process = bench.machine(console)
        await console.beats(1)
        with closing(Ram(process.pid)) as ram:
            before = await settled(process.pid)
            yield bench, process
            await console.new_beats(3)
            ram.require_intact()
        assert await answering_pid(bench.qmp) == process.pid
        async with bench.session(bench.qmp) as client:
            assert (await client.execute("query-migrate-parameters"))["mode"] == "normal"
            events = [c for c in await client.execute("query-migrate-capabilities") if c["capability"] == "events"]
            assert events == [{"capability": "events", "state": False}]
        await holds(process.pid, before)
        assert process.said() == []


def end_orphan(pid: int) -> None:
    """Wait for the end of a process that is not our child, having told it to go."""
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        assert select.select([pidfd], [], [], 20)[0], "it does not end"
    finally:
        os.close(pidfd)
