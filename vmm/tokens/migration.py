"""What may be done to have a guest go elsewhere, or come: the tokens of a migration and of a live update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol, final

from vmm.facets import (
    Cancellable,
    Configurator,
    Departure,
    DescriptorSender,
    DirtyPages,
    OwnershipOffer,
    PostcopyControl,
    Settings,
    Switchover,
)
from vmm.tokens.mechanism import Token

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable, Mapping, Sequence


@final
class MaySetMigrationCap(Token[Settings]):
    """May turn migration capabilities on and off."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-set-migration-cap"

    def update(self, changes: Mapping[str, bool]) -> None:
        """Set the named migration capabilities, all or none."""
        self._reach().update(changes)


@final
class MaySetMigrationParam(Token[Settings]):
    """May set migration parameters."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-set-migration-param"

    def update(self, changes: Mapping[str, Any]) -> None:
        """Set the named migration parameters, all or none."""
        self._reach().update(changes)


class IncomingPort(Protocol):
    """Where an incoming migration is awaited."""

    async def listen(self, channels: Sequence[Any], *, exit_on_error: bool, wishes: Any) -> Awaitable[None]:
        """Bind every channel, then return what settles when that has led where it leads in this phase.

        `MigrationRefused` where one is bound already.
        """
        ...

    async def abandon(self) -> None:
        """Give a bound CPR channel up. `InvalidState` where none is awaited."""
        ...

    def allow(self, names: Iterable[str]) -> None:
        """Let the machine here differ from the source's in what is called so."""
        ...

    def allow_resource(self, name: str, where: str) -> None:
        """Let a machine that comes in have this host resource."""
        ...


@final
class MayListen(Token[IncomingPort]):
    """May bind the addresses on which an incoming migration is awaited, and say what may come in there."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-listen"

    async def listen(self, channels: Sequence[Any], *, exit_on_error: bool, wishes: Any) -> Awaitable[None]:
        """Bind `channels`; their real addresses are in `query-migrate` afterwards. Then move on, where that leads on.

        `exit_on_error`: whether this process ends if what comes in is refused.
        """
        return await self._reach().listen(channels, exit_on_error=exit_on_error, wishes=wishes)

    async def abandon(self) -> None:
        """Give a bound CPR channel up, with all that was noted for the machine that would have come."""
        await self._reach().abandon()

    def allow(self, names: Iterable[str]) -> None:
        """Let the machine here differ from the source's in `names`, though its guest could tell."""
        self._reach().allow(names)

    def allow_resource(self, name: str, where: str) -> None:
        """Let a machine that comes in have host resource `name`, for which no descriptor comes with it."""
        self._reach().allow_resource(name, where)


@final
class MayStartMigration(Token[Departure]):
    """May start an outgoing migration or live update, and measure or limit what a guest writes."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-start-migration"

    def start(self, plan: Any) -> Awaitable[None]:
        """Post `plan` to phase running."""
        return self._reach().start(plan)

    async def check(self, plan: Any) -> Mapping[str, Any]:
        """Ask the other side of `plan` what would become of the machine there. The guest does not notice."""
        return await self._reach().check(plan)

    def limit(self, index: int | None, quota: int) -> None:
        """Limit how fast a vCPU writes to memory, or with None each of them, in MiB a second; 0 ends it."""
        self._reach().limit(index, quota)

    def measure(self, wanted: Any) -> None:
        """Begin to measure how fast the guest writes. Nothing of the guest changes."""
        self._reach().measure(wanted)

    def undo(self) -> Awaitable[None]:
        """Post the guest's return to the process that it came from, which is kept ready for that."""
        return self._reach().undo()

    def forget(self) -> None:
        """Let that process end: the guest does not go back there."""
        self._reach().forget()


@final
class MayCancelMigration(Token[Cancellable]):
    """May call off a migration that is under way."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-cancel-migration"

    def cancel(self, by: str) -> None:
        """Call the migration off."""
        self._reach().cancel(by)


@final
class MaySwitchOver(Token[Switchover]):
    """May let a migration go on that waits before its switchover."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-switch-over"

    def go_on(self) -> None:
        """Let it go on."""
        self._reach().go_on()


@final
class MaySteerPostcopy(Token[PostcopyControl]):
    """May have a guest run at its destination before all of its RAM is there, and mend what breaks then."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-steer-postcopy"

    def start(self) -> None:
        """Have the guest run there as soon as may be."""
        self._reach().start()

    def pause(self) -> None:
        """Break the connection."""
        self._reach().pause()

    async def recover(self, address: Any) -> None:
        """Listen at `address` for the source, after a break."""
        await self._reach().recover(address)


@final
class MaySendDescriptors(Token[DescriptorSender]):
    """May send this process's descriptors to a successor."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-send-descriptors"

    async def send(self, kind: str, body: Mapping[str, Any], descriptors: Mapping[str, int]) -> None:
        """Send message `kind` with `body` and `descriptors` over the CPR channel."""
        await self._reach().send(kind, body, descriptors)


@final
class MayReadDirtyLog(Token[DirtyPages]):
    """May find out what the guest writes; exists only while a migration is under way."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-read-dirty-log"

    def start(self) -> None:
        """Begin: what is written from here on is collected."""
        self._reach().start()

    def stop(self) -> None:
        """End. Without effect where it is off."""
        self._reach().stop()

    def collect(self, into: Any) -> None:
        """Put every page into a set of pages that was written since the last call."""
        self._reach().collect(into)

    def protect(self, first: int, pages: int) -> None:
        """Note that these pages are about to be read."""
        self._reach().protect(first, pages)


@final
class MayReleaseGuest(Token[OwnershipOffer]):
    """May give the guest away."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-release-guest"

    def offer(self) -> None:
        """Offer the guest to the successor."""
        self._reach().offer()

    def take_back(self) -> bool:
        """Take an offer back; False where the successor has taken the guest."""
        return self._reach().take_back()


@final
class MayResumeHere(Token[Configurator]):
    """May run the guest here again that was migrated by copying it: it is whole, and stands where it stood."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-resume-here"

    def decide(self) -> Awaitable[None]:
        """Run the guest here. That it does not run where it went, too, is for the caller to know."""
        return self._reach().decide(None)
