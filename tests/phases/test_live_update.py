"""A guest goes from one process to the next, on the real KVM."""

from __future__ import annotations

import json
import os
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from tests.phases.update_command import end_orphan, update
from tests.phases.update_kit import (
    GUEST,
    Bench,
    Ram,
    answering_pid,
    begin_update,
    channels,
    descriptors_of,
    due,
    holds,
    hung_up,
    move,
    open_bench,
    outcome,
    ready,
    settled,
    told,
)
from vmm import host_sockets
from vmm.qmp_client import CommandFailed, MonitorGone

if TYPE_CHECKING:
    from pathlib import Path

    from vmm.qmp_client import QmpClient

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]


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
