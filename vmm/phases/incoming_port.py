"""Where a live update or a state stream is awaited: bound in precreate, or later."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, ClassVar, Final, final

import trio

from vmm.errors import InvalidState, MigrationRefused, OptionInvalid, Unsupported, VmmError
from vmm.migration.status import MigrationStatus
from vmm.phases.differences import FIXED
from vmm.phases.host_resources import owners
from vmm.phases.imports import compile_codecs, import_the_rest
from vmm.phases.stream_port import StreamPort, settled

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Collection, Iterable, Sequence

    from vmm.capabilities import HostResources
    from vmm.hw.codec import Codecs
    from vmm.migration.channel import Channel
    from vmm.migration.connect import Listener
    from vmm.migration.status import MigrationProgress
    from vmm.nursery_tree import Phase
    from vmm.phases.arriving import Arriving
    from vmm.phases.differences import Difference
    from vmm.phases.fd_receive import Arrival
    from vmm.phases.foundation import Host
    from vmm.phases.migration_state import MigrationState, Wishes
    from vmm.recipe import Recipe
    from vmm.residents import Resident


@final
class IncomingPort:
    """The facet of `may-listen`, and what came of it."""

    what: ClassVar[str] = "An incoming migration"
    phase: ClassVar[str] = "precreate"

    def __init__(self, precreate: Phase, host: Host, migration: MigrationState) -> None:
        self._precreate = precreate
        self._host = host
        self._migration = migration
        self.tree: Final = precreate.tree
        self._listeners: Final[list[Listener]] = []
        self.main: Listener | None = None
        self.streams: Final = StreamPort(precreate, host, migration, self)
        """For a guest that is copied."""
        self.codecs: Codecs | None = None
        """For the state of a machine that comes by a live update, which were compiled while it was awaited."""
        self.progress: MigrationProgress | None = None
        self.awaits_cpr = False
        """Whether a CPR channel is bound and nothing has arrived yet."""
        self.arrival: Arrival | None = None
        self.differences: tuple[Difference, ...] = ()
        """In what the machine here differs from the one that asked for admission last."""
        self.allowed: Final[set[str]] = set()
        """Names of differences that are admitted though the guest could tell; of the next guest alone."""
        self.resources_here: Final[dict[str, str]] = {}
        """What of this host a machine that comes in may have, by the resource's name; see `vmm.phases.arriving`."""
        self._residents: Final[list[Resident]] = []
        """Who holds the bound sockets of a live update, and who awaits its source."""

    async def listen(
        self, channels: Sequence[Channel], *, exit_on_error: bool = True, wishes: Wishes
    ) -> Awaitable[None]:
        """Bind the channels, and await what comes in a task beside precreate.

        Raises:
            MigrationRefused: the channels make nothing that can come in, or something is awaited already.
        """
        self.require_idle()
        # Only now: most machines await nothing. What comes is to be built without a wait.
        await import_the_rest(self._host.table)
        if self.codecs is None and len(channels) > 1:
            self.codecs = await compile_codecs()
        self.require_idle()
        with self._migration.attempt("target", wishes):
            if [channel.channel_type for channel in channels] == ["main"]:
                await self.streams.listen(channels[0].address, exit_on_error=exit_on_error)
                return settled()
            if not exit_on_error:
                instead = "leave it true: a destination whose source was refused has nothing to go on with"
                raise Unsupported(what="exit-on-error of a live update", name="false", instead=instead)
            await self._listen_for_update(channels)
            return settled()

    def require_idle(self) -> None:
        """Raise `MigrationRefused` if something is awaited, or coming in."""
        if self.progress is not None and self.progress.under_way:
            raise MigrationRefused(reason="migrate-incoming: channels are bound already; query-migrate shows them")

    def brings_recipe(self) -> bool:
        """Say whether a recipe that came in is being replayed."""
        return self.arrival is not None or self.streams.replays()

    def leads_to(self) -> str:
        """Return the phase in which a machine that is complete finds itself."""
        return "running" if self.streams.wait is None and self.arrival is None else "incoming"

    async def _listen_for_update(self, channels: Sequence[Channel]) -> None:
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
                reason="migrate-incoming: give a channel of type main, and for a live update one of type cpr besides; "
                f"given: {given}"
            )
        # Likewise: imported by now, and not needed where nothing is awaited.
        from vmm.migration.address import ExecAddress, FileAddress
        from vmm.migration.connect import listen
        from vmm.phases.fd_receive import run_fd_receive

        bound: dict[str, Listener] = {}
        try:
            for kind, channel in by_type.items():
                if isinstance(channel.address, ExecAddress | FileAddress):
                    reason = (
                        f"migrate-incoming: the {kind} channel of a live update must be a socket, "
                        f"not {channel.address.what}"
                    )
                    raise MigrationRefused(reason=reason)
                bound[kind] = await listen(channel.address)
        except BaseException:
            for listener in bound.values():
                listener.close()
            raise
        self.main = bound["main"]
        self.awaits_cpr = True
        self.progress = self._migration.begin("target")
        self.progress.addresses = tuple(listener.address for listener in bound.values())
        self._host.overrides.begin()
        residents = self._precreate.residents
        hold = await residents.start("migration listeners", self._hold, tuple(bound.values()))
        receive = await residents.start("fd_receive", run_fd_receive, self._precreate, self._host, self, bound["cpr"])
        self._residents.extend((hold, receive))

    async def abandon(self) -> None:
        """Give the CPR channel up: unbind, forget what was noted, and let the machine be made here.

        A source that is being asked what it has finds the channel closed.

        Raises:
            InvalidState: no CPR channel is awaited, or a machine has arrived over it.
        """
        await trio.lowlevel.checkpoint()
        if not self.awaits_cpr:
            state = (
                "when no CPR channel is awaited" if self.arrival is None else "once the source's machine has arrived"
            )
            raise InvalidState(what="x-cpr-abandon", state=state, instead="query-migrate says what is under way")
        self.awaits_cpr = False
        self._host.overrides.end()
        self.allowed.clear()
        self.differences = ()
        while self._residents:
            await self._residents.pop().leave()
        self.main = None
        assert self.progress is not None
        self.progress.advance(MigrationStatus.CANCELLING)
        self.progress.advance(MigrationStatus.CANCELLED)

    async def unbind(self) -> None:
        """The guest is here: keep nothing of what it came in on."""
        await self._residents.pop(0).leave()

    def allow(self, names: Iterable[str]) -> None:
        """Admit differences by name. Raises `OptionInvalid`, having admitted none, for one that cannot be."""
        wanted = set(names)
        for name in sorted(wanted & FIXED):
            raise OptionInvalid(
                option="x-allow-difference",
                value=name,
                wanted="a difference that can be: the guest's state has its shape",
            )
        self.allowed.update(wanted)

    def allow_resource(self, name: str, where: str) -> None:
        """Let a machine that comes in have host resource `name`: at a path, as `fd:N`, or where its recipe says."""
        self.resources_here[name] = where

    def consider(
        self,
        source: Recipe,
        sent: Collection[str],
        cpu: object = None,
        sections: object = None,
        *,
        live: bool = False,
    ) -> Arriving:
        """Check a recipe that came, and what was `sent` with it; nothing is carried out yet.

        Args:
            cpu: what the source said of its processor (`vmm.phases.cpu_differences`); None where it said nothing.
            sections: what it said that it will send (`vmm.phases.section_kinds`); likewise.
            live: whether it is a live update.

        Raises:
            VmmError: why it is not admitted.
        """
        from vmm.phases.arriving import arrive
        from vmm.phases.cpu_differences import compare_cpus

        host = self._host
        self.differences = ()
        came = owners(sent)
        here = {name: path for name, path in self.resources_here.items() if name not in came}
        arriving = arrive(source, host.table, host.overrides.recipe(), here, live=live)
        if cpu is not None:
            # By the source's own recipe: what an override changes is an item of its own.
            arriving = arriving.with_more(compare_cpus(cpu, source))
        self.differences = arriving.differences
        if sections is not None:
            from vmm.phases.section_kinds import require_readable

            require_readable(sections)
        arriving.require_same_guest(self.allowed)
        arriving.require_resources(sent)
        return arriving

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
        except* (VmmError, OSError, MemoryError) as group:
            if self.arrival is None:
                raise
            failure = self.arrival.channel.blame(group)
            await self.arrival.refuse(failure)
            raise failure from group

    def resources(self) -> HostResources:
        """Where the machine's host resources come from."""
        return self.arrival.inheritance if self.arrival is not None else self._host.files

    def require_no_cpr_wait(self, what: str) -> None:
        """Raise `InvalidState` while CPR state is awaited: the machine will come from there."""
        if self.awaits_cpr:
            raise InvalidState(
                what=what,
                state="while a CPR channel is awaited: the recipe comes from the source",
                instead="issue migrate on the source, or give the channel up (x-cpr-abandon)",
            )

    def arrived(self, arrival: Arrival) -> None:
        """Note what came over the CPR channel."""
        self.awaits_cpr = False
        self._host.overrides.end()
        self.allowed.clear()
        self.arrival = arrival
