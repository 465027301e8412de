"""What the two sides of a migration say to each other, on the connection that the state takes.

    destination   ready                  in answer to the recipe: the machine is here, and its RAM may come
                  acknowledged           where the terms ask for it: the guest may be stopped
                  prepared               in answer to the notice of the switchover: it has made ready
                  loaded                 in answer to the rest: all of it is in force
                  refused, and why       at any time before; nothing of it is in force
    source        yours                  in answer to loaded: run it; from here on it does not run in the source

A word is a line of JSON. A guest never runs on both sides: the destination runs it after `yours`, and the source says
that only once it has let go of it; or after it has taken it by an ownership cell, whose descriptor comes with
`prepared` over a unix socket. Then it says `loaded` when the guest runs, and there is no answer.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from typing import TYPE_CHECKING, Final, Literal, final, get_args

import attrs
import trio

from vmm.errors import MigrationPeerGone, StreamCorrupt
from vmm.migration.silence import silence

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio.abc import ReceiveStream, SendStream

WordName = Literal["ready", "acknowledged", "prepared", "loaded", "refused", "yours"]

_NAMES: Final[tuple[str, ...]] = get_args(WordName)
_LIMIT: Final = 16384  # bytes of a line
_DESCRIPTOR: Final = struct.Struct("@i")
_REASON_LIMIT: Final = 2048  # characters; an escaped one has six bytes


@final
@attrs.frozen
class Word:
    """One word."""

    name: WordName
    reason: str = ""
    """Of `refused`: a sentence."""
    at: int | None = None
    """Of `loaded`, for a guest that was taken: when it ran here, CLOCK_MONOTONIC in ns; None where it does not."""


async def say(channel: SendStream, word: Word) -> None:
    """Say `word`. Raises `trio.BrokenResourceError` where nobody listens any more."""
    await channel.send_all(written(word))


async def say_with_descriptor(channel: trio.SocketStream, word: Word, fd: int) -> None:
    """Say `word`, and send descriptor `fd` along, over a unix socket; without it if it may not go. Raises as `say`."""
    line = written(word)
    try:
        sent = await channel.socket.sendmsg([line], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _DESCRIPTOR.pack(fd))])
    except OSError:
        sent = 0  # Of a descriptor that may not go the peer knows what to do. If nobody listens, this is told next.
    await channel.send_all(line[sent:])


def written(word: Word) -> bytes:
    """Return the line that says `word`."""
    body: dict[str, object] = {"word": word.name}
    if word.reason:
        body["reason"] = word.reason[:_REASON_LIMIT]
    if word.at is not None:
        body["at"] = word.at
    return json.dumps(body).encode() + b"\n"


@final
class Ear:
    """Hears the words of `peer`, one by one.

    Args:
        outcome: what its silence leads to, for the text of the error.
    """

    def __init__(self, channel: ReceiveStream, peer: str, outcome: str) -> None:
        self._channel: Final = channel
        self._peer: Final = peer
        self._outcome: Final = outcome
        self._heard = b""  # what came with the word before

    async def hear(self) -> Word:
        """Wait for the next word.

        Raises:
            MigrationPeerGone: it closed the connection instead, or does not answer any more.
            StreamCorrupt: it said something else.
        """
        while b"\n" not in self._heard:
            if len(self._heard) > _LIMIT:
                raise StreamCorrupt(reason=f"the {self._peer} says more than {_LIMIT} bytes where a word was expected")
            try:
                data = await self._channel.receive_some(_LIMIT)
            except trio.BrokenResourceError as error:
                raise _gone(self._peer, self._outcome, silence(error.__cause__)) from error
            if not data:
                raise _gone(self._peer, self._outcome)
            self._heard += data
        line, _, self._heard = self._heard.partition(b"\n")
        return _parse(line + b"\n", self._peer)

    async def hear_with_descriptor(self) -> tuple[Word, int | None]:
        """Hear the next word, over a unix socket, and the descriptor that comes with it, which is the caller's then.

        None comes where somebody is in between who does not pass it on, or this process may have no more. Raises as
        `hear`.
        """
        assert isinstance(self._channel, trio.SocketStream)
        found: list[int] = []
        try:
            while b"\n" not in self._heard and len(self._heard) <= _LIMIT:
                try:
                    # With room for one: the kernel closes all others.
                    data, ancillary, _, _ = await self._channel.socket.recvmsg(
                        _LIMIT, socket.CMSG_LEN(_DESCRIPTOR.size), socket.MSG_CMSG_CLOEXEC
                    )
                except OSError as error:
                    raise _gone(self._peer, self._outcome, silence(error)) from error
                found += [_DESCRIPTOR.unpack(content)[0] for _, kind, content in ancillary if kind == socket.SCM_RIGHTS]
                while len(found) > 1:
                    os.close(found.pop())
                if not data:
                    raise _gone(self._peer, self._outcome)
                self._heard += data
            word = await self.hear()
            return word, found.pop(0) if found else None
        finally:
            for fd in found:
                os.close(fd)


async def hear_soon(ear: Ear, late: Callable[[], None], *, within: float = 1.0) -> Word:
    """Hear the next word; call `late` once it has not come `within` so many seconds. Raises as `Ear.hear`."""
    with trio.move_on_after(within):
        return await ear.hear()
    late()
    return await ear.hear()


def _is_moment(at: object) -> bool:
    return at is None or (isinstance(at, int) and 0 <= at < 1 << 63)


def _gone(peer: str, outcome: str, what: str | None = None) -> MigrationPeerGone:
    return MigrationPeerGone(peer=peer, what=what or "closed the connection", outcome=outcome)


def _parse(line: bytes, peer: str) -> Word:
    try:
        body = json.loads(line)
        name, reason, at = body["word"], body.get("reason", ""), body.get("at")
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        name, reason, at = None, "", None
    if name not in _NAMES or not isinstance(reason, str) or not _is_moment(at):
        raise StreamCorrupt(reason=f"the {peer} says {line[:40]!r}, expected one of {', '.join(_NAMES)}")
    return Word(name, reason, at)
