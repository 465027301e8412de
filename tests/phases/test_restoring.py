"""A saved state is put in place of a running guest's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from tests.phases.copy_kit import at_path, goes_on, look, outcome, parts, ram, save, started, status, ticked
from vmm.errors import DifferencesVisible, HostFileRefused, StreamCorrupt, VmmError
from vmm.migration.inflow import Inflow

if TYPE_CHECKING:
    from pathlib import Path

    from vmm.embedding import EmbeddedMachine

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

BYSTANDER = 12 << 20
"""Address of RAM that the guest leaves alone."""


async def saved_and_gone_on(machine: EmbeddedMachine, path: Path) -> int:
    """Save the guest, let it go on, and change its memory; return its ticks when it was saved."""
    parts(machine).memory.write(BYSTANDER, b"then")
    await save(machine, path)
    ticks = look(machine).ticks
    await machine.execute("cont")
    await ticked(machine, ticks + 300)
    parts(machine).memory.write(BYSTANDER, b"now ")
    parts(machine).memory.write(BYSTANDER + 4096, b"new")
    return ticks


async def test_a_running_guest_goes_back_to_what_it_was(tmp_path: Path) -> None:
    async with started() as machine:
        await saved_and_gone_on(machine, tmp_path / "state")
        await machine.execute("loadvm", name=str(tmp_path / "state"))
        assert await status(machine) == "running"
        assert parts(machine).memory.read(BYSTANDER, 4) == b"then"
        assert parts(machine).memory.read(BYSTANDER + 4096, 4) == bytes(4)
        await goes_on(machine)
        assert machine.path.endswith("/running")
        assert (await outcome(machine))["status"] == "completed"


async def test_a_guest_that_stands_goes_back_and_stands(tmp_path: Path) -> None:
    async with started() as machine:
        ticks = await saved_and_gone_on(machine, tmp_path / "state")
        await machine.execute("stop")
        for _ in range(2):
            await machine.execute("loadvm", name=str(tmp_path / "state"))
            assert await status(machine) == "paused"
            assert look(machine).ticks == ticks
        await machine.execute("cont")
        await goes_on(machine)


async def test_events_say_that_it_stood(tmp_path: Path) -> None:
    async with started() as machine:
        await saved_and_gone_on(machine, tmp_path / "state")
        async with machine.events() as events:
            await machine.execute("loadvm", name=str(tmp_path / "state"))
            seen: list[str] = []
            async for event in events:
                seen.append(event["event"])
                if seen[-1] == "RESUME":
                    break
        assert [name for name in seen if name in ("STOP", "RESUME")] == ["STOP", "RESUME"]


@pytest.mark.parametrize("cut", [1, 5000, 100_000])
async def test_a_damaged_file_is_refused_before_the_guest_is_touched(cut: int, tmp_path: Path) -> None:
    async with started() as machine:
        await saved_and_gone_on(machine, tmp_path / "state")
        data = await trio.Path(tmp_path / "state").read_bytes()
        await trio.Path(tmp_path / "bad").write_bytes(data[:-cut])
        async with machine.events() as events:
            with pytest.raises(StreamCorrupt, match="it ends after"):
                await machine.execute("loadvm", name=str(tmp_path / "bad"))
            await machine.execute("stop")
            seen: list[str] = []
            async for event in events:
                seen.append(event["event"])
                if seen[-1] == "STOP":
                    break
        assert "RESUME" not in seen
        assert parts(machine).memory.read(BYSTANDER, 4) == b"now "
        await machine.execute("cont")
        await goes_on(machine)
        assert (await outcome(machine))["status"] == "failed"


async def test_another_machine_s_file_is_refused_with_a_list(tmp_path: Path) -> None:
    async with started() as machine, started(region="128K") as other:
        await save(other, tmp_path / "other")
        with pytest.raises(
            DifferencesVisible, match=r"machine-set.append \('region=128K' there, 'region=64K pages=1' here\)"
        ):
            await machine.execute("loadvm", name=str(tmp_path / "other"))
        await goes_on(machine)


async def test_no_file_is_told_at_once(tmp_path: Path) -> None:
    async with started() as machine:
        with pytest.raises(HostFileRefused, match="Cannot read"):
            await machine.execute("loadvm", name=str(tmp_path / "state"))
        await goes_on(machine)


async def test_after_a_restore_the_guest_can_be_saved_again_and_reset(tmp_path: Path) -> None:
    async with started() as machine:
        await saved_and_gone_on(machine, tmp_path / "state")
        await machine.execute("stop")
        await machine.execute("loadvm", name=str(tmp_path / "state"))
        before = ram(machine)
        await save(machine, tmp_path / "again")
        await machine.execute("cont")
        await machine.execute("stop")
        await machine.execute("loadvm", name=str(tmp_path / "again"))
        assert ram(machine) == before
        await machine.execute("system_reset")
        await machine.execute("cont")
        await at_path(machine, "running")
        await ticked(machine, 5)


async def test_a_file_that_changes_while_it_is_read_costs_the_guest_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started() as machine:
        await saved_and_gone_on(machine, tmp_path / "state")
        rewind = Inflow.rewind

        def change(flow: Inflow) -> None:
            # Between the two readings.
            (tmp_path / "state").write_bytes(b"something else altogether")
            rewind(flow)

        monkeypatch.setattr(Inflow, "rewind", change)
        with pytest.raises(StreamCorrupt):
            await machine.execute("loadvm", name=str(tmp_path / "state"))
        found = await machine.execute("query-status")
        assert found["status"] == "internal-error"
        assert found["x-reason"].startswith("State stream: it begins with 736f6d657468696e")
        with pytest.raises(VmmError, match="system_reset first"):
            await machine.execute("cont")
        await machine.execute("system_reset")
        await machine.execute("cont")
        await ticked(machine, 5)
