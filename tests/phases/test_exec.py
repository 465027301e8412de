"""A process becomes another program under its guest: which comes back, or goes on with whoever looks after it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Any, Final, final

import attrs
import pytest
import trio

from tests.phases.machine import connected
from tests.phases.update_kit import PROGRAM, Bench, Console, Process, Ram, answering_pid, due, open_bench, outcome
from tests.phases.update_pair import pair
from vmm import host_sockets
from vmm.cli_replace import ReplaceReport, _exec, _process
from vmm.cli_successor import UpdateFailed
from vmm.cli_update import UpdateUnclear
from vmm.phases.afterwards import BecomeProgram
from vmm.qmp_client import CommandFailed, QmpClient

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

RUN: Final = [*PROGRAM, "run"]


@final
@attrs.frozen
class Machine:
    """A machine whose process is to become another program."""

    bench: Bench
    console: Console
    process: Process
    ram: Ram
    client: QmpClient
    """Asks for it, and goes along."""
    manager: socket.socket
    """Where the service manager listens."""

    def told(self) -> list[int]:
        """Return the processes that the service manager was told of as the main one since the last call."""
        pids = []
        while True:
            try:
                pids.append(int(self.manager.recv(100).removeprefix(b"MAINPID=")))
            except BlockingIOError:
                return pids

    async def guest_goes_on(self) -> None:
        """Fail unless it does, and has lost nothing."""
        await self.console.new_beats(2)
        self.ram.require_intact()

    async def begin(self, *command: str) -> None:
        """Have the process become `command`."""
        parameters = {"mode": "cpr-exec", "cpr-exec-command": list(command), "migrate-sessions": True}
        await self.client.execute("migrate", parameters=parameters)


@asynccontextmanager
async def started(*options: str) -> AsyncGenerator[Machine, None]:
    """Run a machine."""
    async with open_bench() as bench:
        console, path = bench.console(), bench.folder / "manager"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as manager:
            manager.bind(str(path))
            process = bench.machine(console, *options, notify=path)
            await console.beats(1)
            with closing(Ram(process.pid)) as ram:
                async with bench.session(bench.qmp) as client:
                    capabilities = [{"capability": "events", "state": True}]
                    await client.execute("migrate-set-capabilities", capabilities=capabilities)
                    made = Machine(bench, console, process, ram, client, manager)
                    try:
                        yield made
                    finally:
                        await ended_at_last(client)


async def gone(pid: int) -> None:
    """Wait until nothing is left of process `pid`, which is no child of the test; no zombie either."""
    async with due(f"the end of process {pid}"):
        while os.path.exists(f"/proc/{pid}"):  # noqa: ASYNC110, ASYNC240 - it does not tell
            await trio.sleep(0.01)


async def ended_at_last(client: QmpClient) -> None:
    """End whoever has the guest: a caretaker is no child of the test."""
    with trio.move_on_after(10, shield=True):
        await client.send("quit")
        try:
            while True:
                await client.read()
        except Exception:
            return


async def test_a_process_becomes_another_program_and_nobody_notices() -> None:
    async with started() as made:
        # What somebody has set for other updates is not for this one.
        await made.client.execute("migrate-set-parameters", x_keep_source=True)
        for _ in range(2):
            report = await _exec(made.bench.qmp, RUN)
            assert (report.old_pid, report.new_pid) == (made.process.pid, made.process.pid)
            assert [pause["total"] > 0 for pause in report.pauses] == [True, True]
            caretaker, itself = made.told()
            assert itself == made.process.pid != caretaker
            await gone(caretaker)
        await made.guest_goes_on()
        assert (await made.client.execute("query-status"))["running"]  # the connection is the one from before
        assert made.client.peer_pid == made.process.pid
        assert made.process.said() == []


async def test_a_program_that_cannot_be_executed_gives_the_guest_back() -> None:
    async with started() as made:
        bad = made.bench.folder / "program"
        bad.write_bytes(b"\x7fELF and nothing more")
        bad.chmod(0o755)
        with pytest.raises(UpdateFailed) as caught:
            await _exec(made.bench.qmp, [str(bad)])
        failed = f"Cannot execute {bad}: Exec format error"
        assert str(caught.value).endswith(f": {failed}")
        assert made.process.said() == [f"trio-vmm: {failed}; the guest comes back to this process"]
        info = await made.client.execute("query-migrate")
        assert (info["status"], info["error-desc"]) == ("failed", failed)
        await made.guest_goes_on()
        assert await answering_pid(made.bench.qmp) == made.process.pid


@pytest.mark.parametrize("crash", ["import sys; sys.exit(7)", "import os; os.kill(os.getpid(), 11)"])
async def test_a_program_that_dies_leaves_the_guest_with_the_caretaker(crash: str) -> None:
    async with started() as made:
        with pytest.raises(UpdateUnclear) as caught:
            await _exec(made.bench.qmp, [PROGRAM[0], "-c", crash])
        await made.client.execute("query-status")
        caretaker = made.client.peer_pid
        assert caretaker != made.process.pid
        assert str(caught.value) == (
            f"The live update went wrong: process {made.process.pid} ended, "
            f"and the guest goes on in process {caretaker}"
        )
        await made.guest_goes_on()
        await made.process.says(
            f"trio-vmm: process {made.process.pid} has ended before it took its guest back: "
            f"the guest goes on in process {caretaker}"
        )
        assert made.told()[-1] == caretaker


async def test_a_caretaker_that_dies_before_it_has_the_guest_leaves_it_where_it_is() -> None:
    async with started("--x-cpr-caretaker=--x-cpr-stop-at=destination:built") as made:
        await made.begin(*RUN)
        async with due("a caretaker"):
            while not (found := [pid for pid in _children(made.process.pid) if _is_stopped(pid)]):  # noqa: ASYNC110
                await trio.sleep(0.01)
        os.kill(found[0], signal.SIGKILL)
        info = await outcome(made.client)
        assert info["status"] == "failed"
        assert info["error-desc"] == (
            "The destination closed the channel at step 'building'; the guest stays where it was"
        )
        await gone(found[0])
        await made.guest_goes_on()
        assert made.told() == []


def _children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


def _is_stopped(pid: int) -> bool:
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "T"


async def test_a_cancelled_update_by_exec_ends_the_caretaker() -> None:
    async with started("--x-cpr-caretaker=--x-cpr-stop-at=destination:accepted") as made:
        await made.begin(*RUN)
        await made.client.execute("migrate_cancel")
        assert (await outcome(made.client))["status"] == "cancelled"
        await made.guest_goes_on()
        async with due("the end of the caretaker"):
            while _children(made.process.pid):  # noqa: ASYNC110 - it does not tell
                await trio.sleep(0.01)


REFUSED: Final[tuple[tuple[dict[str, Any], str], ...]] = (
    ({}, "migrate: mode cpr-exec executes parameter 'cpr-exec-command', which is empty; set it"),
    (
        {"cpr-exec-command": ["/nowhere/program"]},
        "migrate: there is no executable '/nowhere/program', which cpr-exec-command begins with; name one",
    ),
    (
        {"cpr-exec-command": ["/bin/true", "a\0b"]},
        "migrate: there is no executable '/bin/true', which cpr-exec-command begins with; name one",
    ),
    (
        {"cpr-exec-command": RUN, "x-keep-source": True},
        "migrate: mode cpr-exec leaves no process that x-keep-source could keep; turn x-keep-source off",
    ),
)


async def test_what_cannot_be_executed_is_refused_before_anything_starts() -> None:
    async with started() as made:
        for parameters, text in REFUSED:
            with pytest.raises(CommandFailed) as caught:
                await made.client.execute("migrate", parameters={"mode": "cpr-exec", **parameters})
            assert caught.value.desc == text
        assert (await made.client.execute("query-status"))["running"]


async def test_a_process_that_is_not_the_machines_alone_does_not_become_another(tmp_path: Path) -> None:
    async with pair(tmp_path) as made, connected(made.qmp) as client:
        with pytest.raises(CommandFailed) as caught:
            await client.execute("migrate", parameters={"mode": "cpr-exec", "cpr-exec-command": RUN})
        assert caught.value.desc == (
            "migrate: the machine runs inside another program, whose process is not its own to replace; "
            "use mode cpr-transfer"
        )


def test_who_is_told_to_end_while_the_guest_is_elsewhere_ends_the_caretaker() -> None:
    caretaker = subprocess.Popen(["sleep", "infinity"])
    ours, theirs = socket.socketpair()
    with ours:
        BecomeProgram(["x"], caretaker.pid, theirs.detach()).renounce()
        assert ours.recv(1) == b""
    assert caretaker.wait() == -signal.SIGTERM


async def test_a_process_that_cannot_be_seen_is_not_replaced() -> None:
    ours, theirs = host_sockets.connected_pair()
    with ours, theirs:
        client = QmpClient(trio.socket.from_stdlib_socket(ours), "a test")
        with pytest.raises(UpdateFailed) as caught:
            _process(client)
    assert str(caught.value).endswith(
        ": it runs in a PID namespace that cannot be seen from here; give the command there"
    )


def test_a_report_adds_the_pauses_up() -> None:
    one, two = {"stop": 1.0, "total": 3.25}, {"stop": 0.5, "total": 3.5}
    assert ReplaceReport(7, 7, (one, two)).to_text() == (
        "updated: process 7 executes the new program\nthe guest's pause: 6.75 ms (3.25 + 3.50)"
    )
    assert ReplaceReport(7, 9, (one,)).to_text() == "undone: process 7 -> 9\nthe guest's pause: 3.25 ms"
    assert ReplaceReport(7, 9, ()).to_text() == "undone: process 7 -> 9\nthe guest's pause: not known"
    assert ReplaceReport(7, 7, (one,)).to_text().endswith("\nthe guest's pause: not known")
    assert ReplaceReport(7, 9, (one,)).to_json() == {"old-pid": 7, "new-pid": 9, "pauses-ms": [one]}
