"""A port through which a guest ends the VMM with a status of its choice. For tests.

Source: QEMU's isa-debug-exit, which test guests are written for: the status of value v is 2 v + 1, so never 0.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import ClassVar, final

import attrs

from vmm.hw.board import DEBUG_EXIT_PORTS
from vmm.hw.state import Schema, host_only


@attrs.define(kw_only=True)
class DebugExitState:
    """Nothing: a guest that has asked for the end does not travel."""

    SCHEMA: ClassVar[Schema] = Schema("debug-exit", version=1, accepts=1)


@final
@attrs.define(eq=False, repr=False, kw_only=True)
class DebugExit:
    """The port; reads as 0.

    `request_exit` is called with the status (a process shows its low 8 bits) on a vCPU thread, and must not block.
    """

    request_exit: Callable[[int], object] = attrs.field(metadata=host_only("ends this process"))
    name: str = attrs.field(metadata=host_only("configuration: of the board"), default="debug-exit")
    addresses: tuple[range, ...] = attrs.field(
        metadata=host_only("configuration: of the board"), default=(DEBUG_EXIT_PORTS,)
    )
    widest: int = attrs.field(metadata=host_only("configuration: takes up to 32 bits"), default=4, init=False)
    lock: threading.Lock = attrs.field(
        metadata=host_only("orders this process's threads"), factory=threading.Lock, init=False
    )
    state: DebugExitState = attrs.Factory(DebugExitState)

    def read(self, offset: int, size: int) -> int:
        """Return 0."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Ask for the end of the VMM, wherever in the range the value is written."""
        self.request_exit(value << 1 | 1)

    def reset(self) -> None:
        """Do nothing: there is no state."""

    def after_load(self) -> None:
        """Do nothing: there is no state and no interrupt."""
