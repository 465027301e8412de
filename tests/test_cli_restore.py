"""`trio-vmm restore`: a machine from a file, as often as it is wanted."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import attrs
import pytest
import trio

from tests.phases.copy_kit import HANGS
from tests.phases.machine import Running, connected, monitor, parse
from tests.phases.streams import records_of, stream_of
from tests.saved_machines import begun, files, grown, original, saved, status, ticked, ticks
from tests.terminal import Screen
from vmm.cli_progress import Bar, Figures
from vmm.cli_resume import Loading, Saved, SavedStateRefused, _speaks, restored
from vmm.errors import OptionInvalid, VmmError
from vmm.migration.status import MigrationProgress, MigrationRamStats, MigrationStatus
from vmm.migration.stream import StreamWriter
from vmm.migration.stream_records import Home
from vmm.phases.migration_state import MigrationState
from vmm.recipe import Recipe

if TYPE_CHECKING:
    from pathlib import Path

    from vmm.qmp_client import QmpClient

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]


async def migrated(folder: Path, *, serial: bool = False, mapped: bool = False) -> int:
    """Save a guest by `migrate` to a file, and end its machine; return how often it had ticked."""
    async with original(folder, file=False, serial=serial) as running, connected(folder / "qmp") as client:
        await write(client, folder / "saved", mapped=mapped)
        return ticks(running)


async def write(client: QmpClient, path: Path, *, mapped: bool) -> None:
    capabilities = [{"capability": "mapped-ram", "state": mapped}]
    await client.execute("migrate", uri=f"file:{path}", capabilities=capabilities)
    with trio.fail_after(HANGS):
        while (info := await client.execute("query-migrate"))["status"] != "completed":
            assert info["status"] != "failed", info
            await trio.sleep(0.005)


async def starts(folder: Path, *options: str) -> int:
    """Restore a machine with a monitor of its own; return how often its guest had ticked before it was seen."""
    recipe = restored(str(folder / "saved"), parse("-qmp", f"unix:{folder}/mine", *options))
    async with begun(recipe, folder / "mine", autostart="-S" not in options) as running:
        return await goes_on(folder, running, stands="-S" in options)


async def goes_on(folder: Path, running: Running, *, stands: bool = False) -> int:
    async with connected(folder / "mine") as client:
        before = ticks(running)
        if stands:
            assert await status(client) == "paused"
            await client.execute("cont")
        assert await status(client) == "running"
        assert len(await client.execute("query-monitors")) == 1
    await ticked(running, before + 5)
    return before


async def test_a_machine_starts_from_a_file_as_often_as_it_is_wanted(tmp_path: Path) -> None:
    before = await migrated(tmp_path)
    content = (tmp_path / "saved").read_bytes()
    for options in ((), ("-S",), ()):
        assert await starts(tmp_path, *options) >= before
    assert (tmp_path / "saved").read_bytes() == content
    assert files(tmp_path) == ["saved"]


@pytest.mark.parametrize("whole", [False, True])
async def test_ram_that_has_its_places_in_the_file_comes_as_it_is_used_or_before(whole: bool, tmp_path: Path) -> None:
    before = await migrated(tmp_path, mapped=True)
    recipe = restored(str(tmp_path / "saved"), parse("-qmp", f"unix:{tmp_path}/mine"), whole=whole)
    assert [step.arguments.get("on-demand") for step in recipe if step.execute == "loadvm"] == [None if whole else True]
    async with begun(recipe, tmp_path / "mine") as running:
        assert await goes_on(tmp_path, running) >= before
        assert (running.tree.view(MigrationState).absent is None) is whole
        # It was lent to that one load.
        async with connected(tmp_path / "mine") as client:
            assert (await client.execute("query-migrate-parameters"))["x-restore-on-demand"] is False


async def test_ram_of_a_guest_from_elsewhere_comes_as_it_is_used_too(tmp_path: Path) -> None:
    before = await migrated(tmp_path, mapped=True)
    saved_state = Saved.read(str(tmp_path / "saved"), "restore")
    step = attrs.evolve(saved_state, has_home=False).comes_in(whole=False)
    recipe = Recipe("of this test", (*monitor(tmp_path / "mine"), step))
    async with begun(recipe, tmp_path / "mine") as running:
        async with connected(tmp_path / "mine") as client:
            with trio.fail_after(HANGS):
                while await status(client) != "running":  # noqa: ASYNC110 - it has no event
                    await trio.sleep(0.005)
            assert (await client.execute("query-migrate-parameters"))["x-restore-on-demand"] is False
        assert running.tree.view(MigrationState).absent is not None
        await ticked(running, before + 5)


async def test_it_has_its_own_monitors_and_the_chardevs_of_the_guest_unless_there_are_others(tmp_path: Path) -> None:
    await migrated(tmp_path, serial=True)
    said = (tmp_path / "ser").read_bytes()
    await starts(tmp_path)
    assert (tmp_path / "ser").read_bytes().startswith(said)
    os.unlink(tmp_path / "ser")
    await starts(tmp_path, "-chardev", f"file,id=s0,path={tmp_path}/other")
    assert files(tmp_path) == ["other", "saved"]


async def test_a_guest_whose_ram_was_left_in_its_file_goes_on_there_once(tmp_path: Path) -> None:
    await saved(tmp_path)
    await starts(tmp_path)
    with pytest.RaisesGroup(VmmError, flatten_subgroups=True) as caught:
        await starts(tmp_path)
    assert "a state can go on only once" in str(caught.value.exceptions[0])
    assert files(tmp_path) == ["ram", "saved"]


def over_a_network(path: Path) -> None:
    """Make of a file what came over a network, and was kept: it does not say what there was beside the guest."""
    found = records_of(path.read_bytes())
    path.write_bytes(stream_of([record for record in found if not isinstance(record, Home)]))


async def test_what_came_from_elsewhere_has_of_this_host_what_is_allowed_by_name(tmp_path: Path) -> None:
    await migrated(tmp_path, serial=True)
    over_a_network(tmp_path / "saved")
    with pytest.RaisesGroup(VmmError, flatten_subgroups=True) as caught:
        async with begun(restored(str(tmp_path / "saved"), parse()), tmp_path / "mine") as running:
            with trio.fail_after(HANGS):
                await running.ended.wait()
    assert "chardev/s0" in str(caught.value.exceptions[0])
    recipe = restored(
        str(tmp_path / "saved"),
        parse("-qmp", f"unix:{tmp_path}/mine", "-allow-resource", f"chardev/s0={tmp_path}/other"),
    )
    async with begun(recipe, tmp_path / "mine") as running:
        async with connected(tmp_path / "mine") as client:
            with trio.fail_after(HANGS):
                while await status(client) != "running":  # noqa: ASYNC110 - it has no event
                    await trio.sleep(0.005)
        await ticked(running, ticks(running) + 5)
    assert files(tmp_path) == ["other", "saved", "ser"]


async def test_what_cannot_be_restored_is_told(tmp_path: Path) -> None:
    path = tmp_path / "saved"
    path.write_bytes(b"x" * 100)
    path.chmod(0o600)
    with pytest.raises(SavedStateRefused) as caught:
        restored(str(path), parse())
    assert str(caught.value) == (
        f"Cannot restore from {path}: State stream: it begins with 7878787878787878, expected 8954564d4d0d0a1a"
    )
    writer = StreamWriter("vm")
    path.write_bytes(b"".join(writer.finish()))
    with pytest.raises(SavedStateRefused) as caught:
        restored(str(path), parse())
    assert str(caught.value) == f"Cannot restore from {path}: it does not say what machine it is of"
    with pytest.raises(OptionInvalid) as option:
        restored(str(path), parse("-m", "32"))
    assert str(option.value) == f"-m: '32' is not possible with restore: the machine is the one in {path}; leave it out"


async def test_the_bar_is_there_while_it_loads_and_gone_then(tmp_path: Path) -> None:
    await migrated(tmp_path)
    shown = io.StringIO()
    recipe = restored(str(tmp_path / "saved"), parse("-qmp", f"unix:{tmp_path}/mine"))
    async with begun(recipe, tmp_path / "mine") as running:
        with trio.fail_after(HANGS):
            await Loading(Bar(shown, terminal=True)).watch(running.host)
    screen = Screen(80)
    screen.feed(shown.getvalue())
    assert screen.rows == []


async def test_the_bar_shows_what_has_come_before_the_guest_runs_and_after_it() -> None:
    progress = MigrationProgress("target", lambda status: None, lambda: 0.0)
    progress.begin()
    state: Any = SimpleNamespace(progress=progress, absent=None)
    tree = SimpleNamespace(view=lambda kind: state)

    loading, beside_others = Loading(Bar(None)), Loading(Bar(None), alone=False)

    def shown(*, alone: bool = True) -> Figures | None:
        return (loading if alone else beside_others)._figures(cast("Any", tree), MigrationState)

    assert shown() == Figures(word="loading", left=0)
    stats = MigrationRamStats(total=40, remaining=30, transferred=10)
    progress.follow_ram(lambda: stats, beyond=True)
    progress.advance(MigrationStatus.ACTIVE)
    assert shown() == Figures(word="loading", done=10, total=40, left=30, moved=10)
    progress.advance(MigrationStatus.COMPLETED)
    assert shown() is None
    state.absent = SimpleNamespace(over=trio.Event())
    assert shown() == Figures(word="fetching", done=10, total=40, left=30, moved=10)
    assert shown(alone=False) is None
    # It goes on somewhere else, or waits to do so, before all of it is here.
    state.progress = MigrationProgress("source", lambda status: None, lambda: 0.0)
    state.progress.begin()
    assert shown() == Figures(word="fetching", done=10, total=40, left=30, moved=10)
    state.absent.over.set()
    assert shown() is None


async def test_who_has_the_terminal_has_it_alone_once_the_guest_runs(tmp_path: Path) -> None:
    await migrated(tmp_path, mapped=True)
    for options, speaks in (((), False), (("-qmp", "stdio"), True), (("-chardev", "stdio,id=c"), True)):
        assert _speaks(restored(str(tmp_path / "saved"), parse(*options))) is speaks


def test_the_command_does_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vmm"]
    trio.run(lambda: migrated(tmp_path, serial=True))
    serial = tmp_path / "ser"
    count = len(serial.read_bytes().splitlines())
    process = subprocess.Popen([*command, "restore", str(tmp_path / "saved")], stderr=subprocess.PIPE)
    assert process.stderr is not None
    try:
        grown(serial, count + 3)
        process.terminate()
        assert process.stderr.read() == b""
        assert process.wait(HANGS) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    assert (tmp_path / "saved").exists()
