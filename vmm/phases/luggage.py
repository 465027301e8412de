"""Descriptors of a predecessor that no command of its recipe asks for: its clients' sockets, and what they gave it.

They come before the pause, with changes in it; whose state is loaded then claims them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, final

from vmm.errors import DescriptorMissing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

FDSET: Final = "fdset/"
MONITOR: Final = "monitor/"
SESSION: Final = "session-"


def is_luggage(name: str) -> bool:
    """Say whether the descriptor `name` is of a descriptor set, or of a monitor's session."""
    return name.startswith(FDSET) or (name.startswith(MONITOR) and name.rpartition("/")[2].startswith(SESSION))


@final
class Luggage:
    """What has come and is not claimed yet. Owns the descriptors."""

    def __init__(self) -> None:
        self._here: Final[dict[str, int]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._here

    def __iter__(self) -> Iterator[str]:
        return iter(self._here)

    def __getitem__(self, name: str) -> int:
        """Return a descriptor, to be looked at."""
        return self._here[name]

    def add(self, descriptors: Mapping[str, int]) -> None:
        """Take over `descriptors`, of which one that is here already is replaced."""
        self.drop(descriptors)
        self._here.update(descriptors)

    def drop(self, names: Iterable[str]) -> None:
        """Close those of `names` that are here: they have gone where they come from."""
        for name in names:
            if name in self._here:
                os.close(self._here.pop(name))

    def claim(self, name: str) -> int:
        """Take a descriptor out. Raises `DescriptorMissing`."""
        if name not in self._here:
            raise DescriptorMissing(name=name)
        return self._here.pop(name)

    def close(self) -> None:
        """Close what nobody claimed."""
        self.drop(tuple(self._here))
