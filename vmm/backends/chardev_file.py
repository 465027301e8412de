"""Chardevs without input: a file, and nothing."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, ClassVar, final

from vmm.backends.chardev import Chardev

if TYPE_CHECKING:
    from vmm.backends.chardev import Complain
    from vmm.backends.chardev_options import ChardevKind


@final
class NullChardev(Chardev):
    """Drops all output."""

    kind: ClassVar[ChardevKind] = "null"

    def __init__(self, label: str, complain: Complain, *, inherited: bool = False) -> None:
        super().__init__(label, complain, inherited=inherited)
        if not inherited:
            self._open_output()

    @property
    def filename(self) -> str:
        return "null"

    def descriptors(self) -> dict[str, int]:
        return {}

    def _open_output(self) -> None:
        self._output.drop()

    def _step(self) -> bool:
        return False

    def _write_some(self) -> bool:
        return False

    def _release(self, *, owner: bool) -> None:
        pass


@final
class FileChardev(Chardev):
    """Writes a file.

    Writes to a regular file are made on the loop, all that is held at once: they go to the page cache, and a hop to a
    thread and back costs more than most of them. A disk that is full costs output, not the machine.
    """

    kind: ClassVar[ChardevKind] = "file"

    def __init__(self, label: str, fd: int, path: str, complain: Complain, *, inherited: bool = False) -> None:
        """Own `fd`, which does not block. `path` is for texts."""
        super().__init__(label, complain, inherited=inherited)
        self._fd = fd
        self._path = path
        self._watch.add(fd, reads=False)

    @property
    def filename(self) -> str:
        return "file"

    def descriptors(self) -> dict[str, int]:
        return {"out": self._fd}

    def _step(self) -> bool:
        return self._write_some()

    def _write_some(self) -> bool:
        return self._write_to(self._fd)

    @property
    def _sink_name(self) -> str:
        return self._path

    def _release(self, *, owner: bool) -> None:
        self._watch.remove(self._fd)
        os.close(self._fd)
