"""A tap as a back end: held for a network device, and handed to a successor as it is.

Nobody reads or writes it before there is such a device: what comes in waits in the interface's queue.
"""

from __future__ import annotations

import os
from typing import ClassVar, Final, final

from vmm.backends.held import Held


@final
class Tap(Held):
    """One tap."""

    kind: ClassVar[str] = "tap"

    def __init__(self, fd: int, interface: str) -> None:
        """Own `fd`, which does not block. `interface` is the name that the host knows it by."""
        self.fd = fd
        self.interface: Final = interface

    def close(self) -> None:
        """Let go of it: for whoever does not serve it, and once it is a successor's. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
