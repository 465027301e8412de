"""`trio-vmm update`: replace the process under a running machine, in one command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import attrs
import trio

from vmm import hostio
from vmm.errors import CprRefused, HostFileRefused, OptionInvalid, VmmError
from vmm.qmp_client import CommandFailed, qmp_over, qmp_session

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.qmp_client import QmpClient

START: Final = 30.0
"""Seconds that the successor has to answer its monitor."""

COMPLETION: Final = 120.0
"""Seconds for the whole hand-over. The guest's own pause has limits of its own, far below."""


@final
@attrs.frozen(kw_only=True)
class UpdateFailed(VmmError):
    """The update did not come about; the guest goes on in the old process."""

    text = "The live update failed, and the guest goes on in the old process: {reason}"
    reason: str


@final
@attrs.frozen
class UpdateReport:
    """What an update did."""

    old_pid: int
    new_pid: int
    stages: dict[str, float]
    """Stage of the guest's pause -> milliseconds, and their sum as `total`."""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {"old-pid": self.old_pid, "new-pid": self.new_pid, "pause-ms": self.stages}


def update_machine(path: str, binary: str | None, *, as_json: bool) -> int:
    """Update the machine whose monitor is at `path`, print a report, and return the exit status."""
    command = successor_command(binary)
    report = trio.run(_update, path, command)
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        stages = ", ".join(f"{name} {value:.2f}" for name, value in report.stages.items() if name != "total")
        print(f"updated: process {report.old_pid} -> {report.new_pid}")
        print(f"the guest's pause: {report.stages['total']:.2f} ms ({stages})")
    return 0


async def _update(path: str, command: Sequence[str]) -> UpdateReport:
    try:
        return await live_update(path, command)
    except BaseExceptionGroup as group:
        from vmm.errors import leaves

        expected = [error for error in leaves(group) if isinstance(error, VmmError)]
        if expected:
            raise expected[0] from None
        raise


def successor_command(binary: str | None) -> list[str]:
    """Return the command that starts a successor: `binary`, or this very program."""
    if binary is None:
        return [sys.executable, "-m", "vmm"]
    found = shutil.which(binary)
    if found is None:
        raise OptionInvalid(option="--binary", value=binary, wanted="the path of an executable trio-vmm")
    return [found]


async def live_update(path: str, command: Sequence[str], extra: Sequence[str] = ()) -> UpdateReport:
    """Hand the machine at `path` over to a new process, and end the old one. `extra` are options for the successor.

    On a failure or a cancel the successor is ended and the guest stays where it is.

    Raises:
        UpdateFailed, VmmError: the update did not come about.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="trio-vmm-update-"))
        main, cpr = str(Path(folder) / "main"), str(Path(folder) / "cpr")
        ours, theirs = hostio.socket_pair()
        stack.enter_context(ours)
        async with qmp_session(path) as source:
            old_pid = _peer_pid(path)
            process = start_successor(command, theirs, main, cpr, extra)
            theirs.close()
            try:
                with trio.fail_after(START):
                    async with qmp_over(ours.dup(), "the successor") as destination:
                        await _await_listeners(destination)
                        await _migrate(source, main, cpr)
                        stages = await _await_completion(source, destination, process)
            except BaseException:
                process.kill()
                process.wait()
                raise
            await _quit(source)
    return UpdateReport(old_pid, process.pid, stages)


def start_successor(
    command: Sequence[str], monitor: socket.socket, main: str, cpr: str, extra: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    """Start a destination whose first monitor is the connected socket `monitor`. It outlives this process."""
    argv = [
        *command, "run", "-qmp", f"fd:{monitor.fileno()}", "-incoming", f"unix:{main}",
        "-incoming", json.dumps({"channel-type": "cpr", "addr": {"transport": "socket", "type": "unix", "path": cpr}}),
        *extra,
    ]  # fmt: skip
    try:
        return subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, pass_fds=(monitor.fileno(),), start_new_session=True
        )
    except OSError as error:
        raise HostFileRefused(action="start", path=argv[0], reason=error.strerror or str(error)) from error


async def _await_listeners(destination: QmpClient) -> None:
    while (await destination.execute("query-migrate")).get("status") != "setup":
        await destination.wait_event(lambda event: True)


async def _migrate(source: QmpClient, main: str, cpr: str) -> None:
    await source.execute("migrate-set-parameters", mode="cpr-transfer")
    await source.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    source.events.clear()
    channels = [
        {"channel-type": kind, "addr": {"transport": "socket", "type": "unix", "path": where}}
        for kind, where in (("main", main), ("cpr", cpr))
    ]
    await source.execute("migrate", channels=channels)


async def _await_completion(
    source: QmpClient, destination: QmpClient, process: subprocess.Popen[bytes]
) -> dict[str, float]:
    over = ("completed", "failed", "cancelled")
    with trio.fail_after(COMPLETION):
        await source.wait_event(lambda event: event["event"] == "MIGRATION" and event["data"]["status"] in over)
    info = await source.execute("query-migrate")
    if info["status"] != "completed":
        raise UpdateFailed(reason=info.get("error-desc", info["status"]))
    stages: dict[str, float] = info["x-pause"]
    return stages


async def _quit(source: QmpClient) -> None:
    await source.execute("quit")
    try:
        while True:
            await source.read()
    except VmmError:
        pass  # the end of its monitor is the end of the old process


def _peer_pid(path: str) -> int:
    with hostio.connect_unix(path) as sock:
        return hostio.peer_credentials(sock)[0]


