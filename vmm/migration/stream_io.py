"""Moving a state stream over a channel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

import attrs
import trio

from vmm.errors import StreamCorrupt
from vmm.migration.stream import STREAM_LIMIT, StreamReader
from vmm.migration.stream_records import Header, RamExtents, Recipe, Section

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmm.migration.stream import StreamWriter
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


async def send_stream(channel: trio.abc.SendStream, writer: StreamWriter) -> int:
    """Finish `writer` and send what it holds; return the number of bytes. The channel stays open.

    A cancellation may leave part of the stream sent: then the channel is of no further use.

    Raises:
        trio.BrokenResourceError: the other side is gone. The caller knows who that was and what it means.
    """
    data = b"".join(writer.finish())
    await channel.send_all(data)
    return len(data)


async def receive_stream(channel: trio.abc.ReceiveStream, *, limit: int = STREAM_LIMIT) -> StateStream:
    """Read one stream from `channel`, up to its end record. The channel stays open.

    A cancellation loses what was read: then the channel is of no further use. There is no time limit here.

    Args:
        limit: bytes of the whole stream.

    Raises:
        StreamCorrupt: what came is no state stream, or is not all of it.
    """
    reader = StreamReader(limit=limit)
    records: list[Record] = []
    while not reader.ended:
        try:
            data = await channel.receive_some(_PIECE)
        except trio.BrokenResourceError as error:
            raise StreamCorrupt(reason="the connection broke before its end record") from error
        if not data:
            reader.close()
        records += reader.feed(data)
    return StateStream.of(records)
