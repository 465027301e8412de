"""A machine from outside of its guest: the facet of `may-inject`.

The other facets stand in `vmm.facets`, or beside their tokens in `vmm.tokens`; this one is as long as several of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable


class OutsideAccess(Protocol):
    """A machine's addresses, interrupt lines and clock, as they are for somebody who is no vCPU of it."""

    def read_port(self, port: int, size: int) -> int:
        """Read `size` bytes, 1, 2 or 4, from I/O port `port`."""

    def write_port(self, port: int, size: int, value: int) -> None:
        """Write `size` bytes, 1, 2 or 4, to I/O port `port`."""

    def load(self, address: int, size: int) -> int:
        """Load `size` bytes, 1, 2, 4 or 8, from guest-physical `address`, RAM or not."""

    def store(self, address: int, size: int, value: int) -> None:
        """Store `size` bytes, 1, 2, 4 or 8, at guest-physical `address`, RAM or not."""

    def read(self, address: int, size: int) -> bytes:
        """Read `size` bytes at a guest-physical address, RAM or not."""

    def write(self, address: int, data: bytes) -> None:
        """Write `data` at a guest-physical address, RAM or not."""

    def drive(self, path: str, name: str, number: int, level: bool) -> None:
        """Drive input `number`, of those called `name`, of the chip or device at `path`."""

    def watch(
        self, path: str, name: str | None, *, inputs: bool, tell: Callable[[int, bool], object]
    ) -> Callable[[], object]:
        """From now on call `tell`, on any thread, when an input (or output) of what is at `path` changes its level.

        What is returned ends that, whoever calls it and when.
        """

    def step_clock(self, ns: int | None) -> int:
        """Let `ns` nanoseconds pass (None: until a timer runs out); return the time then, in nanoseconds."""

    def set_clock(self, ns: int) -> int:
        """Let time pass until `ns` nanoseconds; return the time then."""
