"""Where a machine's host resources come from.

A recipe names host resources; handlers ask for them by a name unique in the machine (`chardev/serial0/listener`,
`ram`, `kernel`) and say how to open one. In a machine started here the opener is called. In the destination of a live
update it never is: the descriptor must be among those that the source sent.
"""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING, final

from vmm import host_sockets, hostio
from vmm.errors import DescriptorMissing, DescriptorsUnclaimed, NameTaken
from vmm.phases.host_resources import is_of, unused

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@final
class HostFiles:
    """Opens host resources by calling the opener. The facet of `may-open-host-file`."""

    def obtain(self, name: str, opener: Callable[[], int]) -> int:
        """Open and return a descriptor."""
        return opener()

    def names(self, prefix: str) -> Sequence[str] | None:
        """Return None: there is no predecessor."""
        return None

    def inherits(self) -> bool:
        """Say no."""
        return False


@final
class Inheritance:
    """The descriptors that a predecessor sent, each claimed exactly once. The facet of `may-adopt-descriptor`.

    Of this host there is what the operator or an override has named, and nothing else.
    """

    def __init__(self) -> None:
        self._unclaimed: dict[str, int] = {}
        self._families: dict[str, list[str]] = {}
        """Resource -> names of its descriptors that came; there can be thousands of both."""
        self._replaced: dict[str, tuple[int, str]] = {}
        self._here: frozenset[str] = frozenset()

    def add_copies(self, descriptors: Mapping[str, int]) -> None:
        """Add copies of `descriptors`, of which this process keeps its own. Those of an earlier call are forgotten.

        Raises:
            HostFileRefused: one is not open; none was added.
        """
        self.close()
        with ExitStack() as undo:
            undo.callback(self.close)
            for name, fd in descriptors.items():
                self._add(name, hostio.dup(fd))
            undo.pop_all()

    def open_here(self, resources: frozenset[str], paths: Mapping[str, str]) -> None:
        """Let `resources` be opened on this host. Descriptors of theirs that came are kept aside, unused.

        Args:
            paths: descriptor name -> the path of the socket that it listens on at the source, where it is such a one.
        """
        self._here = resources
        for name in unused(self._unclaimed, resources):
            self._replaced[name] = (self._unclaimed.pop(name), paths.get(name, ""))

    def used(self, descriptors: dict[str, int]) -> dict[str, int]:
        """Take those out of `descriptors` that do not belong to a resource of this host's own."""
        left = frozenset(unused(descriptors, self._here))
        return {name: descriptors.pop(name) for name in sorted(descriptors) if name not in left}

    def retire_replaced(self, complain: Callable[[str], None]) -> None:
        """Remove the socket files of listeners that the guest's machine no longer has: it is this process's now.

        Nothing is worth the guest, which is here: a file that cannot be removed stays, and that is complained of.
        """
        while self._replaced:
            _, (fd, path) = self._replaced.popitem()
            try:
                _retire(fd, path)
            except (OSError, ValueError) as error:  # what was sent may be no socket, or its path none
                complain(f"The socket {path!r} of a chardev that was replaced is left where it is: {error}")

    def add(self, descriptors: dict[str, int]) -> None:
        """Take over `descriptors`. `NameTaken` for a name that is here already."""
        for name in descriptors:
            if name in self._unclaimed:
                raise NameTaken(what="Descriptor", name=name)
        for name, fd in descriptors.items():
            self._add(name, fd)

    def _add(self, name: str, fd: int) -> None:
        self._unclaimed[name] = fd
        self._families.setdefault(name.rpartition("/")[0], []).append(name)

    def obtain(self, name: str, opener: Callable[[], int]) -> int:
        """Claim descriptor `name`, or open it where that is admitted. Raises `DescriptorMissing`."""
        if name not in self._unclaimed and is_of(name, self._here):
            return opener()
        return self.claim(name)

    def claim(self, name: str) -> int:
        """Take descriptor `name` out. Raises `DescriptorMissing`."""
        if name not in self._unclaimed:
            raise DescriptorMissing(name=name)
        return self._unclaimed.pop(name)

    def claim_all(self, wanted: Callable[[str], bool]) -> dict[str, int]:
        """Take out every descriptor whose name is `wanted`."""
        return {name: self._unclaimed.pop(name) for name in sorted(self._unclaimed) if wanted(name)}

    def names(self, prefix: str) -> Sequence[str] | None:
        """Return the unclaimed names of a resource, sorted; None where they are opened on this host.

        Args:
            prefix: the resource's name, and a slash.
        """
        resource = prefix.removesuffix("/")
        if resource in self._here:
            return None
        return sorted(name for name in self._families.get(resource, ()) if name in self._unclaimed)

    def inherits(self) -> bool:
        """Say yes."""
        return True

    def require_empty(self) -> None:
        """Raise `DescriptorsUnclaimed` if anything is left."""
        if self._unclaimed:
            raise DescriptorsUnclaimed(names=tuple(sorted(self._unclaimed)))

    def close(self) -> None:
        """Close what nobody claimed, and what was replaced."""
        for fd in (*self._unclaimed.values(), *(fd for fd, _ in self._replaced.values())):
            os.close(fd)
        self._unclaimed.clear()
        self._families.clear()
        self._replaced.clear()


def _retire(fd: int, path: str) -> None:
    """Close `fd`; if it listens on `path`, remove that."""
    try:
        listener = socket.socket(fileno=fd)
    except OSError:
        os.close(fd)
        if path:
            raise
        return
    with listener:
        if path:
            host_sockets.unlink_own(path, listener)
