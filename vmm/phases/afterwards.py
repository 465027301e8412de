"""What a process does once its machine has ended here: nothing more, or one of these.

The guest is another process's by then. This process stands by for its return, or becomes another program, which takes
it back under this process's number.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from typing import TYPE_CHECKING, TypeAlias, final

import attrs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.cpr.berth import Berth


@final
@attrs.define(eq=False)
class StandBy:
    """Wait at `berth` until the guest comes back, or whoever has it lets go of `leash`."""

    berth: Berth
    leash: int
    """A connected socket: its other end is closed when this process is no longer needed."""

    def renounce(self) -> None:
        """Do not wait any more."""
        self.close()

    def close(self) -> None:
        """Close both. Idempotent."""
        self.berth.close()
        if self.leash >= 0:
            os.close(self.leash)
            self.leash = -1


@final
@attrs.define(eq=False)
class BecomeProgram:
    """Execute `command` in this process, and let it have the guest from the caretaker."""

    command: Sequence[str]
    caretaker: int
    """Number of the process that has the guest meanwhile; a child of this one."""
    monitor: int
    """A connected socket: a monitor of that process, on which nothing has been said."""

    def renounce(self) -> None:
        """End the caretaker, and the guest with it."""
        self.close()
        with suppress(ProcessLookupError):
            os.kill(self.caretaker, signal.SIGTERM)

    def close(self) -> None:
        """Close the socket. Idempotent."""
        if self.monitor >= 0:
            os.close(self.monitor)
            self.monitor = -1


Afterwards: TypeAlias = StandBy | BecomeProgram
