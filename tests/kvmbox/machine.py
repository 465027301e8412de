"""A machine of this project that runs a stock Linux guest, and the processes that it lives in one after the other."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, Self, final

import attrs
import trio

from tests.kvmbox.console import ConsoleSocket
from tests.leaks import Held
from vmm.qmp_client import qmp_session

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.kvmbox.console import SerialConsole
    from vmm.qmp_client import QmpClient

PROGRAM: Final = (sys.executable, "-m", "vmm")

START: Final = 120.0
"""Seconds that a VMM may take from its start to its serial port. Python needs eight or so in the box."""

UPDATE: Final = 450.0
"""Seconds that a whole live update may take, the starts of two processes included."""

LAST_WORDS: Final = 10.0
"""Seconds that a VMM has to end by itself, after a test has failed, before it is killed."""

_PR_SET_CHILD_SUBREAPER: Final = 36
"""linux/prctl.h"""


@final
@attrs.define
class LinuxMachine:
    """A running machine. Its monitor's path stays, its processes change."""

    qmp: Path
    pid: int
    """Of the process that the guest is in, unless somebody has updated it who did not use `update`."""
    console: SerialConsole
    log: Path
    """What all its processes wrote to standard output and standard error."""
    _first: trio.Process

    @classmethod
    @asynccontextmanager
    async def running(cls, directory: Path, *options: str) -> AsyncIterator[Self]:
        """A machine with `options`, whose files are in `directory`. At the end nothing of it is left."""
        _adopt_orphans()
        before = Held.now().children.keys()
        log, qmp = directory / "vmm.log", directory / "qmp"
        async with ConsoleSocket.listening(directory / "console") as socket:
            command = [*PROGRAM, "run", "-qmp", f"unix:{qmp}", "-serial", f"unix:{socket.path},server=off", *options]
            with log.open("wb") as file:
                first = await trio.lowlevel.open_process(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
            try:
                async with socket.accepted(within=START) as console:
                    machine = cls(qmp, first.pid, console, log, first)
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
                    first.kill()
                    await first.wait()
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

    async def ended(self) -> int:
        """The exit status of the present process, once it has ended."""
        return await (self._first.wait() if self.pid == self._first.pid else _exit_status(self.pid))


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
