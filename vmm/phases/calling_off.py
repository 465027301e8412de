"""Calling a migration off from the side that it comes to.

Phase boot grants it, in every phase: what comes in passes through most of them. The phases of a source, which knows
more, grant a `may-cancel-migration` of their own.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, final

import trio

from vmm.errors import MigrationCancelled

if TYPE_CHECKING:
    from collections.abc import Iterator


@final
class CallingOff:
    """The facet of `may-cancel-migration` where nothing goes out. Loop only."""

    def __init__(self) -> None:
        self._comes = False
        self._by = ""
        self._blocks: list[trio.CancelScope] = []

    def begin(self) -> None:
        """Something comes, which can be called off from now on."""
        self._comes, self._by = True, ""

    def end(self) -> None:
        """It is over, or has gone too far to be called off."""
        self._comes = False

    def cancel(self, by: str) -> None:
        """End the blocks in which something comes. Without effect where nothing does: clients cancel to be sure."""
        if self._comes and not self._by:
            self._by = by
            for scope in self._blocks:
                scope.cancel()

    @contextmanager
    def block(self) -> Iterator[None]:
        """Enclose what can be called off. Raises `MigrationCancelled` where it was."""
        with trio.CancelScope() as scope:
            if self._comes and self._by:
                scope.cancel()
            self._blocks.append(scope)
            try:
                yield
            finally:
                self._blocks.remove(scope)
        if scope.cancelled_caught:
            raise MigrationCancelled(by=self._by)
