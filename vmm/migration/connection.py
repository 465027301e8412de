"""One channel of a migration, as whoever reads or writes it has it: a stream descriptor, and nothing else.

What serves the channel from beside (a command at its other end, a relay that encrypts) is its attendant: a task of
its own. An attendant that fails is the end of the stream for the reader or the writer; `Connection.blame` says why.
"""

from __future__ import annotations

import os
import select
import socket
import stat
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Protocol, final

import trio

from vmm import hostio
from vmm.errors import HostFileRefused, MigrationPeerGone, StreamCorrupt

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from vmm.errors import VmmError
    from vmm.residents import Residents


class Attendant(Protocol):
    """Whoever serves a connection from beside."""

    name: str
    """Of its task."""

    async def attend(self) -> None:
        """Serve until the connection is over. A cancellation ends it at once; nothing of it stays."""
        ...

    async def blame(self) -> VmmError | None:
        """Say why the connection broke, as far as it is the attendant's doing. Does not wait long to know."""
        ...

    async def finish(self, sock: trio.socket.SocketType, *, sent: bool) -> None:
        """Wait until it has passed on what was sent, or has nothing more to say. Raises `VmmError` if it has not."""
        ...

    def end(self, *, gently: bool) -> None:
        """Have it end: at once, or within a limit of its own, once it has passed on what is under way."""
        ...


@final
class Connection:
    """A channel. Owns its descriptor, which does not block unless it is a file.

    Args:
        target: a connected socket, or a pipe or a file.
        two_way: whether the peer can answer.
        attendant: whoever serves it; `serve` starts it.
    """

    def __init__(
        self,
        target: trio.socket.SocketType | int,
        *,
        two_way: bool | None = None,
        attendant: Attendant | None = None,
    ) -> None:
        self._sock = None if isinstance(target, int) else target
        self.fd = target if isinstance(target, int) else target.fileno()
        self.two_way = self._sock is not None if two_way is None else two_way
        self.is_file = isinstance(target, int) and stat.S_ISREG(os.fstat(target).st_mode)
        """Whether it is a regular file: it has a position and a disk, and nobody at its other end."""
        self.stream = trio.SocketStream(self._sock) if self._sock is not None and self.two_way else None
        """For words; None where there is nobody to answer."""
        near = self._sock is not None and attendant is None and self._sock.family == socket.AF_UNIX
        self.passes_descriptors = near and self.two_way
        """Whether descriptors can be sent along, as far as this end knows: somebody may be in between."""
        self._attendant = attendant
        self._over = False

    def serve(self, residents: Residents) -> Connection:
        """Have the attendant, if there is one, serve from now on. Return the connection."""
        if self._attendant is not None:
            residents.start_soon(self._attendant.name, self._attendant.attend)
        return self

    @asynccontextmanager
    async def explained(self) -> AsyncGenerator[None, None]:
        """Replace what a broken connection leads to by what broke it, where the attendant knows."""
        try:
            yield
        except (HostFileRefused, MigrationPeerGone, StreamCorrupt) as error:
            blame = await self._attendant.blame() if self._attendant is not None else None
            if blame is None:
                raise
            raise blame from error

    async def finish(self, *, sent: bool) -> None:
        """Wait until all that was sent has been passed on, or all that comes has come.

        Raises:
            VmmError: it was not.
        """
        if self._attendant is not None:
            assert self._sock is not None, "an attendant is at the other end of a pair of sockets"
            if sent:
                self._sock.shutdown(socket.SHUT_WR)
            await self._attendant.finish(self._sock, sent=sent)
        self._over = True

    async def hung_up(self) -> None:
        """Return when the peer has gone, or says no more, whatever of it is still unread."""
        with closing(hostio.open_epoll()) as watch:
            watch.register(self.fd, select.EPOLLRDHUP)
            await trio.lowlevel.wait_readable(watch.fileno())

    def release(self) -> trio.socket.SocketType:
        """Return the socket, which is the caller's from now on: there is no connection any more."""
        sock, self.fd = self._sock, -1
        assert sock is not None, "only a socket is given away"
        assert self._attendant is None, "nor one that somebody serves"
        return sock

    def part(self) -> None:
        """Note that all has been said: what is under way when the connection is closed is still passed on."""
        self._over = True

    def close(self) -> None:
        """Close the descriptor, and end the attendant. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd < 0:
            return
        if self._sock is not None:
            self._sock.close()
        else:
            os.close(fd)
        if self._attendant is not None:
            self._attendant.end(gently=self._over)
