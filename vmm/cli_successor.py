"""A successor for a running machine: a new process, told to take the machine over, and watched until it can."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, final

import trio

from vmm import host_sockets
from vmm.errors import HostFileRefused, OptionInvalid, VmmError
from vmm.qmp_client import MonitorGone, NoMonitor, qmp_over

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from vmm.qmp_client import QmpClient

START: Final = 120.0
"""Seconds that the successor has to answer its monitor: generous, since the guest runs on meanwhile, and a successor
that ends is noticed at once."""


@final
class UpdateFailed(VmmError):
    """The update did not come about; the guest goes on in the old process."""

    text: ClassVar[str] = "The live update failed, and the machine goes on in the old process: {reason}"
    reason: str


def successor_command(binary: str | None) -> list[str]:
    """Return the command that starts a successor: `binary`, or this very program."""
    if binary is None:
        return [sys.executable, "-m", "vmm"]
    found = shutil.which(binary)
    if found is None:
        raise OptionInvalid(option="--binary", value=binary, wanted="the path of an executable trio-vmm")
    return [found]


@asynccontextmanager
async def successor_of(
    source: QmpClient, path: str, command: Sequence[str], extra: Sequence[str] = ()
) -> AsyncGenerator[tuple[Successor, QmpClient, str, str], None]:
    """Start a successor of the machine at `path`; yield it, a session of it, and the paths of its two channels.

    Leaving the block by an error ends it, unless it may have the guest.
    """
    await _require_guest(source, path)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="trio-vmm-update-"))
        main, cpr = str(Path(folder) / "main"), str(Path(folder) / "cpr")
        ours, theirs = host_sockets.connected_pair()
        with ours, theirs:
            # Before it is started: what is sent earlier comes without its sender.
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            successor = Successor(start_successor(command, theirs, main, cpr, extra), command[0])
            theirs.close()
            with successor:
                async with successor.session(ours.dup()) as destination:
                    yield successor, destination, main, cpr


async def _require_guest(source: QmpClient, path: str) -> None:
    phase = (await source.execute("query-machine-phase"))["phase"]
    if phase != "machine-ready":
        reason = f"the machine at {path} has no guest yet; its phase is {phase}, and must be machine-ready"
        raise UpdateFailed(reason=reason)


def start_successor(
    command: Sequence[str], monitor: socket.socket, main: str, cpr: str, extra: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    """Start a destination whose first monitor is the connected socket `monitor`. It outlives this process.

    It says what it has to say on this process's standard error until it has the guest, and then on the old process's.
    Nothing else of ours is kept open by it, so that nobody who reads our output waits for a machine to end.
    """
    argv = [
        *command, "run", "-qmp", f"fd:{monitor.fileno()}", "-incoming", f"unix:{main}",
        "-incoming", json.dumps({"channel-type": "cpr", "addr": {"transport": "socket", "type": "unix", "path": cpr}}),
        *extra,
    ]  # fmt: skip
    try:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(monitor.fileno(),),
            start_new_session=True,
        )
    except OSError as error:
        raise HostFileRefused(action="start", path=argv[0], reason=error.strerror or str(error)) from error


@final
class Successor:
    """The new process. A context manager that ends it on the way out of an error, unless it may have the guest."""

    def __init__(self, process: subprocess.Popen[bytes], name: str) -> None:
        self._process = process
        self._name = name
        self.may_have_the_guest = False
        """True from before the old process is told to hand over, until it has said that the guest is not here."""
        self.is_awaited = False
        """Whether the old process has said that it has begun to hand over."""

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None and not self.may_have_the_guest:
            self.end()

    def end(self) -> None:
        """End it. For who knows that it has no guest."""
        self._process.kill()
        self._process.wait()

    @asynccontextmanager
    async def session(self, sock: socket.socket) -> AsyncGenerator[QmpClient, None]:
        """Yield a session of its first monitor, once it listens for the old process."""
        destination: QmpClient | None = None
        async with AsyncExitStack() as stack:
            try:
                with trio.fail_after(START):
                    destination = await stack.enter_async_context(qmp_over(sock, "the successor", within=START))
                    await _await_listeners(destination)
            except trio.TooSlowError as error:
                raise UpdateFailed(reason=f"the successor, {self._name}, was not ready within {START:g} s") from error
            except MonitorGone as error:
                # It may have closed its monitor just before its end.
                with trio.move_on_after(1):
                    await self._ended()
                status = self._process.poll()
                how = "closed its monitor" if status is None else _end(status)
                raise UpdateFailed(reason=f"the successor, {self._name}, {how} before it was ready") from error
            except NoMonitor as error:
                raise UpdateFailed(reason=f"the successor, {self._name}, is no trio-vmm: {error}") from error
            yield destination

    async def _ended(self) -> None:
        pidfd = os.pidfd_open(self._process.pid)
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)


def _end(status: int) -> str:
    return f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}"


async def _await_listeners(destination: QmpClient) -> None:
    while (await destination.execute("query-migrate")).get("status") != "setup":
        await destination.wait_event(lambda event: True)
