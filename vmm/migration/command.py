"""A command at the other end of a channel: what it reads from its standard input is the stream, or what it writes.

The command has one end of a pair of sockets. Where it is only written to, or only read, the other one of its standard
input and output is /dev/null; its standard error is this process's. It leads a process group of its own, all of which
is killed if the migration comes to nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Literal, final

import trio

from vmm import host_sockets, hostio
from vmm.errors import MigrationCommandFailed
from vmm.migration.connection import Connection

if TYPE_CHECKING:
    from vmm.errors import VmmError
    from vmm.migration.address import ExecAddress

_DYING: Final = 1.0
"""Seconds for a command that has closed its end to be seen to end: then its status says why."""

_LINGERING: Final = 10.0
"""Seconds for a command to end once all is over."""

_DROPPED: Final = 1 << 16
"""Bytes read at once of what nobody wants."""


def start_command(address: ExecAddress, direction: Literal["out", "in"], *, two_way: bool) -> Connection:
    """Start a command, and return the channel to it; `serve` waits for its end.

    Args:
        direction: whether the stream goes out, to it, or comes in.
        two_way: whether it can answer, or be answered, besides.

    Raises:
        HostFileRefused: there is no such program, or the host refused.
    """
    ours, theirs = host_sockets.connected_pair()
    end = theirs.fileno()
    with theirs:
        try:
            process = subprocess.Popen(
                address.args,
                stdin=end if two_way or direction == "out" else subprocess.DEVNULL,
                stdout=end if two_way or direction == "in" else subprocess.DEVNULL,
                process_group=0,
            )
        except OSError as error:
            ours.close()
            raise hostio.refused("start", address.args[0], error) from error
    ours.setblocking(False)
    try:
        ends = os.pidfd_open(process.pid)
    except OSError as error:
        ours.close()
        process.kill()
        process.wait()
        raise hostio.refused("watch", address.args[0], error) from error
    attendant = _Command(process, ends, address.command)
    return Connection(trio.socket.from_stdlib_socket(ours), two_way=two_way, attendant=attendant)


@final
class _Command:
    """A command that runs. Killed, if it still does, at the end of `attend`."""

    name = "migration command"

    def __init__(self, process: subprocess.Popen[bytes], ends: int, command: str) -> None:
        self._process = process
        self._ends = ends
        self._command = command
        self._ended = trio.Event()
        self._limit = trio.CancelScope()

    async def attend(self) -> None:
        """Wait for its end, in the limits that `end` sets."""
        try:
            with self._limit:
                await trio.lowlevel.wait_readable(self._ends)
        finally:
            if self._process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                # Shielded: a child that is not waited for is left behind. It has been killed.
                with trio.CancelScope(shield=True):
                    await trio.lowlevel.wait_readable(self._ends)
                self._process.wait()
            os.close(self._ends)
            self._ended.set()

    async def blame(self) -> VmmError | None:
        """Return that it has ended, and how, unless it has been killed here."""
        with trio.move_on_after(_DYING):
            await self._ended.wait()
        return self._failure() if self._ended.is_set() and not self._limit.cancelled_caught else None

    async def finish(self, sock: trio.socket.SocketType, *, sent: bool) -> None:
        """Wait for its end. One that has sent all there was is not waited for long.

        Raises:
            MigrationCommandFailed: its status is not 0.
        """
        with trio.CancelScope() as patience:
            if not sent:
                patience.deadline = trio.current_time() + _LINGERING
                with suppress(OSError):
                    while await sock.recv(_DROPPED):
                        pass
            await self._ended.wait()
        if patience.cancelled_caught:
            self._limit.cancel()
        elif self._process.returncode:
            raise self._failure()

    def end(self, *, gently: bool) -> None:
        """Kill it, or give it some time, also where the machine ends meanwhile: what was said last says whose it is."""
        self._limit.shield = gently
        self._limit.deadline = trio.current_time() + _LINGERING if gently else -float("inf")

    def _failure(self) -> MigrationCommandFailed:
        status = self._process.returncode
        how = f"ended with status {status}"
        if status < 0:
            how = f"was killed by signal {-status} ({signal.strsignal(-status)})"
        return MigrationCommandFailed(command=self._command, how=how)
