"""Tokens: what the open phases allow, as objects to be passed on.

A token is the only route to the facet that it stands for. A function that has an effect takes the token for it as
a parameter; without one there is nothing to call, and after the phase's window has closed the token leads nowhere
(`TokenRevoked`). The set of kinds is closed: it is this module. `vmm.nursery_tree` mints them and nobody else does.

Tokens stop mistakes and make authority reviewable. They do not hold hostile code in the process: that takes seccomp
and landlock (docs/tokens.md).

Of the four things that English calls capability, this module has the first; a *migration capability*, a *QMP
capability* and a *KVM extension* are always called by their whole name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, NoReturn, Protocol, TypeVar, final

from vmm.errors import TokenOutOfScope, TokenRevoked
from vmm.facets import (
    BackendSink,
    Board,
    Cancellable,
    Configurator,
    Departure,
    DescriptorSender,
    DescriptorSets,
    DirtyPages,
    GuestRam,
    JobKeeper,
    MemoryMap,
    NumaNodes,
    OwnershipOffer,
    PostcopyControl,
    RecipeSink,
    RunControl,
    Settings,
    StateIndex,
    StateSink,
    StateSource,
    Switchover,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
    from typing import Self

    from vmm.facets import CheckedSections
    from vmm.outside import OutsideAccess

FacetT = TypeVar("FacetT")
FacetT_co = TypeVar("FacetT_co", covariant=True)
TokenT = TypeVar("TokenT", bound="Token[Any]")
ViewT = TypeVar("ViewT")
ResultT = TypeVar("ResultT")


# --- the mechanism ----------------------------------------------------------------------------------------


@final
class _MintKey:
    """Held by mints. A type checker refuses the construction of a token without it."""

    __slots__ = ()


_MINT_KEY: Final = _MintKey()


@final
class Cell(Generic[FacetT_co]):
    """The revocable link between the tokens of one window and a facet."""

    __slots__ = ("_facet", "window")

    def __init__(self, facet: FacetT_co, window: str) -> None:
        self._facet: FacetT_co | None = facet
        self.window = window

    def facet(self, kind: str) -> FacetT_co:
        """Return the facet, or raise `TokenRevoked`."""
        if self._facet is None:
            raise TokenRevoked(kind=kind, window=self.window)
        return self._facet

    def revoke(self) -> None:
        """Cut the link, for every token that shares this cell."""
        self._facet = None


class Token(Generic[FacetT_co]):
    """Base of all tokens. Cannot be copied, pickled, widened, or subclassed outside this module."""

    __slots__ = ("__weakref__", "_cell", "scope")
    wire_name: ClassVar[str]

    def __init__(self, key: _MintKey, cell: Cell[FacetT_co], scope: frozenset[str] | None) -> None:
        if key is not _MINT_KEY:
            raise TypeError(f"{type(self).__name__} is minted by a phase's window only")
        self._cell = cell
        self.scope: Final = scope
        """The names that the token covers; None means all."""

    def __init_subclass__(cls) -> None:
        if cls.__module__ != __name__:
            raise TypeError(f"token kinds form a closed set: declare {cls.__name__} in {__name__}")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(f"{self.wire_name} cannot be copied or sent elsewhere")

    def __repr__(self) -> str:
        scope = "" if self.scope is None else f" for {', '.join(sorted(self.scope))}"
        return f"<{self.wire_name} of {self._cell.window}{scope}>"

    @property
    def window(self) -> str:
        """Path of the phase whose window minted this token."""
        return self._cell.window

    def covers(self, name: str | None) -> bool:
        """Say whether the token may be used for `name` (None: for something that has no name)."""
        return self.scope is None or name in self.scope

    def only(self, *names: str) -> Self:
        """Return a token for `names` alone. Never wider than this one; revoked together with it."""
        wanted = frozenset(names)
        return type(self)(_MINT_KEY, self._cell, wanted if self.scope is None else wanted & self.scope)

    def _reach(self, name: str | None = None) -> FacetT_co:
        if self.scope is not None and name not in self.scope:
            scope = ", ".join(sorted(self.scope)) or "nothing"
            raise TokenOutOfScope(kind=self.wire_name, window=self.window, scope=scope, wanted=str(name))
        return self._cell.facet(self.wire_name)


AnyToken = Token[Any]


@final
class Mint:
    """Makes the tokens of one window, and takes all of them back at once.

    Minting confers nothing by itself: a token leads to the facet that it was minted for, and the minter had to hold
    that facet already.
    """

    def __init__(self, window: str) -> None:
        self.window: Final = window
        self._cells: list[Cell[Any]] = []

    def __call__(
        self,
        kind: Callable[[_MintKey, Cell[FacetT], frozenset[str] | None], TokenT],
        facet: FacetT,
        *,
        only: frozenset[str] | None = None,
    ) -> TokenT:
        """Mint a token of `kind` over `facet`, narrowed to `only` where given."""
        cell = Cell(facet, self.window)
        self._cells.append(cell)
        return kind(_MINT_KEY, cell, only)

    def revoke_all(self) -> None:
        """Cut every token minted here off its facet."""
        for cell in self._cells:
            cell.revoke()


# --- kinds that the boot phase grants ------------------------------------------------------------------------


class Views(Protocol):
    """Read-only views that the open phases have published, by class."""

    def view(self, kind: type[ViewT]) -> ViewT:
        """Return the view of class `kind`; `DeviceNotActive` where no open phase has one."""
        ...


@final
class MayQuery(Token[Views]):
    """May read what the machine shows of itself."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-query"

    def view(self, kind: type[ViewT]) -> ViewT:
        """Return the published view of class `kind`."""
        return self._reach().view(kind)


class Ender(Protocol):
    """Ends the machine's process."""

    def end(self, cause: str) -> None:
        """Begin the end; returns at once."""
        ...


@final
class MayQuit(Token[Ender]):
    """May end this process."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-quit"

    def end(self, cause: str) -> None:
        """Ask the innermost phase to end, and so all of them. `cause` is a QAPI ShutdownCause."""
        self._reach().end(cause)


@final
class MayDismissJob(Token[JobKeeper]):
    """May forget jobs that have concluded."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-dismiss-job"

    def dismiss(self, name: str) -> None:
        """Forget job `name`. `BackendNotFound`, or `InvalidState` while it has not concluded."""
        self._reach().dismiss(name)


@final
class MayAddDescriptor(Token[DescriptorSets]):
    """May keep descriptors that a client sent."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-add-descriptor"

    def add(self, fd: int, fdset_id: int | None, opaque: str | None) -> tuple[int, int]:
        """Take over `fd` into set `fdset_id` (None: a new one); return that, and the number by which `fd` is known."""
        return self._reach().add(fd, fdset_id, opaque)

    def remove(self, fdset_id: int, fd: int | None) -> None:
        """Close descriptor `fd` of a set, or the whole set."""
        self._reach().remove(fdset_id, fd)


@final
class MayCreateBackend(Token[BackendSink]):
    """May add and remove host-side back ends of the families it is narrowed to (`chardev`, `monitor`, ...)."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-create-backend"

    async def adopt(self, family: str, name: str, backend: Any) -> None:
        """Start `backend` and register it under `name` in `family`."""
        await self._reach(family).adopt(family, name, backend)

    async def dismiss(self, family: str, name: str) -> None:
        """End and forget back end `name` of `family`."""
        await self._reach(family).dismiss(family, name)


class HostResources(Protocol):
    """Where a recipe's host resources come from: the host itself, or a predecessor's descriptors."""

    def obtain(self, name: str, opener: Callable[[], int]) -> int:
        """Return an open descriptor, which is the caller's from here on. `name` is unique in the machine."""
        ...

    def names(self, prefix: str) -> Sequence[str] | None:
        """Return the names below `prefix` that a predecessor sent; None where they are to be opened here."""
        ...

    def inherits(self) -> bool:
        """Say whether there is a predecessor, who still uses what the machine is made of."""
        ...


class _ObtainsDescriptors(Token[HostResources]):
    __slots__ = ()

    def obtain(self, name: str, opener: Callable[[], int]) -> int:
        """Return the descriptor of host resource `name`: opened by `opener`, or claimed from the predecessor."""
        return self._reach().obtain(name, opener)

    def names(self, prefix: str) -> Sequence[str] | None:
        """Return the names below `prefix` that a predecessor sent; None where they are to be opened here."""
        return self._reach().names(prefix)

    @property
    def inherits(self) -> bool:
        """Whether there is a predecessor, so that what is made here begins at rest."""
        return self._reach().inherits()


@final
class MayOpenHostFile(_ObtainsDescriptors):
    """May open files and sockets of the host, by path."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-open-host-file"


@final
class MayAdoptDescriptor(_ObtainsDescriptors):
    """May claim the descriptors that a predecessor sent. Lent to the replay of an incoming recipe alone."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-adopt-descriptor"


# --- kinds of the phases that build a machine -----------------------------------------------------------------


class _Decides(Token[Configurator]):
    __slots__ = ()


@final
class MayConfigureMachine(_Decides):
    """May decide what the machine is; narrowed to the decision that the open phase waits for."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-configure-machine"

    def decide(self, subject: str, decision: object) -> Awaitable[None]:
        """Post the decision on `subject`: `machine`, `cpu` or `board`."""
        return self._reach(subject).decide(decision)


@final
class MayOpenKvm(_Decides):
    """May open the accelerator and create the virtual machine in it."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-open-kvm"

    def decide(self, decision: object) -> Awaitable[None]:
        """Post the choice of accelerator."""
        return self._reach().decide(decision)


@final
class MayAppendRecipe(Token[RecipeSink]):
    """May add commands to what is carried out later: `device_add` in preconfig, and what a destination overrides."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-append-recipe"

    def append(self, subject: str, command: str, arguments: Mapping[str, Any]) -> None:
        """Note `command` with `arguments`, to be carried out later. `subject`: `devices` or `overrides`."""
        self._reach(subject).append(command, arguments)


@final
class MaySetNuma(Token[NumaNodes]):
    """May divide the machine's memory and vCPUs into NUMA nodes."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-set-numa"

    def set(self, options: Any) -> None:
        """Make a node, set a distance, or place vCPUs."""
        self._reach().set(options)


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
class MayRestoreGuest(_Decides):
    """May put a saved state in place of the machine's own."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-restore-guest"

    def decide(self, saved: object) -> Awaitable[None]:
        """Post `saved`, whose descriptor goes with it; what is returned settles when the state is in force."""
        return self._reach().decide(saved)


@final
class MayPlugDevice(Token[Board]):
    """May add devices to the machine's buses, and take them off."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-plug-device"

    def fix(self, device: Any) -> None:
        """Put `device`, which is part of the board, on the bus at its addresses."""
        self._reach().fix(device)

    async def plug(self, request: Any) -> Any:
        """Plug in what `request` asks for, and return it with all that was left open."""
        return await self._reach().plug(request)

    async def unplug(self, name: str) -> None:
        """Take device `name` off."""
        await self._reach().unplug(name)


@final
class MayMapGuestMemory(Token[MemoryMap]):
    """May map RAM into the guest's physical address space."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-map-guest-memory"

    def map(self) -> None:
        """Give every RAM region its KVM memory slot."""
        self._reach().map()


@final
class MayDeclareState(Token[StateIndex]):
    """May declare sections of state that travel."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-declare-state"

    def register(
        self,
        name: str,
        version: int,
        *,
        save: Any,
        load: Any,
        accepts: int | None = None,
        after: Iterable[str] = (),
        optional: bool = False,
    ) -> None:
        """Add a section to what travels: how it is saved, checked and loaded, and which ones come before it."""
        self._reach().register(name, version, save=save, load=load, accepts=accepts, after=after, optional=optional)


@final
class MayWriteGuestMemory(Token[GuestRam]):
    """May write to the guest's RAM. Granted only where this process owns it."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-write-guest-memory"

    def write(self, address: int, data: bytes) -> None:
        """Store `data` at guest-physical `address`."""
        self._reach().write(address, data)

    def fill(self, address: int, fd: int, offset: int, size: int) -> None:
        """Read `size` bytes at `offset` of `fd` straight into guest RAM."""
        self._reach().fill(address, fd, offset, size)

    def place(self, address: int, data: bytes | memoryview) -> None:
        """Store `data` at guest-physical `address`, from any thread, without holding up the others."""
        self._reach().place(address, data)

    def clear(self) -> None:
        """Make all of it zero."""
        self._reach().clear()

    def load_pages(self, file: Any, first: int, count: int) -> None:
        """Read pages that are in a `PageFile`. From any thread."""
        self._reach().load_pages(file, first, count)

    def come_from(self, file: Any) -> Any:
        """Have pages come from a `PageFile` as they are used; return who brings them."""
        return self._reach().come_from(file)


# --- kinds of the phases in which a guest exists ------------------------------------------------------------


@final
class MayLoadState(Token[StateSink]):
    """May replace the machine's state by one that came in."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-load-state"

    def check(self, sections: Iterable[Any]) -> CheckedSections:
        """Check all of `sections`; what is returned puts them in force."""
        return self._reach().check(sections)


@final
class MayRunVcpus(Token[RunControl]):
    """May run, stop and reset the guest, or say whether it shall run once it can."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-run-vcpus"

    def cont(self) -> Awaitable[None]:
        """Run the guest, or let it run as soon as it can."""
        return self._reach().cont()

    def stop(self) -> Awaitable[None]:
        """Take every vCPU out of the guest; when awaited, all are out."""
        return self._reach().stop()

    def reset(self) -> Awaitable[None]:
        """Put the machine into its power-on state."""
        return self._reach().reset()


@final
class MayInject(Token["OutsideAccess"]):
    """May access ports and memory, drive interrupt lines and move the clock, from outside of the guest."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-inject"

    def carry_out(self, act: Callable[[OutsideAccess], ResultT]) -> ResultT:
        """Return what `act` returns. It is given the machine, to use until it returns and not to keep."""
        return act(self._reach())


@final
class MayResumeHere(_Decides):
    """May run the guest here again that was migrated by copying it: it is whole, and stands where it stood."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-resume-here"

    def decide(self) -> Awaitable[None]:
        """Run the guest here. That it does not run where it went, too, is for the caller to know."""
        return self._reach().decide(None)


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
class MaySendDescriptors(Token[DescriptorSender]):
    """May send this process's descriptors to a successor."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-send-descriptors"

    async def send(self, kind: str, body: Mapping[str, Any], descriptors: Mapping[str, int]) -> None:
        """Send message `kind` with `body` and `descriptors` over the CPR channel."""
        await self._reach().send(kind, body, descriptors)


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
class MaySaveState(Token[StateSource]):
    """May read the machine's state; exists only while every vCPU is out and every queue is at rest."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-save-state"

    def save(self) -> Mapping[str, Any]:
        """Return every section's content, by section name."""
        return self._reach().save()

    def ram(self) -> Any:
        """Return the guest's RAM, which stands still, to be read."""
        return self._reach().ram()


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


# --- grants: what a session may be lent -----------------------------------------------------------------------

KINDS: Final[tuple[type[AnyToken], ...]] = (
    MayQuery, MayQuit, MayDismissJob, MayAddDescriptor, MayCreateBackend, MayOpenHostFile, MayAdoptDescriptor,
    MayConfigureMachine, MayAppendRecipe, MayOpenKvm, MaySetNuma, MaySetMigrationCap, MaySetMigrationParam,
    MayListen, MayRestoreGuest, MayPlugDevice, MayMapGuestMemory, MayDeclareState, MayWriteGuestMemory,
    MayLoadState, MayRunVcpus, MayInject, MayStartMigration, MayCancelMigration, MaySwitchOver,
    MaySteerPostcopy, MaySendDescriptors, MayReadDirtyLog, MaySaveState, MayReleaseGuest, MayResumeHere,
)  # fmt: skip
"""Every kind there is, in the order in which the phases come to grant them."""


@final
class Grant:
    """The kinds that a session may be lent, whatever the phases grant. Has a name for error texts."""

    __slots__ = ("kinds", "name")

    def __init__(self, name: str, kinds: frozenset[type[AnyToken]]) -> None:
        self.name: Final = name
        self.kinds: Final = kinds


OBSERVE: Final = Grant("observe", frozenset({MayQuery}))
OPERATE: Final = Grant("operate", OBSERVE.kinds | {MayQuit, MayRunVcpus, MayResumeHere, MayPlugDevice})
MIGRATE: Final = Grant(
    "migrate",
    OPERATE.kinds
    | {
        MayDismissJob,
        MaySetMigrationCap,
        MaySetMigrationParam,
        MayListen,
        MayStartMigration,
        MayCancelMigration,
        MaySwitchOver,
        MaySteerPostcopy,
    },
)
QTEST: Final = Grant("qtest", frozenset({MayInject}))
ADMIN: Final = Grant("admin", frozenset(KINDS) - {MayAdoptDescriptor})
REPLAY: Final = Grant("incoming-recipe", frozenset(KINDS) - {MayOpenHostFile, MayStartMigration, MayRestoreGuest})
"""For a recipe that arrived in a stream: host resources are claimed from the predecessor, never opened by path."""
