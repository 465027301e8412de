"""Guests that write faster than they are copied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.phases.copy_kit import HANGS, destination_peer, empty, in_status, outcome, parts, started
from vmm.errors import MigrationRefused
from vmm.guests.dirtier import DirtierReader

if TYPE_CHECKING:
    from pathlib import Path

    from vmm.embedding import EmbeddedMachine

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

RATE = 4 << 20
"""Bytes a second that are sent at most: a tenth of what the guest writes. So a pass takes a quarter of a second."""
GUEST = {"kernel": "builtin:dirtier", "append": "region=1M pages=64 hz=200"}
QUICK = {
    "cpu-throttle-initial": 99, "throttle-trigger-threshold": 10, "max-bandwidth": RATE, "downtime-limit": 0,
    "x-vcpu-dirty-limit-period": 1,
}  # fmt: skip
"""As long as there may be no pause at all, it does not end by itself, but where the guest writes nothing in a pass."""
HALF = {"cpu-throttle-initial": 50, "max-cpu-throttle": 50}
"""Not enough for it to end."""


async def throttled(source: EmbeddedMachine) -> int:
    """Return the share of the time for which the guest is kept out, once it is."""
    with trio.fail_after(HANGS):
        while "cpu-throttle-percentage" not in (info := await source.execute("query-migrate")):
            assert info["status"] == "active"
            await trio.sleep(0.01)  # there is no event
    return int(info["cpu-throttle-percentage"])


async def begin(source: EmbeddedMachine, uri: str, capability: str, **changes: int) -> None:
    """Migrate with a capability on."""
    settings: dict[str, Any] = {name.replace("-", "_"): value for name, value in {**QUICK, **changes}.items()}
    await source.execute("migrate-set-parameters", **settings)
    await source.execute("migrate-set-capabilities", capabilities=[{"capability": capability, "state": True}])
    await source.execute("migrate", uri=uri)


async def written(machine: EmbeddedMachine, pages: int) -> None:
    """Wait until the guest has written so many more pages, and verify all of them."""
    reader = DirtierReader(parts(machine).memory.read)
    with trio.fail_after(HANGS):
        while (begun := reader.written()) is None:  # noqa: ASYNC110 - a guest does not tell
            await trio.sleep(0.005)
        while (reader.written() or 0) < begun + pages:  # noqa: ASYNC110
            await trio.sleep(0.005)
    report = reader.look()
    assert report is not None
    assert report.intact, str(report)


@pytest.mark.parametrize("capability", ["auto-converge", "dirty-limit"])
async def test_a_guest_that_writes_too_fast_is_slowed_down_until_it_has_gone(capability: str, tmp_path: Path) -> None:
    uri = f"unix:{tmp_path}/there"
    async with started(ticks=0, **GUEST) as source, empty() as destination:
        await written(source, 600)
        await destination.execute("migrate-incoming", uri=uri)
        await begin(source, uri, capability)
        assert await throttled(source) == 99 or capability == "dirty-limit"
        await source.execute("migrate-set-parameters", downtime_limit=30)
        info = await outcome(source)
        assert info["status"] == "completed", info
        assert "cpu-throttle-percentage" not in info
        await in_status(destination, "running")
        await written(destination, 600)


async def test_a_guest_that_stays_is_no_longer_slowed_down(tmp_path: Path) -> None:
    uri = f"unix:{tmp_path}/there"
    async with started(ticks=0, **GUEST) as source, empty() as destination:
        await destination.execute("migrate-incoming", uri=uri, exit_on_error=False)
        await begin(source, uri, "auto-converge", **HALF)
        assert await throttled(source) == 50
        await source.execute("migrate_cancel")
        assert "cpu-throttle-percentage" not in await outcome(source)
        await written(source, 600)


async def test_a_throttled_guest_can_be_stopped_at_once(tmp_path: Path) -> None:
    uri = f"unix:{tmp_path}/there"
    async with started(ticks=0, **GUEST) as source, empty() as destination:
        await destination.execute("migrate-incoming", uri=uri, exit_on_error=False)
        await begin(source, uri, "auto-converge", **HALF)
        await throttled(source)
        await source.execute("stop")
        assert (await outcome(source))["status"] == "completed"
        await in_status(destination, "paused")
        await destination.execute("cont")
        await written(destination, 600)


async def test_one_way_to_slow_a_guest_down_excludes_the_other() -> None:
    async with started() as source:
        both = [{"capability": name, "state": True} for name in ("auto-converge", "dirty-limit")]
        with pytest.raises(MigrationRefused) as caught:
            await source.execute("migrate-set-capabilities", capabilities=both)
        assert str(caught.value) == (
            "Migration capabilities 'dirty-limit' and 'auto-converge' exclude each other: both slow the guest down to "
            "let the migration end; turn one of them off"
        )


async def test_what_is_written_until_the_destination_is_ready_goes_before_the_pause(tmp_path: Path) -> None:
    slow = {**GUEST, "append": "hz=100 pages=2 region=4M"}
    async with started(ticks=0, **slow) as source, destination_peer(source, tmp_path) as peer:
        await peer.invite()
        await peer.read_pages()
        passes = (await outcome(source, "active"))["ram"]["dirty-sync-count"]
        await written(source, 200)
        await source.execute("migrate-set-parameters", downtime_limit=0)
        await peer.say("prepared")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.ended)
            # One more at least with the guest running, and the one with what was left as it was stopped.
            assert (await outcome(source, "device"))["ram"]["dirty-sync-count"] >= passes + 2
            nursery.cancel_scope.cancel()
