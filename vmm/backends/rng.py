"""Back ends that give random bytes: the kernel's generator (`rng-builtin`), or a character device (`rng-random`)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, ClassVar, Final, Protocol, final

import trio

from vmm.backends.held import Held
from vmm.errors import HostFileRefused

if TYPE_CHECKING:
    from collections.abc import Mapping

_LOOK_AGAIN: Final = 0.05
"""Seconds between two reads of a device that has nothing and cannot say when it has."""


class Rng(Protocol):
    """A source of random bytes. Many may read at a time; each gets bytes of its own."""

    kind: ClassVar[str]

    async def read(self, size: int) -> bytes:
        """Return 1 to `size` random bytes, as many as there are now. A checkpoint in every case.

        A cancellation loses nothing that anybody would miss.

        Raises:
            HostFileRefused: the source has none, and will not have any.
        """

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the source until cancelled, then close it."""

    def descriptors(self) -> Mapping[str, int]:
        """Return what a successor needs, by the last part of its name."""

    def close(self) -> None:
        """Close the source. For whoever does not serve it."""


@final
class BuiltinRng(Held):
    """The kernel's generator, which never waits once the host has started up."""

    kind: ClassVar[str] = "rng-builtin"

    async def read(self, size: int) -> bytes:
        """Return `size` random bytes."""
        await trio.lowlevel.checkpoint()
        return os.getrandom(size)

    def descriptors(self) -> Mapping[str, int]:
        """Return nothing: every process has the kernel's generator."""
        return {}

    def close(self) -> None:
        """Do nothing."""


@final
class DeviceRng(Held):
    """A character device of the host. It is read on the loop, without blocking, as far as its driver keeps to that."""

    kind: ClassVar[str] = "rng-random"

    def __init__(self, fd: int, path: str) -> None:
        """Own `fd`, which does not block. `path` is for texts."""
        self._fd: Final = fd
        self.path: Final = path
        self._turn: Final = trio.Lock()
        """One waits for the descriptor at a time: the loop tells no more than one."""

    async def read(self, size: int) -> bytes:
        """Return 1 to `size` random bytes; wait for the device if it has none."""
        try:
            async with self._turn:
                while True:
                    try:
                        data = os.read(self._fd, size)
                        break
                    except BlockingIOError:
                        await self._wait()
        except OSError as error:
            raise HostFileRefused(action="read", path=self.path, reason=os.strerror(error.errno or 0)) from error
        if not data:
            raise HostFileRefused(action="read", path=self.path, reason="it has an end; a random source has none")
        return data

    async def _wait(self) -> None:
        """Wait until there may be something to read; `OSError` if that cannot be known."""
        try:
            await trio.lowlevel.wait_readable(self._fd)
        except PermissionError:  # A driver that cannot be polled, as that of /dev/hwrng. Source: epoll_ctl(2), EPERM
            await trio.sleep(_LOOK_AGAIN)

    def descriptors(self) -> Mapping[str, int]:
        """Return the open device."""
        return {"file": self._fd}

    def close(self) -> None:
        """Close the device. Nobody may be reading."""
        os.close(self._fd)
