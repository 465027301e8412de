"""Back ends of the guest's RAM: a memfd, of huge pages too, or a file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, final

from vmm.backends.held import Held

if TYPE_CHECKING:
    from collections.abc import Mapping


@final
class MemoryBackend(Held):
    """Memory for a guest, which is mapped by whoever has the guest. Owns its descriptor, and with it a file's lock."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd: Final = fd
        self.size: Final = size
        """Bytes."""

    def descriptors(self) -> Mapping[str, int]:
        """Return what a successor needs, by the last part of its name."""
        return {"memory": self.fd}

    def close(self) -> None:
        """Close it. What is mapped stays."""
        os.close(self.fd)
