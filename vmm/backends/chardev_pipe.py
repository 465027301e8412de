"""A chardev on named pipes, or on a character device of the host's.

A pipe is open for both directions at our end, so it has a reader and a writer as long as we have it: who reads or
writes at the other end may come and go, and is never waited for. What nobody has read yet stays in the pipe; once it is
full, the guest is held, as by any slow reader.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, ClassVar, final

from vmm.backends.chardev import Chardev

if TYPE_CHECKING:
    from vmm.backends.chardev import Complain
    from vmm.backends.chardev_options import ChardevKind


@final
class PipeChardev(Chardev):
    """Reads one file, which has no end, and writes another one."""

    kind: ClassVar[ChardevKind] = "pipe"

    def __init__(
        self, label: str, source: int, sink: int, path: str, complain: Complain, *, inherited: bool = False
    ) -> None:
        """Own `source` and `sink`, which do not block. `path` is for texts."""
        super().__init__(label, complain, inherited=inherited)
        self._source = source
        self._sink = sink
        self._path = path
        self._watch.add(source)
        self._watch.add(sink, reads=False)

    @property
    def filename(self) -> str:
        return "pipe"

    def descriptors(self) -> dict[str, int]:
        return {"in": self._source, "out": self._sink}

    def _step(self) -> bool:
        wrote = self._write_some()
        return self._read_some() or wrote

    def _write_some(self) -> bool:
        return self._write_to(self._sink)

    def _read_some(self) -> bool:
        return self._read_from(self._source)

    @property
    def _sink_name(self) -> str:
        return self._path

    def _release(self, *, owner: bool) -> None:
        for fd in (self._source, self._sink):
            self._watch.remove(fd)
            os.close(fd)
