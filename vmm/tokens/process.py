"""What may be done with the process and with what it has of its host: the tokens that there are from the beginning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, final

from vmm.facets import BackendSink, DescriptorSets, JobKeeper
from vmm.tokens.mechanism import Token

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ViewT = TypeVar("ViewT")


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
