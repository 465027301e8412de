"""Real conditions, brought about from outside in a process that has stopped itself at a step.

Nothing is faked: a limit is lowered so far that the kernel refuses what is asked for next, a socket is shut down, a
file system has no room left. `lift` takes it back.
"""

from __future__ import annotations

import array
import ctypes
import os
import resource
import signal
import socket
import subprocess
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final, final

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from tests.phases.update_kit import Process

_PIDFD_GETFD: Final = 438
_MAX_SENT: Final = 253
"""Descriptors in one sendmsg. Source: SCM_MAX_FD, unix(7)."""

_IN_FLIGHT_LIMIT: Final = 200
"""More than a VMM has open, and less than are put in flight."""

SPARE: Final = 4 << 20
"""Bytes that may still be mapped where memory is short: some arenas of the interpreter, which nothing can do without,
and no guest's RAM (16 MiB) or thread (8 MiB of stack)."""


@final
@attrs.define(eq=False)
class Condition:
    """What was brought about."""

    _undo: Callable[[], None] = lambda: None

    def lift(self) -> None:
        """Take it back."""
        self._undo()


def no_descriptors(process: Process) -> Condition:
    """EMFILE: the limit is the lowest number that is free."""
    used = {int(name) for name in os.listdir(f"/proc/{process.pid}/fd")}
    return _limited(process, resource.RLIMIT_NOFILE, next(n for n in range(len(used) + 1) if n not in used))


def no_memory(process: Process) -> Condition:
    """ENOMEM from mmap: the limit is what is mapped, and a little."""
    with open(f"/proc/{process.pid}/statm") as statm:
        mapped = int(statm.read().split()[0]) * resource.getpagesize()
    return _limited(process, resource.RLIMIT_AS, mapped + SPARE)


def no_passing(process: Process) -> Condition:
    """ETOOMANYREFS: this user has more descriptors in flight than the process's limit; it must be unprivileged."""
    limit = _limited(process, resource.RLIMIT_NOFILE, _IN_FLIGHT_LIMIT)
    ends = socket.socketpair()
    ancillary = array.array("i", [ends[1].fileno()] * _MAX_SENT)
    ends[0].sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, ancillary)])

    def undo() -> None:
        limit.lift()
        for end in ends:
            end.close()

    return Condition(undo)


def _limited(process: Process, what: int, soft: int) -> Condition:
    before = resource.prlimit(process.pid, what)
    resource.prlimit(process.pid, what, (soft, before[1]))

    def undo() -> None:
        with suppress(ProcessLookupError):
            resource.prlimit(process.pid, what, before)

    return Condition(undo)


def end_of_channel(process: Process, path: str) -> Condition:
    """EOF: the socket that is connected to, or was accepted at, `path` is shut down, both ways."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(process.pid)
    try:
        for name in os.listdir(f"/proc/{process.pid}/fd"):
            fd = libc.syscall(_PIDFD_GETFD, pidfd, int(name), 0)
            if fd < 0:
                continue
            try:
                with socket.socket(fileno=fd) as found:
                    at = {found.getsockname(), _peer_of(found)}
                    if path in at and not found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                        found.shutdown(socket.SHUT_RDWR)
                        return Condition()
            except OSError:
                with suppress(OSError):
                    os.close(fd)
    finally:
        os.close(pidfd)
    raise AssertionError(f"process {process.pid} has no channel at {path}")


def _peer_of(sock: socket.socket) -> object:
    try:
        return sock.getpeername()
    except OSError:
        return None


def killed(process: Process) -> Condition:
    """SIGKILL."""
    process.popen.send_signal(signal.SIGKILL)
    return Condition()


@contextmanager
def small_disk(folder: Path) -> Generator[None, None, None]:
    """Mount a file system at `folder` that can be filled."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k,nr_inodes=64", "small", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def full_disk(folder: Path) -> Condition:
    """ENOSPC: not a byte and not a name is left in a small file system."""
    made = [folder / "fill"]
    with made[0].open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    with suppress(OSError):
        while True:
            name = folder / f"fill{len(made)}"
            name.touch()
            made.append(name)

    def undo() -> None:
        for name in made:
            name.unlink()

    return Condition(undo)
