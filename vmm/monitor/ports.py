"""What the monitor asks of its neighbours: the executor of commands, and the wire of a client."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping


class Caller(Protocol):
    """Who calls a command: all that a handler may know of the session."""

    @property
    def name(self) -> str:
        """Name for logs and `query-nursery-tree`, for example ``qmp0/3``."""

    @property
    def descriptors(self) -> dict[str, int]:
        """The session's named descriptors (`getfd`). The session closes what is left in it when it ends."""

    @property
    def by_number(self) -> bool:
        """Whether it can know the numbers of this process's descriptors: a session cannot, and names its own."""

    def take_descriptors(self) -> list[int]:
        """Hand over the descriptors that came by SCM_RIGHTS and nobody claimed; they are the callee's to close."""


class Executor(Protocol):
    """Carries out commands. Knows the commands; the monitor does not."""

    def knows(self, name: str) -> bool:
        """Tell whether a command of that name exists and is enabled, in whatever phase."""

    def admits_oob(self, name: str) -> bool:
        """Tell whether the known command `name` may be run by ``exec-oob``."""

    async def execute(self, caller: Caller, name: str, arguments: Mapping[str, object]) -> object:
        """Carry out the known command `name`.

        Returns JSON, attrs objects (see `vmm.monitor.arguments.unstructure`) or a mixture; None is the empty object.
        A cancellation means that the session ends; the command itself goes on or is undone as its phase decides.

        Raises:
            VmmError: the command failed; the session words the reply. Anything else is a bug and goes on up.
        """


class Transport(Protocol):
    """The wire to one client. One task receives and one flushes; all calls are made on the loop."""

    async def receive(self) -> bytes:
        """Wait for input and return it, at most 64 KiB; empty at the end of the stream. A cancellation loses nothing.

        A transport of messages returns a message whole.

        Raises:
            trio.BrokenResourceError: the client is gone.
            trio.ClosedResourceError: `close` was called.
        """

    def take_descriptors(self) -> list[int]:
        """Hand over the descriptors that came with the input since the last call (most transports: none)."""

    def send_nowait(self, data: bytes) -> int:
        """Send a prefix of the output line `data`, without waiting, and return its length (0: no room now).

        A transport of messages takes a line whole or not at all.

        Raises:
            trio.BrokenResourceError: the client is gone.
            trio.ClosedResourceError: `close` was called.
        """

    async def wait_sendable(self) -> None:
        """Wait until `send_nowait` may take something. Raises as `send_nowait` does."""

    def close(self) -> None:
        """Hang up. Wakes `receive` and `wait_sendable`; may be called again."""
