"""Processes that start at once: forked from one that has imported all of the VMM already.

Half a second of a VMM's start is imports; a matrix of faults starts hundreds. What is forked has no threads and no loop
yet, becomes the test's own child, and runs `trio-vmm` as any other process does.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import traceback
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, final

import vmm

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from pathlib import Path

_PR_SET_CHILD_SUBREAPER: Final = 36
_CAPABILITIES_V3: Final = 0x20080522
_ADMIN_AND_RESOURCE: Final = 1 << 21 | 1 << 24
_MAX_REQUEST: Final = 1 << 16


@final
class Forked:
    """A child of the test, as `subprocess.Popen` would have it."""

    def __init__(self, pid: int) -> None:
        self.pid: Final = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return its exit status, minus the signal that killed it, or None."""
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        """Wait for its end."""
        status = self._wait(0)
        assert status is not None
        return status

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has been waited for."""
        if self.poll() is None:
            os.kill(self.pid, number)


@final
class Zygote:
    """Forks VMMs."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def fork(self, arguments: Sequence[str], log: Path, *, unprivileged: bool = False) -> Forked:
        """Start `trio-vmm ARGUMENTS` with its standard error in `log`.

        Args:
            unprivileged: without CAP_SYS_ADMIN and CAP_SYS_RESOURCE, as a VMM of an ordinary user.
        """
        request = {"arguments": list(arguments), "log": str(log), "unprivileged": unprivileged}
        self._sock.send(json.dumps(request).encode())
        return Forked(int(self._sock.recv(64)))


@contextmanager
def open_zygote() -> Generator[Zygote, None, None]:
    """Start one. What it forks must have been waited for by the end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    libc = ctypes.CDLL(None)
    with ours, theirs:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        command = [sys.executable, "-m", "tests.phases.zygote", str(theirs.fileno())]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),))
        theirs.close()
        try:
            yield Zygote(ours)
        finally:
            ours.close()
            process.wait()
            libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def serve(sock: socket.socket) -> None:
    """Fork what is asked for, until the other end is closed."""
    for module in pkgutil.walk_packages(vmm.__path__, "vmm."):
        if not module.name.endswith(("__main__", "build_ffi", "build")):
            importlib.import_module(module.name)
    while request := sock.recv(_MAX_REQUEST):
        # By way of a process that ends at once: so what is started is inherited by the test.
        between = os.fork()
        if not between:
            child = os.fork()
            if child:
                sock.send(str(child).encode())
                os._exit(0)
            sock.close()
            run(json.loads(request))
        os.waitpid(between, 0)


def run(request: dict[str, Any]) -> None:
    """Be the process that was asked for."""
    status = 1
    try:
        null = os.open(os.devnull, os.O_RDWR)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        for fd, at in ((null, 0), (null, 1), (log, 2)):
            os.dup2(fd, at)
        os.close(null)
        os.close(log)
        if request["unprivileged"]:
            give_up_privileges()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from vmm.cli import main

        status = main(request["arguments"])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def give_up_privileges() -> None:
    """Drop two capabilities from this thread, which is the only one. Source: capset(2)."""
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_V3, 0)
    # Effective, permitted and inheritable of capabilities 0 to 31, and the same of 32 to 63.
    sets = (ctypes.c_uint32 * 6)()
    libc.capget(header, sets)
    sets[0] &= ~_ADMIN_AND_RESOURCE
    sets[1] &= ~_ADMIN_AND_RESOURCE
    libc.capset(header, sets)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
