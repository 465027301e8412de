"""A whole state stream, as it comes in over a socket."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

import attrs
import trio

from vmm.errors import StreamCorrupt
from vmm.migration.ram_records import RamExtents
from vmm.migration.stream import StreamReader
from vmm.migration.stream_records import Header, Recipe, Section

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable

    from vmm.migration.stream_records import Record

_PIECE: Final = 256 * 1024  # bytes asked of the channel at once: a machine's state in one piece


@final
@attrs.frozen(kw_only=True)
class StateStream:
    """The content of a whole stream."""

    header: Header
    recipe: Recipe | None
    sections: tuple[Section, ...]
    ram: tuple[RamExtents, ...]

    @classmethod
    def of(cls, records: Iterable[Record]) -> StateStream:
        """Sort `records`, all that a `StreamReader` returned until it had ended."""
        found = list(records)
        (header,) = (record for record in found if isinstance(record, Header))
        return cls(
            header=header,
            recipe=next((record for record in found if isinstance(record, Recipe)), None),
            sections=tuple(record for record in found if isinstance(record, Section)),
            ram=tuple(record for record in found if isinstance(record, RamExtents)),
        )


@final
class StreamIntake:
    """One stream, taken in from a socket that does not block. For the guest's pause: no turn of the loop is given away.

    The socket stays the caller's.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock: Final = sock
        self._reader: Final = StreamReader()
        self._records: Final[list[Record]] = []

    def at_once(self) -> StateStream | None:
        """Return the stream if all of it is here, else None.

        Raises:
            StreamCorrupt: what came is no state stream, or is not all of it.
        """
        while not self._reader.ended:
            try:
                data = self._sock.recv(_PIECE)
            except BlockingIOError:
                return None
            except OSError as error:
                raise StreamCorrupt(reason="the connection broke before its end record") from error
            if not data:
                self._reader.close()
            self._records.extend(self._reader.feed(data))
        return StateStream.of(self._records)

    async def all(self) -> StateStream:
        """Wait for the rest, and return the stream. No time limit here. Raises as `at_once` does."""
        while (stream := self.at_once()) is None:
            await trio.lowlevel.wait_readable(self._sock)
        return stream
