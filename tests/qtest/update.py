"""Live updates of machines whose both sides are in the test's own process."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio

from tests.phases.machine import connected, machine, monitor
from tests.phases.update_kit import begin_update, channels, due, outcome
from vmm.phases.start import Start
from vmm.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from tests.phases.machine import Running
    from vmm.qmp_client import QmpClient
    from vmm.recipe import Step


@asynccontextmanager
async def successor(
    folder: Path, *steps: Step
) -> AsyncGenerator[tuple[Running, QmpClient, list[dict[str, Any]]], None]:
    """Run a process that awaits a machine; yield it, a client of its own monitor, and where it listens."""
    await trio.Path(folder).mkdir()
    where = channels(str(folder / "main"), str(folder / "cpr"))
    # A name of its own: what steps aside for the one that comes is called after the process, and both are one here.
    path = folder / "qmp"
    start = Start(Recipe("of this test", (*monitor(path, folder.name), *steps)))
    async with machine(start, path) as running, connected(path) as client:
        await client.execute("migrate-incoming", channels=where)
        yield running, client, where


async def hand_over(source: QmpClient, where: list[dict[str, Any]]) -> dict[str, Any]:
    """Hand the machine of `source` over; return what `query-migrate` says then."""
    await begin_update(source, where)
    info = await outcome(source)
    assert info["status"] == "completed", info
    return info


async def here(client: QmpClient) -> None:
    """Wait until the machine is the one's behind `client`."""
    async with due("the machine"):
        while (await client.execute("query-migrate")).get("status") != "completed":
            await client.wait_event(lambda event: True)
