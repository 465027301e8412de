"""Where an incoming live update is awaited: bound in precreate, before there is a machine."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, final

import trio

from vmm.errors import InvalidState, MigrationRefused, VmmError, leaves

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from vmm.capabilities import HostResources
    from vmm.migration.channel import Channel
    from vmm.migration.connect import Listener
    from vmm.migration.status import MigrationProgress
    from vmm.nursery_tree import Phase
    from vmm.phases.fd_receive import Arrival
    from vmm.phases.foundation import Host
    from vmm.phases.migration_state import MigrationState


@final
class IncomingPort:
    """The facet of `may-listen`, and what came of it."""

    def __init__(self, precreate: Phase, host: Host, migration: MigrationState) -> None:
        self._precreate = precreate
        self._host = host
        self._migration = migration
        self._listeners: Final[list[Listener]] = []
        self.main: Listener | None = None
        self.progress: MigrationProgress | None = None
        self.awaits_cpr = False
        """Whether a CPR channel is bound and nothing has arrived yet."""
        self.arrival: Arrival | None = None

    async def listen(self, channels: Sequence[Channel]) -> None:
        """Bind the channels, and await CPR state in a task beside precreate.

        Raises:
            MigrationRefused: the channels make no incoming live update, or one is awaited already.
        """
        if self.progress is not None:
            raise MigrationRefused(reason="migrate-incoming: channels are bound already; query-migrate shows them")
        if self._precreate.tree.machine_phase != "no-machine":
            raise InvalidState(
                what="migrate-incoming",
                state="once the machine is defined: its recipe comes with the live update",
                instead="await it in precreate, before machine-set",
            )
        by_type = {channel.channel_type: channel for channel in channels}
        if len(by_type) < len(channels):
            raise MigrationRefused(reason="migrate-incoming: two channels of one type; give one of each")
        if set(by_type) != {"main", "cpr"}:
            given = ", ".join(sorted(by_type)) or "none"
            raise MigrationRefused(
                reason="migrate-incoming: a live update needs one channel of type main and one of type cpr; "
                f"given: {given}"
            )
        # Only now: most machines await nothing, and both bring what a monitor can start without.
        from vmm.migration.connect import listen
        from vmm.phases.fd_receive import run_fd_receive

        bound: dict[str, Listener] = {}
        try:
            for kind, channel in by_type.items():
                bound[kind] = await listen(channel.address)
        except BaseException:
            for listener in bound.values():
                listener.close()
            raise
        self.main = bound["main"]
        self.awaits_cpr = True
        self.progress = self._migration.begin("target")
        self.progress.addresses = tuple(listener.address for listener in bound.values())
        residents = self._precreate.residents
        await residents.start("migration listeners", self._hold, tuple(bound.values()))
        await residents.start("fd_receive", run_fd_receive, self._precreate, self._host, self, bound["cpr"])

    async def _hold(
        self, listeners: Sequence[Listener], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        try:
            task_status.started()
            await trio.sleep_forever()
        finally:
            for listener in listeners:
                listener.close()

    @asynccontextmanager
    async def telling_the_source(self) -> AsyncGenerator[None, None]:
        """Tell a source that waits why its machine could not be built, or taken over, here."""
        try:
            yield
        except* VmmError as group:
            if self.arrival is not None:
                await self.arrival.refuse(next(error for error in leaves(group) if isinstance(error, VmmError)))
            raise

    def resources(self) -> HostResources:
        """Where the machine's host resources come from."""
        return self.arrival.inheritance if self.arrival is not None else self._host.files

    def require_no_cpr_wait(self, what: str) -> None:
        """Raise `InvalidState` while CPR state is awaited: the machine will come from there."""
        if self.awaits_cpr:
            raise InvalidState(
                what=what,
                state="while a CPR channel is awaited: the recipe comes from the source",
                instead="issue migrate on the source, or quit",
            )

    def arrived(self, arrival: Arrival) -> None:
        """Note what came over the CPR channel."""
        self.awaits_cpr = False
        self.arrival = arrival
