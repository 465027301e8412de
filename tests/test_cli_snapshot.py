"""`trio-vmm snapshot`: snapshots of a running machine, by its monitor."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio

import vmm
from tests.phases.copy_kit import HANGS, commands, goes_on, look, ticked
from tests.phases.machine import connected, monitor
from tests.phases.snapshot_kit import directory
from tests.terminal import Screen
from vmm.cli import main
from vmm.cli_progress import Bar
from vmm.cli_snapshot import SnapshotFailed, SnapshotUnclear, Wish, snapshot, table
from vmm.cli_watch import Interrupted, Interruption
from vmm.phases import saving
from vmm.phases.loading import read_state
from vmm.qmp_client import QmpClient

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from pathlib import Path

    from vmm.embedding import EmbeddedMachine

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]


@asynccontextmanager
async def running(folder: Path, *names: str) -> AsyncGenerator[EmbeddedMachine, None]:
    """Run a machine with a monitor at `folder / "qmp"` and directories of snapshots in `folder`."""
    made = [{"execute": step.execute, "arguments": step.arguments} for step in monitor(folder / "qmp")]
    for name in names:
        (folder / name).mkdir()
        made.append(directory(folder / name, name))
    async with vmm.machine(made + commands()) as machine:
        await ticked(machine, 5)
        yield machine


async def do(
    folder: Path, what: str, tag: str, where: str | None = None, interruption: Interruption | None = None
) -> tuple[str, str]:
    """Do it; return what is said, and what was shown on a terminal."""
    shown = io.StringIO()
    with trio.fail_after(HANGS), Bar(shown, terminal=True) as bar:
        said = await snapshot(str(folder / "qmp"), Wish(what, tag, where), interruption or Interruption(), bar)
    return said, shown.getvalue()


def hanging(began: trio.Event) -> Callable[[Any], Awaitable[None]]:
    """Return a save that only sets `began`, and is not over before it is cancelled."""

    async def hang(_: Any) -> None:
        began.set()
        await trio.sleep_forever()

    return hang


async def jobs(machine: EmbeddedMachine) -> list[Any]:
    return list(await machine.execute("query-jobs"))


async def test_a_snapshot_is_made_and_loaded_and_removed(tmp_path: Path) -> None:
    async with running(tmp_path, "s0", "s1") as machine:
        said, shown = await do(tmp_path, "save", "then", "s0")
        assert said.startswith("saved: snapshot then, ")
        assert "; the guest's pause: " in said
        screen = Screen(80)
        screen.feed(shown)
        assert screen.rows == []
        before = look(machine).ticks
        await ticked(machine, before + 20)
        # The others need not say where it is.
        assert (await do(tmp_path, "load", "then"))[0] == "loaded: snapshot then"
        assert look(machine).ticks < before + 20
        await goes_on(machine)
        await do(tmp_path, "save", "again")
        assert (await do(tmp_path, "delete", "then"))[0] == "deleted: snapshot then"
        assert os.listdir(tmp_path / "s0") == ["again.tvmm"]
        assert await jobs(machine) == []
        await goes_on(machine)


async def test_where_it_is_must_be_said_if_that_cannot_be_known(tmp_path: Path) -> None:
    async def fails(what: str, tag: str, where: str | None = None) -> str:
        with pytest.raises(SnapshotFailed) as caught:
            await do(tmp_path, what, tag, where)
        return str(caught.value)

    async with running(tmp_path, "s0", "s1") as machine:
        say = "; say by --directory which object of type snapshot-directory is meant"
        # What was typed, or a machine says, is nothing that a terminal obeys.
        assert await fails("delete", "\x1b[31m\n") == (
            f"Snapshot \\x1b[31m\\n was not deleted: no directory has it{say}"
        )
        assert await fails("load", "") == f"Snapshot '' was not loaded: no directory has it{say}"
        assert await fails("save", "", "\x1b[31m") == (
            "Snapshot '' was not saved: Snapshot directory '\\x1b[31m' does not exist; there are: s0, s1"
        )
        assert await fails("save", "a") == (
            "Snapshot a was not saved: snapshot-save: vmstate must name the object of type snapshot-directory; "
            "there are: s0, s1; say by --directory which one is meant"
        )
        for name in ("s0", "s1"):
            await do(tmp_path, "save", "a", name)
        assert await fails("save", "b") == f"Snapshot b was not saved: s0, s1 have snapshots{say}"
        assert await fails("load", "a") == f"Snapshot a was not loaded: it is in s0, s1{say}"
        assert await fails("delete", "b") == f"Snapshot b was not deleted: no directory has it{say}"
        assert (
            await fails("save", "a", "s0")
            == "Snapshot a was not saved: Snapshot 'a' exists already; choose another name"
        )
        assert await fails("load", "a", "s2") == (
            "Snapshot a was not loaded: Snapshot directory 's2' does not exist; there are: s0, s1"
        )
        (tmp_path / "s0" / "bad.tvmm").write_bytes(b"x" * 100)
        assert (await fails("load", "bad")).startswith("Snapshot bad was not loaded: State stream: it begins with ")
        await goes_on(machine)
        assert await jobs(machine) == []


async def test_the_only_directory_need_not_be_said(tmp_path: Path) -> None:
    async with running(tmp_path, "s0"):
        for tag in ("a", "b"):
            assert (await do(tmp_path, "save", tag))[0].startswith(f"saved: snapshot {tag}, ")
        assert sorted(os.listdir(tmp_path / "s0")) == ["a.tvmm", "b.tvmm"]
    async with running(tmp_path, "s1") as machine:
        with pytest.raises(SnapshotFailed) as caught:
            await do(tmp_path, "save", "")
        assert str(caught.value).startswith("Snapshot '' was not saved: tag: '' is not a tag: ")
        assert "--directory" not in str(caught.value)
        await goes_on(machine)


async def test_an_interrupt_cancels_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving._Save, "as_it_can_be", hanging(trio.Event()))
    async with running(tmp_path, "s0") as machine:
        interruption = Interruption()
        interruption.comes()
        with pytest.raises(Interrupted) as caught:
            await do(tmp_path, "save", "then", "s0", interruption)
        assert str(caught.value) == ("The snapshot was interrupted: The snapshot was cancelled; the guest goes on")
        assert os.listdir(tmp_path / "s0") == []
        assert await jobs(machine) == []
        await goes_on(machine)


async def test_a_load_goes_on_and_an_interrupt_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()

    async def wait_until_told(*arguments: Any) -> Any:
        while "cannot be called off" not in shown.getvalue():  # noqa: ASYNC110 - a terminal does not tell
            await trio.sleep(0.005)
        return await read_state(*arguments)

    async with running(tmp_path, "s0") as machine:
        await do(tmp_path, "save", "then", "s0")
        monkeypatch.setattr("vmm.phases.restoring.read_state", wait_until_told)
        interruption = Interruption()
        interruption.comes()
        with trio.fail_after(HANGS), Bar(shown, terminal=True) as bar:
            said = await snapshot(str(tmp_path / "qmp"), Wish("load", "then"), interruption, bar)
        assert said == "loaded: snapshot then"
        screen = Screen(200)
        screen.feed(shown.getvalue())
        (row,) = screen.rows
        assert row.startswith("trio-vmm: it cannot be called off: job-cancel of 'trio-vmm-")
        await goes_on(machine)


async def test_a_job_that_another_session_has_dismissed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = QmpClient.execute

    async def nothing(self: QmpClient, command: str, **arguments: Any) -> Any:
        return [] if command == "query-jobs" else await execute(self, command, **arguments)

    async with running(tmp_path, "s0"):
        monkeypatch.setattr(QmpClient, "execute", nothing)
        with pytest.raises(SnapshotFailed, match=r"^Snapshot then was not saved: its job was dismissed over another"):
            await do(tmp_path, "save", "then", "s0")


async def test_a_machine_that_ends_meanwhile_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = trio.Event()
    monkeypatch.setattr(saving._Save, "as_it_can_be", hanging(began))

    async def fails() -> None:
        with pytest.raises(SnapshotUnclear) as caught:
            await do(tmp_path, "save", "then", "s0")
        assert str(caught.value) == (
            "The machine ended while snapshot then was being saved; a snapshot is whole or not there"
        )

    async with trio.open_nursery() as nursery, running(tmp_path, "s0"), connected(tmp_path / "qmp") as client:
        nursery.start_soon(fails)
        await began.wait()
        await client.execute("quit")
    assert os.listdir(tmp_path / "s0") == []


def test_the_list_has_a_line_for_each_and_nothing_that_a_terminal_obeys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    found: list[dict[str, Any]] = [
        {"tag": "a", "vmstate": "s0", "size": 3 << 20, "date-sec": 0, "machine": "vm\x9b31m"},
        {"tag": "longer", "vmstate": "snap1", "size": 0, "date-sec": 86400, "fault": "it is damaged"},
    ]
    assert list(table(found)) == [
        "a       s0      3.0 MiB  1970-01-01 00:00:00  vm\\x9b31m",
        "longer  snap1       0 B  1970-01-02 00:00:00  it is damaged",
    ]
    assert list(table([])) == []


async def test_the_commands_do_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    qmp = str(tmp_path / "qmp")
    async with running(tmp_path, "s0") as machine:
        done = await trio.run_process(
            [sys.executable, "-m", "vmm", "snapshot", "save", "--qmp", qmp, "--directory", "s0", "then"],
            capture_stdout=True, capture_stderr=True,
        )  # fmt: skip
        assert done.stdout.startswith(b"saved: snapshot then, ")
        assert done.stderr == b""
        for options in ((), ("--json",)):
            assert await trio.to_thread.run_sync(main, ["snapshot", "list", "--qmp", qmp, *options]) == 0
        line, *rest = capsys.readouterr().out.splitlines()
        assert line.startswith("then  s0  ")
        (found,) = json.loads("\n".join(rest))
        assert found["tag"] == "then"
        await goes_on(machine)


async def test_ctrl_c_ends_the_command_with_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = trio.Event()
    monkeypatch.setattr(saving._Save, "as_it_can_be", hanging(began))
    command = [sys.executable, "-m", "vmm", "snapshot", "save", "--qmp", str(tmp_path / "qmp"), "--directory", "s0"]
    async with running(tmp_path, "s0") as machine:
        process = await trio.lowlevel.open_process([*command, "then"], stderr=subprocess.PIPE)
        try:
            with trio.fail_after(HANGS):
                await began.wait()
                process.send_signal(signal.SIGINT)
                assert await process.wait() == 130
        finally:
            process.kill()
            await process.wait()
            assert process.stderr is not None
            said = await process.stderr.receive_some()
            await process.stderr.aclose()
        assert said == b"trio-vmm: The snapshot was interrupted: The snapshot was cancelled; the guest goes on\n"
        await goes_on(machine)
