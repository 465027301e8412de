"""A migration that somebody watches at a terminal: shown, and called off by Ctrl-C."""

from __future__ import annotations

import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar, final

import trio

from vmm.cli_progress import Figures
from vmm.errors import VmmError, leaves
from vmm.qmp_client import CommandFailed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

    from vmm.cli_progress import Bar
    from vmm.qmp_client import QmpClient

ResultT = TypeVar("ResultT")

OVER: Final = ("completed", "failed", "cancelled")

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@final
class Interrupted(VmmError):
    """A signal ended what was under way."""

    text: ClassVar[str] = "{what} was interrupted: {outcome}"
    what: str
    outcome: str


@final
class Interruption:
    """Somebody wants what is under way to be called off."""

    def __init__(self) -> None:
        self.number = 0
        """The signal that said so; 0 before."""
        self._wait: trio.CancelScope | None = None

    @property
    def came(self) -> bool:
        """Whether somebody has said so."""
        return bool(self.number)

    def told(self, error: Interrupted) -> int:
        """Tell the user what came of it, and return the exit status of a process that a signal has ended."""
        print(f"trio-vmm: {error}", file=sys.stderr)
        return 128 + self.number

    def comes(self, number: int = signal.SIGINT) -> None:
        """Note it, and end a wait for something else."""
        self.number = number
        if self._wait is not None:
            self._wait.cancel()

    @contextmanager
    def ends_wait(self, wanted: bool) -> Generator[None, None, None]:
        """Leave the block when it comes, if that is `wanted`."""
        with trio.CancelScope() as scope:
            self._wait = scope if wanted else None
            try:
                yield
            finally:
                self._wait = None


async def interruptible(what: str, work: Callable[[], Awaitable[ResultT]], interruption: Interruption) -> ResultT:
    """Run `work`, and tell `interruption` of a signal. A second one ends `work`.

    Raises:
        VmmError: what `work` raises, alone.
        Interrupted: it was ended. `what` is how its text begins.
    """
    results: list[ResultT] = []
    failure: VmmError | None = None
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(note_signals, interruption, nursery.cancel_scope)
            results.append(await work())
            nursery.cancel_scope.cancel()
    except* VmmError as group:
        failure = next(error for error in leaves(group) if isinstance(error, VmmError))
    if failure is not None:
        raise failure
    if not results:
        outcome = "what comes of it is not known here; query-migrate on the machine's monitor tells"
        raise Interrupted(what=what, outcome=outcome)
    return results[0]


async def note_signals(
    interruption: Interruption, insistence: trio.CancelScope, *, task_status: trio.TaskStatus[None]
) -> None:
    """Tell `interruption` of the first signal, and cancel `insistence` at the second."""
    with trio.open_signal_receiver(*_SIGNALS) as signals:
        task_status.started()
        async for number in signals:
            if interruption.came:
                insistence.cancel()
            interruption.comes(number)


async def outcome(client: QmpClient, interruption: Interruption, bar: Bar) -> dict[str, Any]:
    """Show a migration that is under way until it is over; return what `query-migrate` says then.

    An interruption calls it off. Where that cannot be, it is said, and the migration goes on.

    Raises:
        CommandFailed, MonitorGone: the machine does not tell any more.
    """
    called_off = False
    while True:
        info: dict[str, Any] = await client.execute("query-migrate")
        if info["status"] in OVER:
            return info
        bar.show(Figures.of(info))
        if interruption.came and not called_off:
            called_off = True
            try:
                await client.execute("migrate_cancel")
            except CommandFailed as error:
                bar.say(f"it cannot be called off: {error.desc}")
            continue
        with trio.move_on_after(bar.period), interruption.ends_wait(not called_off):
            await client.wait_event(lambda event: event["event"] == "MIGRATION")
