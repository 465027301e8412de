"""Further channels of a migration: how a source says which one it opens, and how its destination finds them.

A further channel begins with 36 bytes, by which the destination, that still listens, knows it from a stranger's::

    8 bytes magic (89 54 56 4d 43 0d 0a 1a)   u16 version 1   u8 kind (1 multifd, 2 preempt)   u8 zero
    u16 number, from 0   u16 zero   16 bytes: the migration's identity, of the terms   u32 CRC-32 of all before it

The source opens them when the destination has said `ready`, so the identity is known by then. It is no secret where
there is no TLS.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Final, Literal, final
from zlib import crc32

import attrs
import trio

from vmm.errors import MigrationPeerGone, StreamCorrupt, VmmError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vmm.migration.connection import Connection

ChannelKind = Literal["multifd", "preempt"]

ID_SIZE: Final = 16
MAGIC: Final = b"\x89TVMC\r\n\x1a"
_VERSION: Final = 1
_KINDS: Final[tuple[ChannelKind, ...]] = ("multifd", "preempt")
_BODY: Final = struct.Struct(f"<8sHBxHxx{ID_SIZE}s")
_CRC: Final = struct.Struct("<I")
SIZE: Final = _BODY.size + _CRC.size

_STRANGERS: Final = 32
"""Connections that are looked at at a time. More than there are channels, so that none is kept out by strangers."""


def new_id() -> str:
    """Return the identity of a migration, as the terms have it: 32 hexadecimal digits."""
    return os.urandom(ID_SIZE).hex()


@final
@attrs.frozen
class Preamble:
    """How a further channel begins."""

    kind: ChannelKind
    number: int
    """From 0."""
    id: str
    """Of the migration that it belongs to."""

    def encode(self) -> bytes:
        """Return its bytes."""
        body = _BODY.pack(MAGIC, _VERSION, _KINDS.index(self.kind) + 1, self.number, bytes.fromhex(self.id))
        return body + _CRC.pack(crc32(body))

    @classmethod
    def decode(cls, data: bytes) -> Preamble:
        """Undo `encode`. Raises `StreamCorrupt`."""
        magic, version, kind, number, identity = _BODY.unpack_from(data)
        if magic != MAGIC:
            raise StreamCorrupt(reason=f"a further channel begins with {data[:8]!r}, expected {MAGIC!r}")
        if (found := crc32(data[: _BODY.size])) != (expected := _CRC.unpack_from(data, _BODY.size)[0]):
            raise StreamCorrupt(reason=f"a further channel's beginning has CRC-32 {found:#010x}, not {expected:#010x}")
        if version != _VERSION or not 1 <= kind <= len(_KINDS):
            raise StreamCorrupt(
                reason=f"a further channel of version {version} and kind {kind}; version {_VERSION} and kinds 1 to "
                f"{len(_KINDS)} are known here"
            )
        return cls(_KINDS[kind - 1], number, identity.hex())


async def open_channels(
    dial: Callable[[], Awaitable[Connection]], kind: ChannelKind, count: int, identity: str
) -> list[Connection]:
    """Open further channels, as the source, and say which they are. They are the caller's.

    Raises:
        VmmError: one of them cannot be opened; none is open then.
    """
    found: list[Connection] = []
    try:
        for number in range(count):
            connection = await dial()
            found.append(connection)
            assert connection.stream is not None, "whoever listens can be dialled again, and can answer"
            try:
                await connection.stream.send_all(Preamble(kind, number, identity).encode())
            except trio.BrokenResourceError as error:
                what = f"closed channel {number} of kind {kind} at once"
                raise MigrationPeerGone(
                    peer="destination", what=what, outcome="the guest goes on in the source"
                ) from error
    except BaseException:
        for connection in found:
            connection.close()
        raise
    return found


@final
class Gathering:
    """A destination that waits for further channels of one migration, among whoever connects.

    Args:
        accept: waits for the next connection.
        secure: makes it secure, where that is set; it is closed if it cannot be.
        complain: says what was wrong with a stranger.
        each: seconds that one who has connected has to say which channel it is.
        gone: returns if the source has gone.
    """

    def __init__(
        self,
        accept: Callable[[], Awaitable[Connection]],
        secure: Callable[[Connection], Awaitable[Connection]],
        complain: Callable[[str], None],
        *,
        identity: str,
        each: float,
        gone: Callable[[], Awaitable[None]],
    ) -> None:
        self._gone = gone
        self._accept = accept
        self._secure = secure
        self._complain = complain
        self._identity = identity
        self._each = each

    async def gather(self, kind: ChannelKind, count: int, *, within: float) -> list[Connection]:
        """Return the channels by number. They are the caller's. Strangers, and what comes twice, are refused.

        A cancellation closes what has come.

        Raises:
            MigrationPeerGone: not all have come within so many seconds, or before the source has gone.
        """
        found: dict[int, Connection] = {}
        left = False

        async def watch(scope: trio.CancelScope) -> None:
            nonlocal left
            await self._gone()
            left = True
            scope.cancel()

        try:
            with trio.move_on_after(within):
                async with trio.open_nursery() as nursery:
                    room = trio.Semaphore(_STRANGERS)
                    nursery.start_soon(watch, nursery.cancel_scope)
                    while len(found) < count:
                        await room.acquire()
                        connection = await self._accept()
                        nursery.start_soon(self._look_at, connection, kind, count, found, room, nursery.cancel_scope)
            if len(found) < count:
                what = f"opened {len(found)} of {count} channels of kind {kind}"
                what = f"closed the connection, and {what}" if left else f"{what} within {within:g} s"
                raise MigrationPeerGone(peer="source", what=what, outcome="the guest stays there")
        except BaseException:
            for connection in found.values():
                connection.close()
            raise
        return [found[number] for number in range(count)]

    async def _look_at(
        self,
        connection: Connection,
        kind: ChannelKind,
        count: int,
        found: dict[int, Connection],
        room: trio.Semaphore,
        scope: trio.CancelScope,
    ) -> None:
        kept = False
        try:
            with trio.move_on_after(self._each) as patience:
                connection = await self._secure(connection)
                preamble = Preamble.decode(await _read(connection, SIZE))
                self._check(preamble, kind, count, found)
                found[preamble.number] = connection
                kept = True
                if len(found) == count:
                    scope.cancel()
            if patience.cancelled_caught:
                self._complain(f"Whoever connected did not say within {self._each:g} s which channel it is")
        except VmmError as error:
            self._complain(str(error))
        finally:
            room.release()
            if not kept:
                connection.close()

    def _check(self, preamble: Preamble, kind: ChannelKind, count: int, found: dict[int, Connection]) -> None:
        what = f"channel {preamble.number} of kind {preamble.kind}"
        if preamble.id != self._identity:
            raise StreamCorrupt(reason=f"{what} is of another migration, {preamble.id}, than is under way here")
        if preamble.kind != kind or preamble.number >= count:
            raise StreamCorrupt(reason=f"{what} is not expected; numbers 0 to {count - 1} of kind {kind} are")
        if preamble.number in found:
            raise StreamCorrupt(reason=f"{what} has come already")


async def _read(connection: Connection, size: int) -> bytes:
    stream = connection.stream
    assert stream is not None, "it was accepted, so it is a socket"
    data = b""
    while len(data) < size:
        try:
            piece = await stream.receive_some(size - len(data))
        except trio.BrokenResourceError:
            piece = b""
        if not piece:
            raise StreamCorrupt(reason=f"a further channel ended after {len(data)} of the {size} bytes it begins with")
        data += piece
    return data
