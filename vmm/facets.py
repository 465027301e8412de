"""What the tokens for a machine's parts and for a guest lead to, as protocols. The tokens are in `vmm.capabilities`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable, Mapping


class Board(Protocol):
    """The machine's buses."""

    def fix(self, device: Any) -> None:
        """Put `device`, which is part of the board, at its addresses. `AddressConflict`, `NameTaken`."""
        ...

    async def plug(self, request: Any) -> Any:
        """Plug in what `request` asks for, and return it with all that was left open. `NameTaken` and others."""
        ...

    async def unplug(self, name: str) -> None:
        """Take device `name` off; returns when nothing of it is left. `DeviceNotFound`."""
        ...


class MemoryMap(Protocol):
    """The guest's physical address space."""

    def map(self) -> None:
        """Give every RAM region its KVM memory slot."""
        ...


class StateIndex(Protocol):
    """The sections that travel when the machine moves."""

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
        """Add a section; a duplicate name is a bug. See `vmm.migration.registry`."""
        ...


class GuestRam(Protocol):
    """Write access to the guest's RAM."""

    def write(self, address: int, data: bytes) -> None:
        """Store `data` at guest-physical `address`."""
        ...

    def fill(self, address: int, fd: int, offset: int, size: int) -> None:
        """Read `size` bytes at `offset` of `fd` straight into guest RAM."""
        ...

    def place(self, address: int, data: bytes | memoryview) -> None:
        """Store `data` at guest-physical `address`, from any thread, without holding up the others."""
        ...

    def clear(self) -> None:
        """Make all of it zero."""
        ...

    def load_pages(self, file: Any, first: int, count: int) -> None:
        """Read pages that are in a `PageFile`. From any thread."""
        ...

    def come_from(self, file: Any) -> Any:
        """Have pages come from a `PageFile` as they are used; return who brings them."""
        ...


class CheckedSections(Protocol):
    """A whole machine's state, checked and not yet in force."""

    def apply(self) -> None:
        """Put it in force."""
        ...


class StateSink(Protocol):
    """Takes a whole machine's state."""

    def check(self, sections: Iterable[Any]) -> CheckedSections:
        """Check every section (`StateRejected`); change nothing."""
        ...


class RunControl(Protocol):
    """Starts and stops the vCPUs. Before the machine is ready, records what is to be done when it is."""

    def cont(self) -> Awaitable[None]:
        """Run the guest."""
        ...

    def stop(self) -> Awaitable[None]:
        """Take every vCPU out of the guest."""
        ...

    def reset(self) -> Awaitable[None]:
        """Put the machine into its power-on state."""
        ...


class Departure(Protocol):
    """Starts an outgoing migration, or finds out what would become of it."""

    def start(self, plan: Any) -> Awaitable[None]:
        """Post `plan`; settles when phase `migrating` has opened, or with what kept it shut."""
        ...

    async def check(self, plan: Any) -> Mapping[str, Any]:
        """Ask the other side of `plan`, and return its answer; nothing else happens."""
        ...

    def measure(self, wanted: Any) -> None:
        """Begin to measure how fast the guest writes. `InvalidState` while that is being done."""
        ...

    def undo(self) -> Awaitable[None]:
        """Post the guest's return to the process that it came from; settles as `start`."""
        ...

    def forget(self) -> None:
        """Let that process end."""
        ...


class Cancellable(Protocol):
    """Something under way that can be called off."""

    def cancel(self, by: str) -> None:
        """Call it off; returns at once. Without effect once the guest has been offered to the other side."""
        ...


class DescriptorSender(Protocol):
    """The sending half of a CPR channel."""

    async def send(self, kind: str, body: Mapping[str, Any], descriptors: Mapping[str, int]) -> None:
        """Send one message with named descriptors."""
        ...


class Switchover(Protocol):
    """A migration that may wait before its switchover."""

    def go_on(self) -> None:
        """Let it go on. Raises `InvalidState` where it does not wait."""
        ...


class DirtyPages(Protocol):
    """A log of the pages that are written; `vmm.kvm.dirty_log.DirtyLog` says what each does."""

    def start(self) -> None:
        """Begin."""
        ...

    def stop(self) -> None:
        """End."""
        ...

    def collect(self, into: Any) -> None:
        """Put what was written since into the set `into`."""
        ...

    def protect(self, first: int, pages: int) -> None:
        """Note that these pages are about to be read."""
        ...


class StateSource(Protocol):
    """Gives a whole machine's state, which stands still."""

    def save(self) -> Mapping[str, Any]:
        """Return every section's content."""
        ...

    def ram(self) -> Any:
        """Return the guest's RAM, which stands still, to be read."""
        ...


class OwnershipOffer(Protocol):
    """The source's hold on the ownership cell."""

    def offer(self) -> None:
        """SOURCE -> OFFERED: from here on the successor may take the guest."""
        ...

    def take_back(self) -> bool:
        """OFFERED -> SOURCE; False where the successor was quicker."""
        ...
