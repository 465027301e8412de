"""Machines under measurement: how each monitor is started, asked, looked at and ended."""

from __future__ import annotations

import array
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT: Final = Path(__file__).resolve().parent.parent

POLL: Final = 0.0002
"""Seconds between two attempts to connect to a monitor that is not there yet: the error of what is measured by it."""

PATIENCE: Final = 30.0
"""Seconds after which something that was waited for is an error."""

PROGRAM: Final = (sys.executable, "-m", "vmm")
OURS: Final = (*PROGRAM, "run")


class BenchFailed(Exception):
    """A measurement could not be made; the text says why."""


def environment() -> dict[str, str]:
    """Return the environment for every process that is measured.

    Bytecode is cached, as in any installation: without it the interpreter would compile this package at each start.
    """
    return {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


def find_qemu() -> str | None:
    """Return the path of the `qemu-system-x86_64` on PATH, if there is one."""
    return shutil.which("qemu-system-x86_64")


def pinned(command: Sequence[str], cpu: int | None) -> list[str]:
    """Return `command`, to be run on one CPU only if `cpu` says which."""
    return [*(("taskset", "-c", str(cpu)) if cpu is not None else ()), *command]


def pin(pid: int, cpus: set[int]) -> None:
    """Let every thread of a process run on `cpus` only. Threads that these make later inherit it."""
    for task in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(task), cpus)


def connect(path: Path, process: subprocess.Popen[bytes] | None = None) -> socket.socket:
    """Connect to the unix socket at `path` as soon as `process` (None: one that is there) listens there."""
    limit = time.monotonic() + PATIENCE
    while True:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(str(path))
            return sock
        except OSError as error:
            sock.close()
            if process is None or process.poll() is not None or time.monotonic() > limit:
                raise BenchFailed(f"nobody listens at {path}: {error.strerror}") from error
        time.sleep(POLL)


@final
class Monitor:
    """A QMP session that waits for each answer. For what is not measured, and for the first answer, which is."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(PATIENCE)
        self._sock = sock
        self._file = sock.makefile("rb")
        self._events: list[dict[str, Any]] = []  # that nobody has waited for yet
        self.greeting: Final[dict[str, Any]] = self._read()

    @classmethod
    def connect(cls, path: Path, process: subprocess.Popen[bytes] | None = None) -> Monitor:
        """Connect as the function `connect` does, and return when the greeting has been read."""
        return cls(connect(path, process))

    def execute(self, command: str, **arguments: Any) -> Any:
        """Execute a command and return its reply."""
        self._sock.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        return self._answer(command)

    def _answer(self, command: str) -> Any:
        while "return" not in (message := self._read()):
            if "error" in message:
                raise BenchFailed(f"{command}: {message['error']['desc']}")
            self._events.append(message)
        return message["return"]

    def _read(self) -> dict[str, Any]:
        line = self._file.readline()
        if not line:
            raise BenchFailed("a monitor was closed before it had answered")
        message: dict[str, Any] = json.loads(line)
        return message

    def give(self, fd: int, name: str) -> None:
        """Give the machine a descriptor, under `name`."""
        request = json.dumps({"execute": "getfd", "arguments": {"fdname": name}}).encode()
        self._sock.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
        self._answer("getfd")

    def wait_for(self, name: str, within: float = PATIENCE) -> dict[str, Any]:
        """Return the next event `name`: the oldest that has not been returned. `within` limits each single wait."""
        for number, message in enumerate(self._events):
            if message.get("event") == name:
                return self._events.pop(number)
        self._sock.settimeout(within)
        try:
            while (message := self._read()).get("event") != name:
                self._events.append(message)
        finally:
            self._sock.settimeout(PATIENCE)
        return message

    def last(self, name: str, *, until: str) -> dict[str, Any]:
        """Read until event `until`, or until the machine closes the session; return the last event `name` before."""
        found: dict[str, Any] = {}
        for message in chain(self._events, map(json.loads, self._file)):
            if message.get("event") == name:
                found = message
            elif message.get("event") == until:
                break
        if not found:
            raise BenchFailed(f"a monitor was closed without event {name}")
        return found

    def close(self) -> None:
        """Leave."""
        self._file.close()
        self._sock.close()


@final
@attrs.frozen
class Machine:
    """A running process with a monitor."""

    process: subprocess.Popen[bytes]
    monitor: Monitor
    greeted: float
    """Seconds from exec to the greeting."""


@contextmanager
def running(command: Sequence[str], qmp: Path, log: Path) -> Iterator[Machine]:
    """Start `command`, whose monitor will be at `qmp`, and end it by SIGTERM (or by force) when the block is left."""
    qmp.unlink(missing_ok=True)
    with log.open("wb") as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=ROOT, env=environment()
        )
        try:
            try:
                monitor = Monitor.connect(qmp, process)
            except BenchFailed as error:
                raise BenchFailed(f"{error}\n{log.read_text(errors='replace')}") from error
            greeted = time.perf_counter() - began
            try:
                yield Machine(process, monitor, greeted)
            finally:
                monitor.close()
        finally:
            end(process)


def wait_until_complete(monitor: Monitor) -> None:
    """Return once one of our machines is complete. Its monitor answers before; QEMU's only then."""
    limit = time.monotonic() + PATIENCE
    while monitor.execute("query-machine-phase")["phase"] != "machine-ready":
        if time.monotonic() > limit:
            raise BenchFailed(f"the machine was not complete within {PATIENCE:g} s")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process as an operator would; by force if it does not."""
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def moment(event: dict[str, Any]) -> float:
    """Return when an event happened, in ms on CLOCK_REALTIME."""
    stamp = event["timestamp"]
    return float(stamp["seconds"] * 1e3 + stamp["microseconds"] / 1e3)


def open_ram(pid: int, name: str = "/memfd:ram") -> int:
    """Open the RAM of the machine in process `pid`, by its memfd."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            if os.readlink(link).startswith(name):
                return os.open(link, os.O_RDWR | os.O_CLOEXEC)
    raise BenchFailed(f"process {pid} has no memfd called {name!r}")


def memory_of(pid: int) -> dict[str, float]:
    """Return what a process has resident, and what of it nobody shares, in MiB.

    Source: Linux Documentation/filesystems/proc.rst, smaps_rollup.
    """
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split(":")
        fields[name] = int(value.split()[0]) / 1024
    return {"rss_mib": fields["Rss"], "private_mib": fields["Private_Clean"] + fields["Private_Dirty"]}
