"""A guest that is saved in a file with its RAM at fixed places: the stream around the pages."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final, final

from vmm.hostio import refused
from vmm.kvm.page_file import path_of
from vmm.migration.mapped_ram import MappedWriter
from vmm.migration.stream import HEAD_SIZE, StreamWriter
from vmm.migration.stream_records import PROCESSOR, PROCESSOR_VERSION, recipe_digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from vmm.kvm.memory import GuestMemory
    from vmm.migration.section_payload import StateValue
    from vmm.migration.stream_records import Section


@final
class MappedFile:
    """One such file. Owns the descriptor."""

    def __init__(self, fd: int) -> None:
        """Write to a file, from its present position on."""
        self._fd = fd
        self._start: Final = os.lseek(fd, 0, os.SEEK_CUR)
        self._writer: StreamWriter | None = None
        self._ram: MappedWriter | None = None

    @property
    def ram(self) -> MappedWriter:
        """The pages. After `begin`."""
        assert self._ram is not None
        return self._ram

    def begin(
        self,
        name: str,
        recipe: Sequence[Mapping[str, Any]],
        processor: Mapping[str, StateValue],
        home: Sequence[Mapping[str, Any]],
        memory: GuestMemory,
    ) -> None:
        """Write what machine it is, and where its pages will be. For a thread; the guest may run.

        Raises:
            VmmError: it does not fit into a stream, or the file cannot be written.
        """
        writer = self._writer = StreamWriter(name, recipe_digest(recipe))
        writer.recipe(recipe)
        writer.section(PROCESSOR, PROCESSOR_VERSION, processor)
        writer.home(home)
        head = b"".join(writer.take())
        ram = self._ram = MappedWriter(memory, self._fd, self._start, len(head) + HEAD_SIZE)
        writer.ram_mapped(ram.record)
        self._write(head, *writer.take())

    def finish(self, sections: Iterable[Section]) -> None:
        """Write what pages there are, and all the rest; it is on its disk when this returns. For a thread.

        Raises:
            VmmError: the same as `begin`.
        """
        writer = self._writer
        assert writer is not None, "it was begun"
        sums = self.ram.finish()
        for section in sections:
            writer.section(section.name, section.version, section.state)
        writer.ram_mapped_sums(sums)
        self._write(*writer.finish())
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise refused("write", path_of(self._fd), error) from error

    def _write(self, *buffers: bytes | memoryview) -> None:
        data = memoryview(b"".join(buffers))
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            raise refused("write", path_of(self._fd), error) from error

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
