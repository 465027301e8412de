"""A machine of this project that runs a stock Linux guest, and the processes that it lives in one after the other."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from itertools import count
from typing import TYPE_CHECKING, Any, Final, Self, final

import attrs
import trio

from tests.kvmbox.console import ConsoleSocket
from tests.leaks import Held
from vmm.qmp_client import qmp_session

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.kvmbox.console import SerialConsole
    from vmm.qmp_client import QmpClient

PROGRAM: Final = (sys.executable, "-m", "vmm")

START: Final = 120.0
"""Seconds that a VMM may take from its start to its serial port. Python needs eight or so in the box."""

UPDATE: Final = 450.0
"""Seconds that a whole live update may take, the starts of two processes included."""

OVER: Final = ("completed", "failed", "cancelled")

LAST_WORDS: Final = 10.0
"""Seconds that a VMM has to end by itself, after a test has failed, before it is killed."""

_PR_SET_CHILD_SUBREAPER: Final = 36
"""linux/prctl.h"""


@final
@attrs.define
class LinuxMachine:
    """A running machine. Its processes change; its monitor's path stays, unless it is migrated."""

    qmp: Path
    pid: int
    """Of the process that the guest is in, unless somebody has updated it who did not use `update`."""
    console: SerialConsole
    log: Path
    """What all its processes wrote to standard output and standard error."""
    _started: list[trio.Process]
    """Those that the test started itself."""
    _ports: ConsoleSocket
    _stack: AsyncExitStack
    _moves: Iterator[int] = attrs.Factory(count)

    @classmethod
    @asynccontextmanager
    async def running(cls, directory: Path, *options: str) -> AsyncIterator[Self]:
        """A machine with `options`, whose files are in `directory`. At the end nothing of it is left."""
        _adopt_orphans()
        before = Held.now().children.keys()
        started: list[trio.Process] = []
        log, qmp = directory / "vmm.log", directory / "qmp"
        async with ConsoleSocket.listening(directory / "console") as socket, AsyncExitStack() as stack:
            command = [*PROGRAM, "run", "-qmp", f"unix:{qmp}", "-serial", f"unix:{socket.path},server=off", *options]
            with log.open("wb") as file:
                first = await trio.lowlevel.open_process(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
            started.append(first)
            try:
                async with socket.accepted(within=START) as console:
                    machine = cls(qmp, first.pid, console, log, started, socket, stack)
                    try:
                        yield machine
                    except BaseException as error:
                        # If it is about to end by itself, its last words are worth a moment.
                        with trio.move_on_after(LAST_WORDS, shield=True), suppress(ProcessLookupError):
                            await machine.ended()
                        error.add_note(f"the VMM wrote: {log.read_text() or 'nothing'}")
                        raise
            finally:
                with trio.CancelScope(shield=True):
                    for process in started:
                        process.kill()
                        await process.wait()
                    for successor in Held.now().children.keys() - before:
                        os.kill(successor, signal.SIGKILL)
                        await _exit_status(successor)

    @asynccontextmanager
    async def monitor(self) -> AsyncIterator[QmpClient]:
        """A session with the process that the guest is in."""
        async with qmp_session(str(self.qmp)) as client:
            yield client

    async def update(self) -> dict[str, Any]:
        """Replace the process by `trio-vmm update`, and wait for the end of the old one. The command's report."""
        with trio.fail_after(UPDATE):
            told = await self._update()
            assert await self.ended() == 0
        self.pid = told["new-pid"]
        return told

    async def become(self) -> dict[str, Any]:
        """Let the process execute the program anew by `trio-vmm update --exec`. The command's report."""
        with trio.fail_after(UPDATE):
            told = await self._update("--exec")
            assert told["new-pid"] == self.pid
        return told

    async def _update(self, *options: str) -> dict[str, Any]:
        report = self.log.with_name("update.json")
        # Files, not pipes: the successor inherits them and keeps them open.
        with report.open("wb") as out, self.log.open("ab") as errors:
            command = [*PROGRAM, "update", "--qmp", str(self.qmp), "--json", *options]
            await trio.run_process(command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors)
        told: dict[str, Any] = json.loads(report.read_text())
        assert told["old-pid"] == self.pid
        return told

    async def save_and_resume(self) -> None:
        """End the process by `trio-vmm save`, and go on in a new one by `trio-vmm resume`."""
        state = self.log.with_name("state")
        with self.log.open("ab") as file, trio.fail_after(UPDATE):
            command = [*PROGRAM, "save", "--qmp", str(self.qmp), str(state)]
            await trio.run_process(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file)
            assert await self.ended() == 0
            command = [*PROGRAM, "resume", str(state)]
            resumed = await trio.lowlevel.open_process(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        self._started.append(resumed)
        self.pid = resumed.pid
        port = await self._stack.enter_async_context(self._ports.accepted(within=START))
        await self.console.go_on_in(port)

    async def migrate(self, *resources: str) -> dict[str, Any]:
        """Move the guest over tcp to a new process, which may have `resources`; the old one ends. What it said last."""
        there = self.qmp.with_name(f"{self.qmp.stem}-{next(self._moves)}")
        allowed = [word for name in ("chardev/serial0", *resources) for word in ("-allow-resource", name)]
        command = [*PROGRAM, "run", "-qmp", f"unix:{there}", "-incoming", "tcp:127.0.0.1:0", *allowed]
        with self.log.open("ab") as file:
            process = await trio.lowlevel.open_process(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        self._started.append(process)
        with trio.fail_after(UPDATE):
            async with session_once_there(there) as destination:
                port = await port_of(destination)
                async with self.monitor() as source:
                    await source.execute("migrate", uri=f"tcp:127.0.0.1:{port}")
                    info = await outcome(source)
                    assert info["status"] == "completed", info
                    await source.execute("quit")
                assert await self.ended() == 0
                await outcome(destination)
        self.pid, self.qmp = process.pid, there
        await self.console.go_on_in(await self._stack.enter_async_context(self._ports.accepted(within=START)))
        return info

    async def ended(self) -> int:
        """The exit status of the present process, once it has ended."""
        for process in self._started:
            if process.pid == self.pid:
                return await process.wait()
        return await _exit_status(self.pid)


@asynccontextmanager
async def session_once_there(path: Path) -> AsyncIterator[QmpClient]:
    """A session with a process that is starting."""
    while not await trio.Path(path).is_socket():  # noqa: ASYNC110 - nobody tells
        await trio.sleep(0.1)
    async with qmp_session(str(path)) as client:
        yield client


async def port_of(destination: QmpClient) -> str:
    """Where a destination listens, once it does."""
    while not (addresses := (await destination.execute("query-migrate")).get("socket-address")):  # noqa: ASYNC110
        await trio.sleep(0.1)
    return str(addresses[0]["port"])


async def outcome(end: QmpClient) -> dict[str, Any]:
    """What one end of a migration says of it once it is over."""
    while (info := await end.execute("query-migrate"))["status"] not in OVER:  # noqa: ASYNC110
        await trio.sleep(0.1)
    return dict(info)


async def ask(console: SerialConsole, command: str, within: float = 60) -> list[str]:
    """What the guest's shell prints for `command`. The shell must be `quiet`."""
    await console.send(f"{command}\necho '== end of'  answer ==\n")
    lines: list[str] = []
    with trio.fail_after(within):
        while (line := await console.line(within)) != "== end of answer ==":
            lines.append(line)
    return lines


async def quiet(console: SerialConsole) -> None:
    """Have the guest's shell, just started, print neither prompts nor what is typed."""
    # noflsh: Ctrl-C would else throw away what has been printed and not sent.
    await console.send("PS1= PS2=; stty -echo noflsh; echo $((6 * 7)) is the answer\n")
    await console.expect("^42 is the answer$", within=60)


async def _exit_status(pid: int) -> int:
    """Wait for the end of child `pid`, which nobody else waits for. `ProcessLookupError` if somebody did before."""
    fd = os.pidfd_open(pid)
    try:
        await trio.lowlevel.wait_readable(fd)
        result = os.waitid(os.P_PIDFD, fd, os.WEXITED)  # noqa: ASYNC222 - it has ended
    finally:
        os.close(fd)
    assert result is not None
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


def _adopt_orphans() -> None:
    """Become the parent of successors whose own parent, the update command, ends: so their exit status can be had."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
