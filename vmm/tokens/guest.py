"""What may be done to a guest and to its state: the tokens of the phases in which there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, final

from vmm.facets import Configurator, GuestRam, RunControl, StatePreview, StateSink, StateSource
from vmm.tokens.mechanism import Token

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator

    from vmm.facets import CheckedSections
    from vmm.outside import OutsideAccess

ResultT = TypeVar("ResultT")


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

    def load_pages(self, file: Any, first: int, count: int) -> int:
        """Read pages that are in a `PageFile`; return how many of these there are. From any thread."""
        return self._reach().load_pages(file, first, count)

    def come_from(self, file: Any) -> Any:
        """Have pages come from a `PageFile` as they are used; return who brings them."""
        return self._reach().come_from(file)


@final
class MayRestoreGuest(Token[Configurator]):
    """May put a saved state in place of the machine's own."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-restore-guest"

    def decide(self, saved: object) -> Awaitable[None]:
        """Post `saved`, whose descriptor goes with it; what is returned settles when the state is in force."""
        return self._reach().decide(saved)


@final
class MayLoadState(Token[StateSink]):
    """May replace the machine's state by one that came in."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-load-state"

    def check_ahead(self, sections: Iterable[Any]) -> Any:
        """Check some sections before all are here; return what was found, for `check`."""
        return self._reach().check_ahead(sections)

    def load_ahead(self, section: Any, ahead: Any) -> None:
        """Put a section in force that waits for no other, before all are here; note it in `ahead`."""
        self._reach().load_ahead(section, ahead)

    def check(self, sections: Iterable[Any], ahead: Any = None) -> CheckedSections:
        """Check all of `sections`, but for those that were checked `ahead`; what is returned puts them in force."""
        return self._reach().check(sections, ahead)


@final
class MayPreviewState(Token[StatePreview]):
    """May read what devices have while the guest runs, to be sent before it stands."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-preview-state"

    def save_ahead(self) -> Iterable[Any]:
        """Return sections that will hardly change until the guest stands; no one moment's, while vCPUs run."""
        return self._reach().save_ahead()


@final
class MaySaveState(Token[StateSource]):
    """May read the machine's state; exists only while every vCPU is out and every queue is at rest."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-save-state"

    def save(self) -> Iterator[Any]:
        """Yield every section, that of the processors first; each is read as it is asked for."""
        return self._reach().save()

    def ram(self) -> Any:
        """Return the guest's RAM, which stands still, to be read."""
        return self._reach().ram()
