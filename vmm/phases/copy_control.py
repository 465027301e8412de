"""What steers a migration that copies the guest: the facets of its tokens, and who hears how it goes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, final

import trio

from vmm.errors import CprRefused, InvalidState, MigrationRefused
from vmm.migration.convergence import Convergence

if TYPE_CHECKING:
    from vmm.cpr.cell import OwnershipCell
    from vmm.migration.connection import Connection
    from vmm.migration.page_server import PageServer
    from vmm.migration.status import MigrationProgress
    from vmm.phases.migration_state import MigrationState
    from vmm.phases.throttle import Throttle


@final
class Claim:
    """Whose a guest is that is being copied: this process's, until it is offered.

    Where both processes share an ownership cell the destination takes what is offered by itself. Elsewhere it has to be
    told, and nothing is offered.
    """

    def __init__(self) -> None:
        self._cell: OwnershipCell | None = None
        self._gone = False

    def share(self, fd: int) -> None:
        """Have a cell, of which the destination sent this descriptor; it is the cell's. Raises `VmmError`."""
        from vmm.cpr.cell import OwnershipCell  # Needed on one host alone.

        self._cell = OwnershipCell.adopt(fd, ours=True)

    @property
    def is_shared(self) -> bool:
        """Whether there is a cell."""
        return self._cell is not None

    def offer(self) -> None:
        """Let the destination take the guest, where that can be. Raises `MigrationRefused`: it has done so unasked."""
        if self._cell is None:
            return
        try:
            self._cell.offer()
        except CprRefused as error:
            raise MigrationRefused(reason=f"Refused by the source: {error.reason}") from error

    def keep(self) -> bool:
        """End the offer; return whether the guest is this process's, and so stays that. False: it was taken."""
        if self._cell is not None and not self._gone:
            # Once and for all: a peer may go on to write what it likes.
            self._gone = not (self._cell.ours or self._cell.take_back())
        return not self._gone

    def close(self) -> None:
        """Give the cell up. Idempotent."""
        if self._cell is not None:
            self._cell.close()


@final
class Canceller:
    """The facet of `may-cancel-migration`."""

    def __init__(self, claim: Claim) -> None:
        self._claim: Final = claim
        self.scope: Final = trio.CancelScope()
        self.let_go = False
        """Whether the guest is the destination's: nothing can be called off any more."""

    def cancel(self, by: str) -> None:
        """Call the migration off, unless the guest has been let go."""
        if not self.let_go and self._claim.keep():
            self.scope.cancel()


@final
class Gate:
    """The facet of `may-switch-over`: where a migration waits with the guest stopped and its state not yet read."""

    def __init__(self) -> None:
        self._opened: trio.Event | None = None

    async def wait(self) -> None:
        """Wait until somebody lets it go on."""
        self._opened = trio.Event()
        await self._opened.wait()
        self._opened = None

    def go_on(self) -> None:
        """Let it go on. Raises `InvalidState` where it does not wait."""
        if self._opened is None:
            raise InvalidState(
                what="migrate-continue",
                state="while the migration does not wait",
                instead="wait until query-migrate says pre-switchover, which it does with pause-before-switchover on",
            )
        self._opened.set()


@final
class Steering:
    """The facet of `may-steer-postcopy` before the guest has gone."""

    def __init__(self, *, possible: bool, preempts: bool) -> None:
        self.possible: Final = possible
        self.preempts: Final = preempts
        """Whether pages that are asked for go over a channel of their own."""
        self.urgent: Connection | None = None
        """That channel."""
        self.wanted = False
        """Whether the guest is to run at the destination as soon as may be."""
        self.watch: Watch | None = None
        self.identity: Final = os.urandom(16) if possible else b""
        """Names the migration."""
        self.server: PageServer | None = None
        """Who has the pages that have not gone, once the guest has."""

    def close(self) -> None:
        """Close the further channel, if there is one."""
        if self.urgent is not None:
            self.urgent.close()

    def start(self) -> None:
        """End the passes."""
        if not self.possible:
            raise MigrationRefused(
                reason="migrate-start-postcopy: the migration has begun without postcopy-ram, which comes before"
            )
        self.wanted = True
        if self.watch is not None:
            self.watch.hurries = True

    def pause(self) -> None:
        """Refuse."""
        raise MigrationRefused(reason="migrate-pause: no postcopy is under way; migrate_cancel ends the migration")

    async def recover(self, address: object) -> None:
        """Refuse."""
        await trio.lowlevel.checkpoint()
        raise MigrationRefused(reason="migrate-recover: no postcopy is under way, and it is for the destination of one")


@final
class Watch:
    """Hears from the thread that sends how it goes, and tells whoever asks."""

    def __init__(self, progress: MigrationProgress, migration: MigrationState, throttle: Throttle, vcpus: int) -> None:
        self._progress: Final = progress
        modes = [mode for mode in ("auto-converge", "dirty-limit") if migration.capabilities[mode]]
        self._convergence: Final = Convergence(
            modes[0] if modes else None, migration.parameters.values, vcpus, throttle.set
        )
        self._migration: Final = migration
        self._loop: Final = trio.lowlevel.current_trio_token()
        self.hurries = False
        """Whether the passes are to end now."""
        progress.expected_downtime = int(migration.parameters.values["downtime-limit"])

    def passed(self, number: int) -> None:
        """Tell that pass `number` begins."""
        self._loop.run_sync_soon(self._migration.tell_pass, number)

    def expects(self, downtime: float) -> None:
        """Note the pause that is expected, in ms."""
        self._progress.expected_downtime = round(downtime)

    def after_pass(self, sent: int, dirtied: int, seconds: float) -> None:
        """Note that another pass is needed: slow the guest down, where that is wanted."""
        self._convergence.after_pass(sent, dirtied, seconds)
