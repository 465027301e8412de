"""The process that has the guest while this one becomes another program (mode cpr-exec).

An ordinary destination of a live update, started beforehand, while the guest runs on. So the guest does not wait for a
program to start: it is handed over twice, and each time stands as long as for any live update.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final, final

from vmm import host_sockets
from vmm.cpr.berth import Berth
from vmm.errors import HostFileRefused
from vmm.phases.afterwards import BecomeProgram

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from vmm.migration.channel import Channels

OPTION: Final = "--x-cpr-caretaker-of"
"""Tells a process whose caretaker it is."""


@final
class Caretaker:
    """A child of this process. Ended by `close`, unless it was released, with the guest."""

    def __init__(self, process: subprocess.Popen[bytes], channels: Channels, monitor: socket.socket) -> None:
        self._process = process
        self.channels: Final = channels
        """Where it awaits the guest."""
        self._monitor = monitor
        self._released = False

    @classmethod
    def start(cls, extra: Sequence[str] = ()) -> Caretaker:
        """Start one of this very program, with options `extra`. Raises `HostFileRefused`."""
        with ExitStack() as stack:
            berth = Berth.bind()
            stack.callback(berth.close)
            ours, theirs = host_sockets.connected_pair()
            stack.callback(theirs.close)
            with ExitStack() as undo:
                undo.callback(ours.close)
                incoming = [text for channel in berth.incoming() for text in ("-incoming", json.dumps(channel))]
                command = [
                    sys.executable, "-m", "vmm", "run", "-qmp", f"fd:{theirs.fileno()}", *incoming,
                    OPTION, str(os.getpid()), *extra,
                ]  # fmt: skip
                process = _start(command, (*berth.filenos(), theirs.fileno()))
                undo.pop_all()
            # Our copies of the listening sockets end here: when it dies, whoever is connected to them is told.
            return cls(process, berth.channels, ours)

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def release(self, command: Sequence[str]) -> BecomeProgram:
        """Leave it alone, with the guest: `command` will take it from there."""
        self._released = True
        return BecomeProgram(tuple(command), self.pid, self._monitor.detach())

    def close(self) -> None:
        """End it, if it is still ours. Idempotent."""
        self._monitor.close()
        if not self._released:
            self._process.kill()
            self._process.wait()


def _start(command: Sequence[str], descriptors: Sequence[int]) -> subprocess.Popen[bytes]:
    try:
        # A session of its own: what is typed at this process's terminal is not for it.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=descriptors,
            start_new_session=True,
        )
    except OSError as error:
        raise HostFileRefused(action="start", path=command[0], reason=error.strerror or str(error)) from error
