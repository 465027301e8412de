"""qtest as an object: a socket whose clients drive the machine's ports, memory, interrupt lines and clock.

It is there from the beginning, like a monitor. Each of its clients' lines is lent `may-inject` for as long as it is
carried out, by whichever open phase grants it; in a phase that does not, the line is answered with the reason.

A machine with KVM can be handed to another process with it: the listener and the log go over, clients do not.
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
from vmm.qtest.session import QtestSession

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.backends.chardev import Chardev
    from vmm.monitor.ports import Transport
    from vmm.nursery_tree import Tree
    from vmm.outside import OutsideAccess

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
        self._start: Final = time.monotonic()

    def note(self, kind: str, line: str) -> None:
        """Write a line. After an error the rest is not logged, and the operator told."""
        if self.fd is None:
            return
        record = f"[{kind} +{time.monotonic() - self._start:f}] {line}\n".encode()
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

        def make(name: str, transport: Transport) -> QtestSession:
            return QtestSession(name, transport, lender, log)

        self._monitor: Final = over_chardev(SocketMonitor(name, make, complain), chardev, held=held)
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

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve clients until cancelled, or the only one leaves."""
        try:
            await self._monitor.serve(task_status=task_status)
        finally:
            self._log.close()

    def close(self) -> None:
        """Close all that it owns, for one that is never served; `serve` does it at its end. Idempotent."""
        self._monitor.close()
        self._log.close()

    # Live update.

    def descriptors(self) -> dict[str, int]:
        """Return what a successor needs, by the last part of its name."""
        return {} if self._log.fd is None else {"log": self._log.fd}

    def hold(self) -> None:
        """Accept nobody from now on."""
        self._monitor.hold()

    def go_on(self) -> None:
        """Accept again."""
        self._monitor.go_on()

    def give_up(self) -> None:
        """Leave the listener to the successor."""
        self._monitor.give_up()
