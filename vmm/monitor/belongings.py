"""What goes with a session to another process: its state, and the client's descriptors.

The descriptors are those that it named by `getfd`, and those that it sent and nobody claimed. Each has a serial number,
which is never used again: by that it is told from another one of the same name, or of the same number in this process,
when descriptors are handed on in two steps.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, final

import attrs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vmm.monitor.json_stream import Fault, Message, StreamState


@final
class NamedDescriptors(dict[str, int]):
    """Descriptors by the client's names for them. Whoever takes one out owns it."""

    def __init__(self, serials: Serials) -> None:
        super().__init__()
        self._next: Final = serials
        self.serials: Final[dict[str, int]] = {}
        """Of each name, and of some that are not there any more."""

    def __setitem__(self, name: str, fd: int) -> None:
        self.serials[name] = self._next()
        super().__setitem__(name, fd)


@final
class Serials:
    """Counts from 1."""

    def __init__(self) -> None:
        self.last = 0

    def __call__(self) -> int:
        """Return the next number."""
        self.last += 1
        return self.last


@final
class Belongings:
    """All of one client's. Owns the descriptors."""

    def __init__(self, named: Mapping[str, int] | None = None, unclaimed: Sequence[int] = ()) -> None:
        """Own what a predecessor kept for the client."""
        self._serials: Final = Serials()
        self.named: Final = NamedDescriptors(self._serials)
        self._unclaimed: list[tuple[int, int]] = []
        for name, fd in (named or {}).items():
            self.named[name] = fd
        self.put(list(unclaimed))

    def put(self, fresh: list[int]) -> None:
        """Keep what has come with a message, in place of what came before and nobody claimed."""
        if fresh:
            for fd in self.take():
                os.close(fd)
            self._unclaimed = [(self._serials(), fd) for fd in fresh]

    def take(self) -> list[int]:
        """Hand over what came and nobody claimed."""
        taken, self._unclaimed = [fd for _, fd in self._unclaimed], []
        return taken

    def close(self) -> None:
        """Close all."""
        for fd in (*self.take(), *self.named.values()):
            os.close(fd)
        self.named.clear()

    # For another process to go on with.

    @property
    def by_serial(self) -> dict[int, int]:
        """Every descriptor by its serial number."""
        return {self.named.serials[name]: fd for name, fd in self.named.items()} | dict(self._unclaimed)

    @property
    def names(self) -> dict[str, int]:
        """The client's names -> the serial numbers of what they stand for."""
        return {name: self.named.serials[name] for name in self.named}

    @property
    def unclaimed(self) -> tuple[int, ...]:
        """The serial numbers of what nobody claimed, in the order in which it came."""
        return tuple(serial for serial, _ in self._unclaimed)


@final
@attrs.frozen(kw_only=True)
class SessionState:
    """A session at rest, all but its descriptors, for another process to go on with."""

    negotiated: bool
    oob: bool
    stream: StreamState
    waiting: tuple[Message | Fault, ...]
    """Requests that were read and not begun, in order."""
    unsent: bytes
