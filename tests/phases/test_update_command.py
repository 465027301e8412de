"""`trio-vmm update` as its user has it, on the real KVM."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from contextlib import asynccontextmanager, closing, suppress
from typing import TYPE_CHECKING, Any, Final, final

import pytest
import trio
import trio.testing

from tests.phases.update_command import end_orphan, machine, update
from tests.phases.update_kit import (
    GUEST,
    PROGRAM,
    STAGES,
    Bench,
    Console,
    Process,
    Ram,
    answering_pid,
    due,
    hung_up,
    open_bench,
    ready,
    told,
)
from vmm import cli_successor, cli_update
from vmm.errors import VmmError, leaves
from vmm.qmp_client import MonitorGone

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]


async def test_the_update_command_can_ask_first_and_change_nothing() -> None:
    async with machine() as (bench, _):
        done = await update(bench, "--check")
        assert (done.returncode, done.stderr) == (0, "")
        assert re.fullmatch(r"\d+ items are identical; the update would go ahead\n", done.stdout)


async def test_the_update_command_says_what_a_successor_would_have_otherwise() -> None:
    async with machine() as (bench, _):
        recipe, binary = bench.folder / "recipe", bench.folder / "successor"
        recipe.write_text('{"execute": "machine-set", "arguments": {"append": "quiet", "name": "b"}}')
        binary.write_text(f'#!/bin/sh\nexec {" ".join(PROGRAM)} "$@" --recipe {recipe}\n')
        binary.chmod(0o700)
        done = await update(bench, "--check", "--binary", str(binary))
        assert (done.returncode, done.stderr) == (1, "")
        *items, verdict = done.stdout.splitlines()
        assert items == [
            'guest-visible  machine-set.append: "region=64K pages=1" -> "quiet"',
            'host-only      machine-set.name: null -> "b"',
        ]
        assert "machine-set.append ('region=64K pages=1' there, 'quiet' here); allow each by its name" in verdict
        done = await update(bench, "--check", "--json", "--binary", str(binary))
        assert (done.returncode, json.loads(done.stdout)["admitted"]) == (1, False)


async def test_the_update_command_moves_a_machine_reports_and_leaves_no_pipe_open() -> None:
    async with open_bench() as bench:
        console = bench.console()
        old = bench.machine(console)
        await console.beats(2)
        with closing(Ram(old.pid)) as ram:
            async with bench.session(bench.qmp) as client:
                # What somebody has set for other updates is not for this one.
                await client.execute("migrate-set-parameters", x_keep_source=True)
                done = await update(bench, "--json")
                # Whoever was connected stays so, sees what happens, and nothing of how it came about.
                assert (await client.execute("query-status"))["running"]
                assert client.peer_pid != old.pid
                assert told(client.events) == ["STOP", "RESUME"]
            assert (done.returncode, done.stderr) == (0, "")
            report = json.loads(done.stdout)
            assert (report["old-pid"], set(report["pause-ms"])) == (old.pid, STAGES)
            new = report["new-pid"]
            try:
                assert await old.ended() == 0
                assert await answering_pid(bench.qmp) == new
                await console.new_beats(3)
                ram.require_intact()
                # What it has to say goes where the old one's words went.
                assert os.stat(f"/proc/{new}/fd/2").st_ino == old.log.stat().st_ino
                assert os.readlink(f"/proc/{new}/fd/0") == os.readlink(f"/proc/{new}/fd/1") == "/dev/null"
            finally:
                await trio.to_thread.run_sync(end_orphan, new)
        assert not bench.is_there(bench.qmp)


async def test_a_program_that_knows_nothing_of_clients_that_go_along_is_updated_to_without_them() -> None:
    async with open_bench() as bench:
        console = bench.console()
        old = bench.machine(console)
        await console.beats(1)
        older = bench.folder / "older.py"
        older.write_text(
            "import sys\n"
            "from vmm.migration import parameter_table as table\n"
            "table.PARAMETERS = tuple(one for one in table.PARAMETERS if one.name != 'migrate-sessions')\n"
            "from vmm.cli import main\n"
            "sys.exit(main())\n"
        )
        binary = bench.folder / "older"
        binary.write_text(f'#!/bin/sh\nexec {PROGRAM[0]} {older} "$@"\n')
        binary.chmod(0o700)
        async with bench.session(bench.qmp) as client:
            done = await update(bench, "--json", "--binary", str(binary))
            assert (done.returncode, done.stderr) == (0, "")
            await hung_up(client)
        report = json.loads(done.stdout)
        assert set(report["pause-ms"]) == STAGES
        try:
            assert await old.ended() == 0
            assert await answering_pid(bench.qmp) == report["new-pid"]
            await console.new_beats(2)
        finally:
            await trio.to_thread.run_sync(end_orphan, report["new-pid"])


async def test_the_report_for_people_names_the_processes_and_the_stages() -> None:
    async with open_bench() as bench:
        console = bench.console()
        old = bench.machine(console)
        await console.beats(1)
        done = await update(bench)
        new = await answering_pid(bench.qmp)
        try:
            first, second = done.stdout.splitlines()
            assert first == f"updated: process {old.pid} -> {new}"
            assert second.startswith("the guest's pause: ")
            assert all(f"{stage} " in second for stage in STAGES - {"total"})
        finally:
            await trio.to_thread.run_sync(end_orphan, new)


FAILED: Final = "trio-vmm: The live update failed, and the machine goes on in the old process: "


async def test_a_binary_that_is_none_is_refused() -> None:
    async with machine() as (bench, _):
        done = await update(bench, "--binary", "/nowhere/trio-vmm")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "trio-vmm: --binary: '/nowhere/trio-vmm' is not the path of an executable trio-vmm\n"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 3", "ended with exit status 3 before it was ready"),
        ("kill -9 $$", "was killed by signal 9 before it was ready"),
        ("kill -SEGV $$", "was killed by signal 11 before it was ready"),
        ("exec python3 -c 'import no_such_module' 2>/dev/null", "ended with exit status 1 before it was ready"),
        ("python3 -c 'import os; os.write('$3', b\"hello\\n\")'", None),
    ],
)
async def test_a_successor_that_is_no_vmm_is_told_by_how_it_ended(script: str, reason: str | None) -> None:
    async with machine() as (bench, _):
        binary = bench.folder / "successor"
        # Its arguments are: run -qmp fd:N ...
        binary.write_text(f"#!/bin/sh\nset -- $1 $2 ${{3#fd:}}\n{script}\n")
        binary.chmod(0o755)
        done = await update(bench, "--binary", str(binary))
        assert (done.returncode, done.stdout) == (1, "")
        if reason is not None:
            assert done.stderr == f"{FAILED}the successor, {binary}, {reason}\n"
        else:
            assert done.stderr.startswith(f"{FAILED}the successor, {binary}, is no trio-vmm: ")


async def test_a_binary_that_cannot_be_executed_is_told() -> None:
    async with machine() as (bench, _):
        binary = bench.folder / "successor"
        binary.write_text("#!/nowhere/interpreter\n")
        done = await update(bench, "--binary", str(binary))
        assert done.stderr == f"trio-vmm: --binary: '{binary}' is not the path of an executable trio-vmm\n"
        binary.chmod(0o755)
        for content, reason in (
            (b"#!/nowhere/interpreter\n", "No such file or directory"),
            (b"\x7fELF, and nothing else", "Exec format error"),
        ):
            binary.write_bytes(content)
            done = await update(bench, "--binary", str(binary))
            assert (done.returncode, done.stdout) == (1, "")
            assert done.stderr == f"trio-vmm: Cannot start {binary}: {reason}\n"


async def test_a_machine_that_is_not_there_cannot_be_updated() -> None:
    async with open_bench() as bench:
        nowhere = f"{bench.folder}/nowhere"
        done = await update(bench, qmp=nowhere)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            f"trio-vmm: Cannot connect to {nowhere}: No such file or directory; "
            f"is a machine running with -qmp unix:{nowhere}?\n"
        )


async def test_a_machine_without_a_guest_cannot_be_updated() -> None:
    async with open_bench() as bench:
        process = bench.start("--precreate", qmp=bench.qmp)
        async with bench.session(bench.qmp):
            pass
        done = await update(bench)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            f"{FAILED}the machine at {bench.qmp} has no guest yet; its phase is no-machine, and must be machine-ready\n"
        )
        assert process.alive


async def test_of_two_updates_at_once_one_succeeds_and_the_other_says_what_stood_in_its_way() -> None:
    async with open_bench() as bench:
        console = bench.console()
        bench.machine(console)
        await console.beats(1)
        done: list[subprocess.CompletedProcess[str]] = []

        async def one() -> None:
            done.append(await update(bench, "--json"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            nursery.start_soon(one)
        new = await answering_pid(bench.qmp)
        try:
            await console.new_beats(3)
            # One after the other is right as well: then the second moved what the first had moved.
            pids = [json.loads(found.stdout)["new-pid"] for found in done if found.returncode == 0]
            assert new in pids
            for found in done:
                if found.returncode:
                    assert found.returncode == 1
                    (line,) = found.stderr.splitlines()
                    assert line.startswith("trio-vmm: ")
        finally:
            await trio.to_thread.run_sync(end_orphan, new)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
async def test_an_update_that_is_interrupted_leaves_the_machine_where_it_was(how: signal.Signals) -> None:
    async with machine() as (bench, _):
        binary = bench.folder / "successor"
        binary.write_text("#!/bin/sh\nexec sleep 1000\n")
        binary.chmod(0o755)
        command = [*PROGRAM, "update", "--qmp", bench.qmp, "--binary", str(binary)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as updating:  # noqa: ASYNC220
            async with due("the successor"):
                while not (children := children_of(updating.pid)):  # noqa: ASYNC110
                    await trio.sleep(0.01)
            updating.send_signal(how)
            out, err = await trio.to_thread.run_sync(updating.communicate)
        assert (updating.returncode, out) == (1, b"")
        assert err.decode() == (
            "trio-vmm: The live update was interrupted; query-migrate on the machine's monitor says how far it came\n"
        )
        assert not any(bench.is_there(f"/proc/{child}") for child in children)


def children_of(pid: int) -> list[int]:
    """Return the children of a process that sleep (Python has others for a moment while it starts)."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        children = [int(child) for child in file.read().split()]
    return [child for child in children if command_of(child).startswith("sleep")]


def command_of(pid: int) -> str:
    with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/cmdline") as file:
        return file.read()
    return ""


@final
class Interrupted:
    """An update whose old process stopped itself before it could say that it has begun."""

    def __init__(self, bench: Bench, source: Process, console: Console) -> None:
        self.bench = bench
        self.source = source
        self.console = console
        self.scope = trio.CancelScope()
        self.successors: list[subprocess.Popen[bytes]] = []
        self.failure: VmmError | None = None
        self.over = trio.Event()

    async def run(self, *extra: str) -> None:
        """Update; note the outcome."""
        with self.scope:
            try:
                await cli_update.live_update(self.bench.qmp, PROGRAM, extra)
            except* VmmError as group:
                self.failure = next(error for error in leaves(group) if isinstance(error, VmmError))
        self.over.set()

    async def ended(self) -> None:
        """Wait until the command is over."""
        async with due("the end of the update"):
            await self.over.wait()


@asynccontextmanager
async def interrupted(monkeypatch: pytest.MonkeyPatch, *extra: str) -> AsyncGenerator[Interrupted, None]:
    """Begin an update, and stop its old process before it replies to `migrate`. `extra` are for the successor."""
    start = cli_successor.start_successor
    async with open_bench() as bench:
        console = bench.console()
        source = bench.machine(console, "--x-cpr-stop-at", "source:connected")
        await console.beats(1)
        it = Interrupted(bench, source, console)

        def start_noted(*arguments: Any) -> subprocess.Popen[bytes]:
            it.successors.append(start(*arguments))
            return it.successors[-1]

        monkeypatch.setattr(cli_successor, "start_successor", start_noted)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.run, *extra)
            try:
                await source.stopped()
                yield it
            finally:
                for process in it.successors:
                    process.kill()
                    process.wait()


async def test_a_successor_is_not_killed_while_nobody_knows_whether_it_gets_the_guest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli_update, "CALLING_OFF", 0)
    async with interrupted(monkeypatch) as it:
        it.scope.cancel()
        await it.ended()
        (successor,) = it.successors
        assert successor.poll() is None
        it.source.go_on()
        await it.console.new_beats(3)


async def test_an_update_that_is_interrupted_before_it_has_begun_is_called_off_once_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with interrupted(monkeypatch, "--x-cpr-stop-at", "destination:accepted") as it:
        it.scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        it.source.go_on()
        await it.ended()
        (successor,) = it.successors
        assert successor.poll() == -signal.SIGKILL
        async with it.bench.session(it.bench.qmp) as client:
            assert (await client.execute("query-migrate"))["status"] == "cancelled"
        await it.console.new_beats(3)


async def test_an_old_process_that_ends_before_it_says_that_it_has_begun_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with interrupted(monkeypatch) as it:
        it.source.kill()
        await it.ended()
        assert str(it.failure) == (
            "The live update went wrong: the old process ended during the update, and the guest with it"
        )
        (successor,) = it.successors
        assert successor.poll() == -signal.SIGKILL


async def test_a_serial_socket_is_no_monitor() -> None:
    async with open_bench() as bench:
        path = f"{bench.folder}/serial"
        bench.start(*GUEST, "-serial", f"unix:{path},server=on", qmp=bench.qmp)
        async with bench.session(bench.qmp) as client:
            await ready(client)
        done = await update(bench, qmp=path)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"trio-vmm: What answers at {path} is no QMP monitor: it says ")


@final
class Gone:
    """A session of a process that has ended."""

    peer_pid = 7

    async def execute(self, command: str) -> None:
        await trio.lowlevel.checkpoint()
        raise MonitorGone(path="nowhere")


async def test_of_a_new_process_that_took_the_guest_and_ended_and_of_an_old_one_that_stays_it_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone: Any = Gone()
    handover = cli_update._HandOver(gone, gone, gone, [])
    with pytest.raises(cli_update.UpdateUnclear) as caught:
        await handover._tell_of_a_lost_source(MonitorGone(path="nowhere"))
    assert caught.value.reason == "the new process ended when it had taken over, and the guest with it"
    await handover.ended()  # it has, or is of another namespace
    monkeypatch.setattr(cli_update, "ENDING", 0)
    with closing(handover):
        handover._old = os.pidfd_open(os.getpid())
        with pytest.raises(cli_update.UpdateUnclear) as caught:
            await handover.ended()
    assert caught.value.reason == (
        "the guest goes on in the new process, 7, but the old one, 7, has not ended within 0 s"
    )
