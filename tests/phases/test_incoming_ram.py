"""How much of a guest's RAM has come, as the destination tells it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

from tests.phases.copy_kit import HANGS, SIZE, empty, outcome, parts, started
from vmm.migration import mapped_ram
from vmm.migration.ram import RamWriter

if TYPE_CHECKING:
    from pathlib import Path

    from vmm.embedding import EmbeddedMachine

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

BYSTANDER: Final = 8 << 20
"""Address of RAM that the guest leaves alone."""
FILLED: Final = 4 << 20
MAPPED: Final = [{"capability": "mapped-ram", "state": True}]
MULTIFD: Final = [{"capability": "multifd", "state": True}]


def fill(machine: EmbeddedMachine) -> None:
    parts(machine).memory.write(BYSTANDER, bytes(range(1, 129)) * (FILLED // 128))


async def ram_of(machine: EmbeddedMachine) -> dict[str, Any]:
    return dict((await machine.execute("query-migrate")).get("ram", {}))


@pytest.mark.parametrize("capabilities", [[], MULTIFD], ids=["one channel", "multifd"])
async def test_what_comes_over_a_socket_is_counted_as_it_comes(
    capabilities: list[dict[str, Any]], tmp_path: Path
) -> None:
    async with started() as source, empty() as destination:
        fill(source)
        uri = f"unix:{tmp_path / 'main'}"
        await destination.execute("migrate-incoming", uri=uri)
        assert await ram_of(destination) == {}
        slow = {"max-bandwidth": 2 << 20, "downtime-limit": 0}
        await source.execute("migrate", uri=uri, capabilities=capabilities, parameters=slow)
        seen: list[dict[str, Any]] = []
        with trio.fail_after(HANGS):
            while not seen or seen[-1]["transferred"] < FILLED // 2:
                await trio.sleep(0.005)
                if found := await ram_of(destination):
                    seen.append(found)
        assert all(found["total"] == SIZE for found in seen)
        left = [found["remaining"] for found in seen]
        assert left == sorted(left, reverse=True)
        assert 0 < left[-1] <= SIZE - FILLED // 4
        await source.execute("migrate-set-parameters", max_bandwidth=0, downtime_limit=2000)
        sent, came = (await outcome(source))["ram"], (await outcome(destination))["ram"]
        assert came["remaining"] == 0
        assert came["normal-bytes"] == sent["normal-bytes"] > FILLED
        assert came["multifd-bytes"] == sent["multifd-bytes"]
        assert came["transferred"] > came["normal-bytes"]
        assert (came["multifd-bytes"] > FILLED) is bool(capabilities)


async def test_of_a_file_it_is_known_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with started() as source:
        fill(source)
        await source.execute("migrate", uri=f"file:{tmp_path / 'state'}")
        assert (await outcome(source))["status"] == "completed"
    left: list[int] = []
    take = RamWriter.take_pages
    async with empty(autostart=False) as destination:

        def noting(self: RamWriter, *arguments: Any, **more: Any) -> bool:
            progress = parts(destination).made.migration.progress
            assert progress is not None
            left.append(progress.ram.remaining)
            return take(self, *arguments, **more)

        monkeypatch.setattr(RamWriter, "take_pages", noting)
        await destination.execute("migrate-incoming", uri=f"file:{tmp_path / 'state'}")
        came = (await outcome(destination))["ram"]
    assert left == sorted(left, reverse=True)
    assert FILLED < left[0] <= (tmp_path / "state").stat().st_size
    assert left[-1] < left[0] // 4
    assert came["remaining"] == 0
    assert came["transferred"] == (tmp_path / "state").stat().st_size


@pytest.mark.parametrize("on_demand", [False, True])
async def test_pages_at_their_places_are_counted_also_those_that_come_when_the_guest_runs(
    on_demand: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several threads take several pieces each.
    monkeypatch.setattr(mapped_ram, "PIECE_PAGES", 512)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    async with started() as source:
        fill(source)
        await source.execute("migrate", uri=f"file:{tmp_path / 'state'}", capabilities=MAPPED)
        saved = (await outcome(source))["ram"]
    async with empty() as destination:
        parameters = {"x-restore-on-demand": on_demand}
        job = {"parameters": parameters, "job_id": "j0"}
        await destination.execute("migrate-incoming", uri=f"file:{tmp_path / 'state'}", **job)
        await outcome(destination)
        (told,) = await destination.execute("query-jobs")
        assert told["current-progress"] == told["total-progress"]
        with trio.fail_after(HANGS):
            while (came := await ram_of(destination))["remaining"]:  # noqa: ASYNC110 - it has no event
                await trio.sleep(0.005)
        assert came["total"] == SIZE
        assert came["transferred"] == came["normal-bytes"]
        assert came["normal"] + came["duplicate"] == SIZE // 4096
        # The source counts a page as often as it was written.
        assert FILLED < came["normal-bytes"] <= saved["normal-bytes"]
