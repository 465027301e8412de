"""A guest that is saved in a file with its RAM at fixed places, and comes back from there, all at once or as used."""

from __future__ import annotations

import os
import resource
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, cast

import pytest
import trio

import vmm
from tests.phases.copy_kit import (
    HANGS,
    SIZE,
    commands,
    empty,
    goes_on,
    in_status,
    look,
    outcome,
    parts,
    ram,
    refusal,
    started,
    status,
    ticked,
)
from tests.phases.memory_kit import in_file, recipe
from vmm.errors import (
    GuestPageLost,
    HostFileRefused,
    InvalidState,
    MigrationRefused,
    PageFaultsUnavailable,
    StreamCorrupt,
)
from vmm.guests.dirtier import DirtierReader
from vmm.migration.mapped_ram import MappedReader
from vmm.migration.ram_file_records import RamMapped
from vmm.migration.registry import CheckedState
from vmm.migration.status import MigrationProgress, MigrationRamStats
from vmm.migration.stream import StreamReader
from vmm.phases import saving
from vmm.phases.absent_pages import AbsentPages
from vmm.phases.start import Start
from vmm.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from vmm.capabilities import MayWriteGuestMemory
    from vmm.decisions import Turn
    from vmm.embedding import EmbeddedMachine
    from vmm.nursery_tree import Phase
    from vmm.phases.copy_plan import CopyPlan
    from vmm.phases.copying import Gone
    from vmm.phases.running import Run

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

BYSTANDER = 12 << 20
"""Address of RAM that the guest leaves alone."""
MAPPED = [{"capability": "mapped-ram", "state": True}]
BACKGROUND = [*MAPPED, {"capability": "background-snapshot", "state": True}]
ON_DEMAND = {"x-restore-on-demand": True}


async def save(machine: EmbeddedMachine, path: Path, capabilities: list[dict[str, Any]] = MAPPED) -> dict[str, Any]:
    """Save the guest in a file; return what is said of it."""
    await machine.execute("migrate", uri=f"file:{path}", capabilities=capabilities)
    info = await outcome(machine)
    assert info["status"] == "completed", info
    return info


def map_in(path: Path) -> RamMapped:
    """Return what a file says of where its pages are."""
    reader = StreamReader(seekable=True)
    with open(path, "rb") as file:
        return next(record for record in reader.feed(file.read(1 << 20)) if isinstance(record, RamMapped))


async def test_a_guest_comes_back_from_a_sparse_file(tmp_path: Path) -> None:
    async with started() as source:
        parts(source).memory.write(BYSTANDER, b"then")
        info = await save(source, tmp_path / "state")
        before, ticks = ram(source), look(source).ticks
        assert await status(source) == "postmigrate"
        assert info["ram"]["remaining"] == 0
        assert (info["ram"]["normal"] + info["ram"]["duplicate"]) * 4096 >= SIZE
    found = os.stat(tmp_path / "state")
    assert found.st_size > SIZE
    assert found.st_blocks * 512 < SIZE // 4
    async with empty(autostart=False) as destination:
        await destination.execute("migrate-incoming", uri=f"file:{tmp_path / 'state'}")
        await in_status(destination, "paused")
        assert ram(destination) == before
        assert look(destination).ticks == ticks
        await destination.execute("cont")
        await goes_on(destination)


async def test_what_is_used_for_the_first_time_until_the_guest_stands_is_saved_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Run] = []
    begins, held, over = trio.Event(), trio.Event(), trio.Event()
    run_saving = saving.run_saving

    async def noted(running: Phase, run: Run, plan: CopyPlan, turn: Turn[Any]) -> Gone | None:
        runs.append(run)
        begins.set()
        await held.wait()
        return await run_saving(running, run, plan, turn)

    async def hold() -> None:
        await begins.wait()
        async with runs[0].control:
            held.set()
            await over.wait()

    monkeypatch.setattr(saving, "run_saving", noted)
    async with started() as source, trio.open_nursery() as nursery:
        await source.execute("stop")
        nursery.start_soon(hold)
        await source.execute("migrate", uri=f"file:{tmp_path / 'state'}", capabilities=MAPPED)
        with trio.fail_after(HANGS):
            while not runs[0].control.statistics().tasks_waiting:
                await trio.lowlevel.checkpoint()
        parts(source).memory.write(BYSTANDER, b"at last")
        over.set()
        assert (await outcome(source))["status"] == "completed"
        before = ram(source)
    async with empty(autostart=False) as destination:
        await destination.execute("migrate-incoming", uri=f"file:{tmp_path / 'state'}")
        await in_status(destination, "paused")
        assert ram(destination) == before


async def test_a_guest_is_saved_while_it_runs_and_what_it_writes_again_goes_to_its_place(tmp_path: Path) -> None:
    async with started(region="1M") as source:
        settings = {"downtime-limit": 0, "max-bandwidth": 4 << 20}
        async with source.events() as events:
            await source.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
            uri = f"file:{tmp_path / 'state'}"
            await source.execute("migrate", uri=uri, capabilities=MAPPED, parameters=settings)
            seen: list[Any] = []
            async for event in events:
                seen.append(event["data"]["pass"] if event["event"] == "MIGRATION_PASS" else event["event"])
                if seen[-1] == 2:
                    # It would never go within such a limit.
                    await source.execute("migrate-set-parameters", downtime_limit=2000, max_bandwidth=1 << 40)
                if event.get("data") == {"status": "completed"}:
                    break
        info = await outcome(source)
        assert seen.index(1) < seen.index(2) < seen.index("STOP")
        assert info["ram"]["dirty-sync-count"] >= 3
        assert info["ram"]["precopy-bytes"] > 0
        before = ram(source)
    assert os.stat(tmp_path / "state").st_size < SIZE + (2 << 20)
    async with empty(autostart=False) as destination:
        await destination.execute("migrate-incoming", uri=f"file:{tmp_path / 'state'}")
        await in_status(destination, "paused")
        assert ram(destination) == before
        await destination.execute("cont")
        await goes_on(destination)


async def test_a_guest_runs_at_once_and_its_ram_comes_as_it_is_used(tmp_path: Path) -> None:
    async with started() as source:
        parts(source).memory.write(BYSTANDER, b"then")
        await save(source, tmp_path / "state")
        before = ram(source)
    async with empty(autostart=False) as destination:
        await destination.execute("migrate-incoming", uri=f"file:{tmp_path / 'state'}", parameters=ON_DEMAND)
        await in_status(destination, "paused")
        assert parts(destination).memory.read(BYSTANDER, 4) == b"then"
        assert [size for _, size, _ in ram(destination)] == [size for _, size, _ in before]
        await destination.execute("cont")
        await goes_on(destination)
        # What is not there yet is awaited before the guest goes anywhere else.
        await save(destination, tmp_path / "again")
        assert parts(destination).memory.absent is None
        await destination.execute("cont")
        await goes_on(destination)


@pytest.mark.parametrize("on_demand", [False, True])
async def test_a_running_guest_goes_back(on_demand: bool, tmp_path: Path) -> None:
    async with started() as machine:
        await machine.execute("migrate-set-parameters", x_restore_on_demand=on_demand)
        parts(machine).memory.write(BYSTANDER, b"then")
        await save(machine, tmp_path / "state")
        await machine.execute("cont")
        parts(machine).memory.write(BYSTANDER, b"now ")
        parts(machine).memory.write(BYSTANDER + 4096, b"new")
        for _ in range(2):
            await machine.execute("loadvm", name=str(tmp_path / "state"))
            assert await status(machine) == "running"
            assert parts(machine).memory.read(BYSTANDER, 4) == b"then"
            assert parts(machine).memory.read(BYSTANDER + 4096, 3) == bytes(3)
            await goes_on(machine)


async def test_a_file_can_be_written_over(tmp_path: Path) -> None:
    async with started() as source:
        await save(source, tmp_path / "state")
        await source.execute("cont")
        await goes_on(source)
        await save(source, tmp_path / "state")
        before = ram(source)
    async with empty(autostart=False) as destination:
        await destination.execute("migrate-incoming", uri=f"file:{tmp_path / 'state'}")
        await in_status(destination, "paused")
        assert ram(destination) == before


async def test_pages_begin_at_a_mebibyte_of_the_file_wherever_the_stream_does(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"before".ljust(5000))
    async with started() as source:
        await source.execute("migrate", uri=f"file:{tmp_path / 'state'},offset=5000", capabilities=MAPPED)
        assert (await outcome(source))["status"] == "completed"
        before = ram(source)
    assert (tmp_path / "state").read_bytes()[:5000] == b"before".ljust(5000)
    (tmp_path / "stream").write_bytes((tmp_path / "state").read_bytes()[5000:])
    assert (map_in(tmp_path / "stream").area + 5000) % (1 << 20) == 0
    async with empty(autostart=False) as destination:
        await destination.execute("migrate-incoming", uri=f"file:{tmp_path / 'state'},offset=5000")
        await in_status(destination, "paused")
        assert ram(destination) == before


async def test_a_background_snapshot_is_of_one_moment_and_the_guest_goes_on(tmp_path: Path) -> None:
    async with started() as source:
        parts(source).memory.write(BYSTANDER, b"then")
        async with source.events() as events:
            await save(source, tmp_path / "state", BACKGROUND)
            assert await status(source) == "running"
            parts(source).memory.write(BYSTANDER, b"now ")
            seen: list[str] = []
            async for event in events:
                seen.append(event["event"])
                if seen[-1] == "RESUME":
                    break
        assert [name for name in seen if name in ("STOP", "RESUME")] == ["STOP", "RESUME"]
        assert source.path.endswith("/running")
        await goes_on(source)
        later = look(source).ticks
    async with empty(autostart=False) as destination:
        await destination.execute("migrate-incoming", uri=f"file:{tmp_path / 'state'}")
        await in_status(destination, "paused")
        assert parts(destination).memory.read(BYSTANDER, 4) == b"then"
        assert look(destination).ticks < later
        await destination.execute("cont")
        await goes_on(destination)


async def test_a_guest_that_stands_can_be_snapshot_too(tmp_path: Path) -> None:
    async with started() as source:
        await source.execute("stop")
        before = ram(source)
        await save(source, tmp_path / "state", BACKGROUND)
        assert await status(source) == "paused"
        assert ram(source) == before
        await source.execute("loadvm", name=str(tmp_path / "state"))
        assert ram(source) == before
        await source.execute("cont")
        await goes_on(source)


@pytest.fixture
def short_files() -> Generator[None, None, None]:
    """Let no file of this process become longer than 8 MiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("capabilities", [MAPPED, BACKGROUND], ids=["mapped", "background"])
async def test_a_file_that_takes_no_more_costs_the_guest_nothing(
    capabilities: list[dict[str, Any]], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    async with started() as source:
        parts(source).memory.write(BYSTANDER, b"beyond")
        request.getfixturevalue("short_files")
        await source.execute("migrate", uri=f"file:{tmp_path / 'state'}", capabilities=capabilities)
        info = await outcome(source)
        assert (info["status"], info["error-desc"]) == ("failed", f"Cannot write {tmp_path / 'state'}: File too large")
        await goes_on(source)


async def test_where_mapped_ram_cannot_be_is_said_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with started() as source:
        with pytest.raises(MigrationRefused, match=r"which only a file has; give a file:, or turn it off"):
            await source.execute("migrate", uri=f"unix:{tmp_path / 'nobody'}", capabilities=MAPPED)
        with pytest.raises(MigrationRefused, match="background-snapshot needs a place in a file for each page; turn"):
            await source.execute("migrate", uri=f"file:{tmp_path / 'state'}", capabilities=BACKGROUND[1:])

        def lacks(action: str, names: object) -> None:
            raise PageFaultsUnavailable(action=action, reason=f"lacks {names}")

        monkeypatch.setattr(saving, "require_features", lacks)
        with pytest.raises(PageFaultsUnavailable, match="Cannot keep the guest's RAM as it is while the guest runs"):
            await source.execute("migrate", uri=f"file:{tmp_path / 'state'}", capabilities=BACKGROUND)
        assert not (tmp_path / "state").exists()
        await goes_on(source)


async def test_ram_in_a_file_stays_there_with_both_but_not_of_a_guest_that_goes_on(tmp_path: Path) -> None:
    both = [*MAPPED, {"capability": "x-ignore-shared", "state": True}]
    async with vmm.machine(recipe(in_file(tmp_path / "ram"))) as source:
        await ticked(source, 5)
        with pytest.raises(MigrationRefused, match="where a guest that goes on while it is saved"):
            await source.execute("migrate", uri=f"file:{tmp_path / 'state'}", capabilities=[*both, *BACKGROUND[1:]])
        assert not (tmp_path / "state").exists()
        info = await save(source, tmp_path / "state", both)
        assert info["ram"]["normal"] == info["ram"]["duplicate"] == 0
        assert (tmp_path / "state").stat().st_size < 1 << 20


async def test_in_mode_cpr_reboot_the_guest_stands_while_it_is_saved(tmp_path: Path) -> None:
    async with started() as source:
        uri = f"file:{tmp_path / 'state'}"
        await source.execute("migrate", uri=uri, capabilities=MAPPED, parameters={"mode": "cpr-reboot"})
        info = await outcome(source)
        assert info["ram"]["dirty-sync-count"] == 1
        assert info["ram"]["precopy-bytes"] == 0 < info["ram"]["downtime-bytes"]


def damage(path: Path, at: int) -> None:
    """Change one byte of a file."""
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0x40]))


def page_at(path: Path, address: int) -> int:
    """Return where a page of the low RAM is in a file."""
    return map_in(path).area + address


@pytest.mark.parametrize("on_demand", [False, True])
async def test_a_damaged_page_is_refused_before_the_guest_is_given_up(on_demand: bool, tmp_path: Path) -> None:
    async with started() as source:
        await source.execute("migrate-set-parameters", x_restore_on_demand=on_demand)
        parts(source).memory.write(BYSTANDER, b"then")
        await save(source, tmp_path / "state")
        damage(tmp_path / "state", page_at(tmp_path / "state", BYSTANDER))
        await source.execute("cont")
        with pytest.raises(GuestPageLost, match=f"RAM at {BYSTANDER:#x} from .*: it is damaged: its checksum is"):
            await source.execute("loadvm", name=str(tmp_path / "state"))
        await goes_on(source)
    with refusal(GuestPageLost, "it is damaged"):
        async with empty() as destination:
            await destination.execute("migrate-incoming", uri=f"file:{tmp_path / 'state'}")
            await trio.sleep_forever()


async def test_a_state_that_cannot_be_put_in_force_is_seen_through_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: CheckedState) -> None:
        raise HostFileRefused(action="set", path="a vCPU", reason="the host won't")

    async with started() as machine:
        await save(machine, tmp_path / "state")
        await machine.execute("cont")
        await machine.execute("migrate-set-parameters", x_restore_on_demand=True)
        with monkeypatch.context() as patch:
            patch.setattr(CheckedState, "apply", fails)
            with pytest.raises(HostFileRefused, match="the host won't"):
                await machine.execute("loadvm", name=str(tmp_path / "state"))
        assert await status(machine) == "internal-error"
        with trio.fail_after(HANGS):
            while parts(machine).memory.absent is not None:
                await trio.lowlevel.checkpoint()
        await machine.execute("loadvm", name=str(tmp_path / "state"))
        await machine.execute("cont")
        await goes_on(machine)


async def test_what_is_told_of_pages_that_come_is_kept_though_another_migration_has_begun() -> None:
    class Pages:
        async def wait_over(self) -> None:
            stats.remaining = 0

        def close(self) -> None:
            pass

    stats = SimpleNamespace(remaining=30)
    first = MigrationProgress("target", lambda status: None, lambda: 0.0)
    first.follow_ram(lambda: MigrationRamStats(remaining=stats.remaining), beyond=True)
    migration = SimpleNamespace(progress=first)
    run = SimpleNamespace(machine=SimpleNamespace(made=SimpleNamespace(migration=migration)))
    pages = AbsentPages(cast("Any", run), cast("Any", Pages()))
    migration.progress = MigrationProgress("source", lambda status: None, lambda: 0.0)
    await pages.serve()
    assert (pages.complete, pages.lost) == (True, False)
    stats.remaining = 30  # nobody asks any more
    assert first.ram.remaining == 0


@pytest.mark.parametrize("what", ["bitmap", "sums"])
@pytest.mark.parametrize("on_demand", [False, True])
async def test_damaged_tables_are_refused_before_the_guest_runs(what: str, on_demand: bool, tmp_path: Path) -> None:
    async with started() as source:
        await save(source, tmp_path / "state")
        at = getattr(map_in(tmp_path / "state"), what)
        damage(tmp_path / "state", at + 3)
        await source.execute("cont")
        await source.execute("migrate-set-parameters", x_restore_on_demand=on_demand)
        with pytest.raises(StreamCorrupt, match=rf"a damaged (bitmap of pages|table of checksums) at offset {at}"):
            await source.execute("loadvm", name=str(tmp_path / "state"))
        await goes_on(source)


@pytest.mark.parametrize(
    ("state", "why"), [("internal-error", "it is damaged: its checksum is"), ("io-error", "the file ends before it")]
)
async def test_a_guest_whose_page_is_lost_stands_and_says_why(
    state: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    come = MappedReader.come

    async def come_from_a_file_that_has_changed(reader: MappedReader, may: MayWriteGuestMemory) -> None:
        if state == "internal-error":
            damage(path, page_at(path, BYSTANDER))
        else:
            os.truncate(path, page_at(path, BYSTANDER))
        await come(reader, may)

    async with started() as machine:
        parts(machine).memory.write(BYSTANDER, b"then")
        await save(machine, path)
        await machine.execute("cont")
        monkeypatch.setattr(MappedReader, "come", come_from_a_file_that_has_changed)
        await machine.execute("migrate-set-parameters", x_restore_on_demand=True)
        await machine.execute("loadvm", name=str(path))
        await in_status(machine, state)
        with pytest.raises(InvalidState, match=f"{BYSTANDER:#x} from .*{why}"):
            await machine.execute("cont")
        monkeypatch.undo()
        # It is not the end of the machine.
        await machine.execute("system_reset")
        await machine.execute("cont")
        await ticked(machine, 5)
        assert parts(machine).memory.absent is None


async def test_the_machine_can_end_while_pages_are_still_to_come(tmp_path: Path) -> None:
    async with started() as source:
        await save(source, tmp_path / "state")
    async with empty() as destination:
        await destination.execute("migrate-incoming", uri=f"file:{tmp_path / 'state'}", parameters=ON_DEMAND)


async def test_where_ram_cannot_come_as_it_is_used_all_of_it_is_loaded_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started() as source:
        await save(source, tmp_path / "state")
        before = ram(source)

    async def lacks(_reader: MappedReader, _may: MayWriteGuestMemory) -> None:
        raise PageFaultsUnavailable(action="come", reason="not here")

    monkeypatch.setattr(MappedReader, "come", lacks)
    told: list[str] = []
    start = Start(Recipe("of this test"), autostart=False, complain=told.append)
    async with vmm.machine(start=start) as destination:
        await destination.execute("migrate-incoming", uri=f"file:{tmp_path / 'state'}", parameters=ON_DEMAND)
        await in_status(destination, "paused")
        assert ram(destination) == before
    assert told == ["Cannot come: not here; all of it is loaded before the guest runs"]


DIRTIER: Final = {"kernel": "builtin:dirtier", "append": "region=4M pages=64 hz=100"}
"""A guest that writes all the time, and whose every page can be verified."""


async def has_written(reader: DirtierReader, pages: int) -> None:
    """Wait until the guest has written so many pages."""
    with trio.fail_after(HANGS):
        while (reader.written() or 0) < pages:  # noqa: ASYNC110 - a guest does not tell
            await trio.sleep(0.005)


@pytest.mark.parametrize("capabilities", [MAPPED, BACKGROUND], ids=["mapped", "background"])
async def test_what_a_guest_writes_all_the_time_is_of_one_moment(
    capabilities: list[dict[str, Any]], tmp_path: Path
) -> None:
    async with vmm.machine(commands(**DIRTIER)) as source:
        reader = DirtierReader(parts(source).memory.read)
        await has_written(reader, 500)
        await save(source, tmp_path / "state", capabilities)
        if capabilities is BACKGROUND:
            await has_written(reader, (reader.written() or 0) + 500)
            await source.execute("stop")
        report = reader.look()
        assert report is not None
        assert report.intact, str(report)
    async with empty(autostart=False) as destination:
        await destination.execute("migrate-incoming", uri=f"file:{tmp_path / 'state'}", parameters=ON_DEMAND)
        await in_status(destination, "paused")
        reader = DirtierReader(parts(destination).memory.read)
        report = reader.look()
        assert report is not None
        assert report.stood
        assert report.intact, str(report)
        await destination.execute("cont")
        await has_written(reader, report.dirtier.written + 500)
        report = reader.look()
        assert report is not None
        assert report.intact, str(report)
