"""What the tokens for a machine's parts and for a guest lead to, as protocols. The tokens are in `vmm.capabilities`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable, Iterator, Mapping


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

    def load_pages(self, file: Any, first: int, count: int) -> int:
        """Read pages that are in a `PageFile`; return how many of these there are. From any thread."""
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

    def check_ahead(self, sections: Iterable[Any]) -> Any:
        """Check some sections, for `check`; change nothing."""
        ...

    def load_ahead(self, section: Any, ahead: Any) -> None:
        """Put a section in force that waits for no other, and note it for `check`."""
        ...

    def check(self, sections: Iterable[Any], ahead: Any = None) -> CheckedSections:
        """Check every section (`StateRejected`) that was not checked `ahead`; change nothing."""
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

    def limit(self, index: int | None, quota: int) -> None:
        """Limit how fast a vCPU writes, or with None each of them, in MiB a second; 0 ends it."""
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


class StatePreview(Protocol):
    """What a running machine can say of its state."""

    def save_ahead(self) -> Iterable[Any]:
        """Return sections that will hardly change until the machine stands; no one moment's, while vCPUs run."""
        ...


class PostcopyControl(Protocol):
    """What can be done to a guest of which a part is here, and a part there. Each raises where it cannot be done."""

    def start(self) -> None:
        """Have it run there."""
        ...

    def pause(self) -> None:
        """Break the connection."""
        ...

    async def recover(self, address: Any) -> None:
        """Listen for the source."""
        ...


class StateSource(Protocol):
    """Gives a whole machine's state, which stands still."""

    def save(self) -> Iterator[Any]:
        """Yield every section; each is read as it is asked for."""
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


class JobKeeper(Protocol):
    """The machine's jobs."""

    def dismiss(self, name: str) -> None:
        """Forget a job that has concluded."""
        ...


class DescriptorSets(Protocol):
    """The machine's descriptor sets, as of `add-fd`."""

    def add(self, fd: int, fdset_id: int | None, opaque: str | None) -> tuple[int, int]:
        """Take over `fd` into a set; return the set's number, and the one by which `fd` is known there."""
        ...

    def remove(self, fdset_id: int, fd: int | None) -> None:
        """Close one descriptor of a set, or all."""
        ...


class BackendSink(Protocol):
    """Registers back ends and runs their tasks in the residents of the phase that owns them."""

    async def adopt(self, family: str, name: str, backend: Any) -> None:
        """Start `backend` and register it. Raises `NameTaken` before anything was started."""
        ...

    async def dismiss(self, family: str, name: str) -> None:
        """End the back end's task and forget it; returns when it has left. `BackendNotFound`, `BackendInUse`."""
        ...


class Configurator(Protocol):
    """Takes a decision that a phase waits for, and moves on with it."""

    def decide(self, decision: object) -> Awaitable[None]:
        """Post `decision`; what is returned settles when the next window has opened, or with what kept it shut."""
        ...


class RecipeSink(Protocol):
    """Takes commands that are to be carried out later, when the machine has got as far as they need."""

    def append(self, command: str, arguments: Mapping[str, Any]) -> None:
        """Note `command` with `arguments`, which have been checked for their form; raise what already rules it out."""
        ...


class NumaNodes(Protocol):
    """The machine's NUMA nodes, while they are made."""

    def set(self, options: Any) -> None:
        """Carry out one `set-numa-node`, whole or not at all. `OptionInvalid`, `Unsupported`."""
        ...


class Settings(Protocol):
    """A table of settings that is changed as a whole or not at all."""

    def update(self, changes: Mapping[str, Any]) -> None:
        """Check all of `changes`, then apply them; `MigrationRefused` leaves everything as it was."""
        ...
