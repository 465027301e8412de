"""A guest goes from one process to the next, on the real KVM."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
from contextlib import asynccontextmanager, closing, suppress
from typing import TYPE_CHECKING, Any, Final, final

import pytest
import trio
import trio.testing

from tests.phases.update_kit import (
    GUEST,
    PROGRAM,
    Bench,
    Console,
    Process,
    Ram,
    answering_pid,
    begin_update,
    channels,
    descriptors_of,
    due,
    holds,
    hung_up,
    open_bench,
    outcome,
    ready,
    settled,
)
from vmm import cli_successor, cli_update, host_sockets
from vmm.errors import VmmError, leaves
from vmm.qmp_client import CommandFailed, MonitorGone

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from vmm.qmp_client import QmpClient

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

STAGES: Final = {"stop", "quiesce", "save", "send", "load", "answer", "resume", "total"}


async def move(bench: Bench, source: Process, *, complaints: int = 0) -> Process:
    """Hand the machine over to a new process, and end the old one, of so many complaints, as QEMU's clients do."""
    destination = bench.destination()
    await bench.listening(destination)
    async with bench.session(bench.qmp) as client:
        assert client.peer_pid == source.pid
        await begin_update(client, bench.channels(destination))
        info = await outcome(client)
        assert info["status"] == "completed", info
        assert set(info["x-pause"]) == STAGES
        assert (await client.execute("query-status")) == {"running": False, "status": "postmigrate"}
        await client.send("quit")
        await hung_up(client)
    assert await source.ended() == 0
    assert len(source.said()) == complaints
    return destination


async def test_a_guest_is_updated_three_times_in_a_row_and_misses_nothing() -> None:
    async with open_bench() as bench:
        console = bench.console()
        process = bench.machine(console)
        await console.beats(3)
        with closing(Ram(process.pid)) as ram:
            ram.require_intact()
            for _ in range(3):
                process = await move(bench, process)
                await console.new_beats(3)
                assert ram.require_intact().repeats == 0
                assert await answering_pid(bench.qmp) == process.pid
        assert process.said() == []


async def test_each_successor_holds_what_its_predecessor_held_and_nothing_of_the_way_it_came() -> None:
    async with open_bench() as bench:
        console = bench.console()
        process = bench.machine(console)
        await console.beats(1)
        pid = process.pid
        held: list[str] = []
        try:
            for _ in range(3):
                pid = json.loads((await update(bench, "--json")).stdout)["new-pid"]
                held = held or await settled(pid)
                await holds(pid, held)
        finally:
            if pid != process.pid:
                await trio.to_thread.run_sync(end_orphan, pid)


async def test_a_guest_on_the_tsc_deadline_timer_does_not_lose_its_deadline() -> None:
    async with open_bench() as bench:
        console = bench.console("deadline")
        guest = ("-kernel", "builtin:deadline", "-append", "hz=200", "-m", "16")
        process = bench.machine(console, guest=guest)
        await console.beats(3)
        with closing(Ram(process.pid)) as ram:
            for _ in range(3):
                process = await move(bench, process)
                await console.new_beats(5)
                ram.require_intact()


async def test_a_machine_with_two_vcpus_is_updated() -> None:
    async with open_bench() as bench:
        console = bench.console()
        process = bench.machine(console, "-smp", "2")
        await console.beats(2)
        with closing(Ram(process.pid)) as ram:
            process = await move(bench, process)
            await console.new_beats(3)
            ram.require_intact()
        async with bench.session(bench.qmp) as client:
            assert len(await client.execute("query-cpus-fast")) == 2


async def test_a_machine_that_is_stopped_stays_stopped_until_it_is_continued() -> None:
    async with open_bench() as bench:
        console = bench.console()
        process = bench.machine(console)
        await console.beats(2)
        async with bench.session(bench.qmp) as client:
            await client.execute("stop")
        with closing(Ram(process.pid)) as ram:
            before = ram.look().ticks
            process = await move(bench, process)
            async with bench.session(bench.qmp) as client:
                assert (await client.execute("query-status")) == {"running": False, "status": "paused"}
                (cpu,) = await client.execute("query-cpus-fast")
                assert cpu["thread-id"] == 0
                assert ram.look().ticks == before
                await client.execute("cont")
                await console.new_beats(3)
                ram.require_intact()


async def test_a_machine_that_has_not_been_started_yet_starts_in_its_successor() -> None:
    async with open_bench() as bench:
        console = bench.console()
        process = bench.machine(console, "-S")
        async with bench.session(bench.qmp) as client:
            await ready(client)
        await move(bench, process)
        async with bench.session(bench.qmp) as client:
            assert (await client.execute("query-status")) == {"running": False, "status": "prelaunch"}
            await client.execute("cont")
            await console.beats(3)


async def test_a_guest_that_has_failed_stays_so_and_says_why_in_its_successor(tmp_path: Path) -> None:
    image = tmp_path / "guest.bin"
    image.write_bytes(b"\x0f\x01\x1e\x00\x01\x0f\x0b".ljust(1024, b"\0"))  # lidt [0x100], of no entries; ud2
    async with open_bench() as bench:
        process = bench.start("-kernel", f"flat:{image}", "-m", "16", "-serial", "null", qmp=bench.qmp)
        async with bench.session(bench.qmp) as client, due("the failure"):
            while (await client.execute("query-status"))["status"] in ("running", "prelaunch", "inmigrate"):
                await client.wait_event(lambda event: True)
            before = await client.execute("query-status")
        assert before["running"] is False
        assert before["status"] in ("guest-panicked", "internal-error")
        assert before["x-reason"].startswith("vCPU 0: ")
        await move(bench, process, complaints=1)
        async with bench.session(bench.qmp) as client:
            assert (await client.execute("query-status")) == before
            with pytest.raises(CommandFailed, match="system_reset first"):
                await client.execute("cont")
            await client.execute("system_reset")
            assert (await client.execute("query-status"))["status"] == "paused"


async def test_commands_that_run_and_reset_the_guest_never_cross_the_pause() -> None:
    """They come as fast as they are answered, before, in and after it; the guest is in one process, and whole."""
    async with open_bench() as bench:
        console = bench.console()
        process = bench.machine(console)
        await console.beats(1)
        for _ in range(3):
            destination = bench.destination()
            await bench.listening(destination)
            async with (
                bench.session(bench.qmp) as client,
                bench.session(bench.qmp) as hammer,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(run_and_reset, hammer)
                await begin_update(client, bench.channels(destination))
                assert (await outcome(client))["status"] == "completed"
                (cpu,) = await client.execute("query-cpus-fast")
                assert cpu["thread-id"] == 0
                await client.send("quit")
            assert await process.ended() == 0
            process = destination
        assert process.said() == []
        async with bench.session(bench.qmp) as client:
            await client.execute("system_reset")
            await client.execute("cont")
        await console.from_a_start(5)


async def run_and_reset(client: QmpClient) -> None:
    """Send what starts, stops and resets a guest, until the monitor is closed."""
    with suppress(MonitorGone):
        while True:
            for command in ("stop", "cont", "system_reset"):
                with suppress(CommandFailed):
                    await client.execute(command)


async def test_a_reset_that_the_guest_asked_for_before_the_pause_is_carried_out_after_it(tmp_path: Path) -> None:
    image = tmp_path / "guest.bin"
    image.write_bytes(bytes.fromhex("b0fe e664 f4 ebfd").ljust(1024, b"\0"))  # out 0x64, 0xFE; hlt, for ever
    async with open_bench() as bench:
        process = bench.start("-kernel", f"flat:{image}", "-m", "16", "-serial", "null", qmp=bench.qmp)
        for _ in range(3):
            await resets(bench)
            process = await move(bench, process)
        await resets(bench)


async def resets(bench: Bench) -> None:
    """Wait for some resets: a guest whose wish is lost sleeps for ever."""
    async with bench.session(bench.qmp) as client, due("resets"):
        for _ in range(5):
            await client.wait_event(lambda event: event["event"] == "RESET")


async def test_both_sides_tell_what_happens() -> None:
    async with open_bench() as bench:
        console = bench.console()
        bench.machine(console)
        await console.beats(1)
        destination = bench.destination()
        await bench.listening(destination)
        async with bench.session(bench.qmp) as old, bench.session(destination.qmp) as new:
            await new.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
            await begin_update(old, bench.channels(destination))
            await outcome(old)
            async with due("RESUME"):
                seen = [await new.read()]
                while seen[-1]["event"] != "RESUME":
                    seen.append(await new.read())
            await old.execute("query-status")
            assert told(seen) == ["MIGRATION active", "RESUME"]
            # Once the source has said its last word.
            async with due("the end of the update"):
                seen = [await new.read()]
                while seen[-1]["event"] != "MIGRATION":
                    seen.append(await new.read())
            assert told(seen) == ["MIGRATION completed"]
            assert (await new.execute("query-migrate"))["status"] == "completed"


def told(events: Any) -> list[str]:
    names = ("STOP", "RESUME", "MIGRATION")
    return [
        f"{event['event']} {event.get('data', {}).get('status', '')}".strip()
        for event in events
        if event["event"] in names
    ]


async def test_the_old_process_answers_and_can_do_nothing_more_to_the_guest() -> None:
    async with open_bench() as bench:
        console = bench.console()
        source = bench.machine(console)
        await console.beats(1)
        destination = bench.destination()
        await bench.listening(destination)
        async with bench.session(bench.qmp) as old:
            await begin_update(old, bench.channels(destination))
            info = await outcome(old)
            assert info["status"] == "completed"
            (cpu,) = await old.execute("query-cpus-fast")
            assert cpu["thread-id"] == 0
            for command in ("cont", "stop", "system_reset"):
                with pytest.raises(CommandFailed, match="needs may-run-vcpus"):
                    await old.execute(command)
            with pytest.raises(CommandFailed, match="needs may-start-migration"):
                await old.execute("migrate", channels=channels("/nowhere", "/nowhere"))
            held = descriptors_of(source.pid)
            assert "/memfd:ram (deleted)" in held  # it ends with the machine, and is not written to any more
            await console.new_beats(2)
            await old.send("quit")
            await hung_up(old)
        assert await source.ended() == 0
        assert bench.is_there(bench.qmp)
        await console.new_beats(2)
        assert await answering_pid(bench.qmp) == destination.pid


# --- serial ports of every kind ---------------------------------------------------------------------------------


def require_consecutive(text: str, at_least: int) -> None:
    """Fail if a line is missing, repeated or torn; the last one may be under way."""
    *lines, _ = text.split("\r\n")
    assert lines[0] == "heartbeat: started"
    assert lines[1:] == [f"heartbeat {n} ok" for n in range(1, len(lines))]
    assert len(lines) >= at_least


async def test_a_serial_port_in_a_file_has_no_line_lost_or_repeated() -> None:
    async with open_bench() as bench:
        path = bench.folder / "serial.txt"
        process = bench.start(*GUEST, "-serial", f"file:{path}", qmp=bench.qmp)
        for count in (5, 10, 15):
            await lines_in(path, count)
            if count < 15:
                process = await move(bench, process)
        require_consecutive(content(path), 15)


def content(path: Path) -> str:
    return path.read_bytes().decode() if path.exists() else ""


async def lines_in(path: Path, count: int) -> None:
    async with due(f"{count} lines"):
        while content(path).count("\r\n") < count:  # noqa: ASYNC110 - a file does not tell when it grows
            await trio.sleep(0.01)


async def test_a_serial_port_on_a_pty_has_no_line_lost_or_repeated() -> None:
    async with open_bench() as bench:
        process = bench.start(*GUEST, "-serial", "pty", "-S", qmp=bench.qmp)
        async with bench.session(bench.qmp) as client:
            await ready(client)
            (pty,) = [
                entry["filename"].removeprefix("pty:")
                for entry in await client.execute("query-chardev")
                if entry["label"] == "serial0"
            ]
            slave = os.open(pty, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
            await client.execute("cont")
        text = ""
        try:
            for count in (5, 10, 15):
                async with due(f"{count} lines"):
                    while text.count("\r\n") < count:
                        await trio.lowlevel.wait_readable(slave)
                        text += os.read(slave, 4096).decode()
                if count < 15:
                    process = await move(bench, process)
        finally:
            trio.lowlevel.notify_closing(slave)
            os.close(slave)
        require_consecutive(text, 15)


async def test_a_client_of_a_serial_socket_stays_connected_and_the_next_one_reaches_the_new_process() -> None:
    async with open_bench() as bench:
        path = f"{bench.folder}/serial"
        process = bench.start(*GUEST, "-serial", f"unix:{path},server=on", "-S", qmp=bench.qmp)
        async with bench.session(bench.qmp) as client:
            await ready(client)
            with host_sockets.connect_unix(path) as console:
                await client.execute("cont")
                text = ""
                for count in (5, 10, 15):
                    async with due(f"{count} lines"):
                        while text.count("\r\n") < count:
                            await trio.lowlevel.wait_readable(console)
                            text += console.recv(4096).decode()
                    if count < 15:
                        process = await move(bench, process)
                require_consecutive(text, 15)
                trio.lowlevel.notify_closing(console)
        with host_sockets.connect_unix(path) as console:
            async with due("a line"):
                await trio.lowlevel.wait_readable(console)
            assert console.recv(4096)
            trio.lowlevel.notify_closing(console)
        assert await answering_pid(bench.qmp) == process.pid


# --- `trio-vmm update` ------------------------------------------------------------------------------------------


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
