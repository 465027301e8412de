"""qtest as an object: a socket whose clients drive the machine's ports, memory, interrupt lines and clock.

It is there from the beginning, like a monitor. Each of its clients' lines is lent `may-inject` for as long as it is
carried out, by whichever open phase grants it; in a phase that does not, the line is answered with the reason.

A machine can be handed to another process with it: where it listens, its clients and its log go along.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Final, TypeVar, final

import attrs
import trio

from vmm.capabilities import QTEST, MayInject
from vmm.errors import CommandDeferred
from vmm.monitor.unix import SocketMonitor
from vmm.nursery_tree import Lending
from vmm.phases.chain import hint
from vmm.phases.monitors import over_chardev
from vmm.phases.qtest_clients import QtestClients
from vmm.qtest.session import QtestSession

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.backends.chardev import Chardev
    from vmm.monitor.ports import Transport
    from vmm.nursery_tree import Tree
    from vmm.outside import OutsideAccess
    from vmm.qtest.session_state import QtestSessionState

ResultT = TypeVar("ResultT")

KIND: Final = "qtest"


@final
@attrs.frozen(eq=False)
class InjectLender:
    """Lends `may-inject` to one line of a client at a time, in turn with the commands of monitors."""

    tree: Tree

    async def lend(self, command: str, holder: str, use: Callable[[OutsideAccess], ResultT]) -> ResultT:
        """Return what `use` returns. `use` does not wait, so that no window can close under it.

        Raises:
            TokenError: no open phase grants the token, or the machine has come to its end.
            VmmError: of `use`.
        """
        await self.tree.wait_begun(command, holder)
        lending = Lending(command, holder, (MayInject,), trio.current_time())
        while True:
            try:
                await self.tree.pass_turnstile(lending)
                break
            except CommandDeferred:
                await self.tree.deferral.over()
        try:
            token, _ = self.tree.find(command, (MayInject,), None, QTEST, holder, hint)
            assert isinstance(token, MayInject)
            return token.carry_out(use)
        finally:
            self.tree.leave_turnstile(lending)


@final
class TrafficLog:
    """Every line that is received and sent, in a file: kind, seconds since the start, line. Without a file, nothing."""

    def __init__(self, name: str, complain: Callable[[str], None]) -> None:
        self.fd: int | None = None
        """The file, which is the log's to close."""
        self._name: Final = name
        self._complain: Final = complain
        self.began_ns = time.monotonic_ns()
        """What times are told from: CLOCK_MONOTONIC, so that a successor can go on with it."""

    def note(self, kind: str, line: str) -> None:
        """Write a line. After an error the rest is not logged, and the operator told."""
        if self.fd is None:
            return
        record = f"[{kind} +{(time.monotonic_ns() - self.began_ns) / 1e9:f}] {line}\n".encode()
        try:
            whole = os.write(self.fd, record) == len(record)
            reason = "it takes no more"
        except OSError as error:
            whole, reason = False, os.strerror(error.errno or 0)
        if not whole:
            self.close()
            self._complain(f"qtest {self._name!r} cannot write its log: {reason}; the rest is not logged")

    def close(self) -> None:
        """Close the file. Twice is harmless."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


@final
class QtestBackend:
    """A qtest with the socket that it serves: to the stores, a monitor whose clients speak another language."""

    url: Final = None
    grant: Final = QTEST.name

    def __init__(
        self,
        name: str,
        chardev: Chardev,
        log: TrafficLog,
        *,
        tree: Tree,
        complain: Callable[[str], None],
        held: bool,
    ) -> None:
        """Take the socket of `chardev`, which is at rest, and `log`. With `held`, begin at rest.

        Raises:
            Unsupported: the chardev is no socket; then nothing was taken.
        """
        lender = InjectLender(tree)

        def make(name: str, transport: Transport, state: QtestSessionState | None) -> QtestSession:
            session = QtestSession(name, transport, lender, log, state)
            if self._clients.held:
                session.hold()
            return session

        sessions = SocketMonitor(name, lambda name, transport: make(name, transport, None), complain)
        self._clients: Final = QtestClients(name, sessions, make, log, held=held)
        self._monitor: Final = over_chardev(sessions, chardev, held=held)
        self._log: Final = log

    @property
    def chardev(self) -> str | None:
        """Label of the chardev whose socket this is."""
        return self._monitor.chardev

    @property
    def moves(self) -> bool:
        """Whether a successor goes on with it."""
        return self._monitor.moves

    @property
    def clients(self) -> int:
        """How many are connected."""
        return self._monitor.clients

    @property
    def qtest_clients(self) -> QtestClients | None:
        """The clients, if a successor goes on with them."""
        return self._clients if self.moves else None

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve clients until cancelled, or the only one leaves."""
        clients = trio.CancelScope(shield=True)
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._serve_clients, clients)
                try:
                    await self._monitor.serve(task_status=task_status)
                finally:
                    clients.cancel()
        finally:
            self.close()

    async def _serve_clients(self, scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
        with scope:
            await self._clients.serve(task_status=task_status)

    def close(self) -> None:
        """Close all that it owns, for one that is never served; `serve` does it at its end. Idempotent."""
        self._monitor.close()
        self._clients.close()
        self._log.close()

    # Live update.

    def descriptors(self) -> dict[str, int]:
        """Return what a successor needs, by the last part of its name."""
        log = {} if self._log.fd is None else {"log": self._log.fd}
        return log | (self._clients.descriptors() if self.moves else {})

    def hold(self) -> None:
        """Accept nobody, and carry out nothing, from now on."""
        self._monitor.hold()
        if self.moves:
            self._clients.hold()

    def go_on(self) -> None:
        """Accept again, and take up the clients that have come."""
        self._monitor.go_on()
        self._clients.go_on()

    def give_up(self) -> None:
        """Leave listener, clients and log to the successor."""
        self._monitor.give_up()
        if self.moves:
            self._clients.give_up()
            self._log.close()
