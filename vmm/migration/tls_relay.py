"""The relay of one TLS connection: a thread that encrypts what comes from the engine, and decrypts what comes for it.

OpenSSL works in memory here (BIOs), and this loop moves bytes with sockets that do not block. So both directions go on
whatever the other waits for, and the end of one is not that of the other: `shutdown` at one end becomes close_notify,
and that becomes `shutdown` at the other end.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, final

from vmm.migration.pump import ChannelBroken
from vmm.migration.silence import SILENT

if TYPE_CHECKING:
    import trio

    from vmm.hw.doorbell import Doorbell

_RECORD: Final = 16 * 1024
"""Bytes that a record of TLS has at most."""

_PIECE: Final = 16 * _RECORD
"""Bytes that are moved at once."""

_FAREWELL: Final = 1.0
"""Seconds for a peer to have read why there is no TLS with it."""


class Closed(ChannelBroken):
    """The connection is of no further use."""

    def __init__(self, reason: OSError | None) -> None:
        """Note why; None where the peer hung up."""
        super().__init__(reason)
        self.reason = reason


class _Stopped(Exception):
    """The bell has rung."""


@final
class Relay:
    """One connection. The thread that runs it has it for itself.

    Args:
        net: a connected socket, which does not block. It stays the caller's.
        server: which side of TLS this is.
        hostname: of a client, what the server's certificate must be for.
        to_plain: what a peer is told with which OpenSSL does not even speak of what is wrong: it speaks no TLS.
    """

    def __init__(
        self,
        net: trio.socket.SocketType,
        context: ssl.SSLContext,
        *,
        server: bool,
        hostname: str | None,
        to_plain: bytes = b"",
    ) -> None:
        self._sock = net
        self._net = net.fileno()
        self._arrived = ssl.MemoryBIO()
        self._leaving = ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._arrived, self._leaving, server_side=server, server_hostname=hostname if not server else None
        )
        self._to_plain = to_plain
        self.inner: socket.socket | None = None
        """The socket whose peer is the engine; after the handshake."""
        self._to_net = memoryview(b"")
        self._to_inner = memoryview(b"")
        self._buffer = bytearray(_PIECE)
        self._plain = bytearray(_PIECE)
        self._inner_open = True
        """Whether the engine may still send."""
        self._net_open = True
        """Whether the peer may still send."""
        self._engine_there = True
        """Whether anybody reads what comes."""

    def close(self) -> None:
        """Close the end that the engine's is connected to."""
        if self.inner is not None:
            self.inner.close()

    def shake_hands(self, bell: Doorbell) -> bool:
        """Do the handshake. Return False if the bell has rung first. Raises `Closed`."""
        try:
            while not self._shaken(bell):
                self._flush_all(bell)
                self._wait(bell, {self._net: select.POLLIN})
                self._take_in()
                if not self._net_open:
                    raise Closed(None)
            self._flush_all(bell)
        except _Stopped:
            return False
        return True

    def _shaken(self, bell: Doorbell) -> bool:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            self._part(bell)
            raise Closed(error) from error
        return True

    def _part(self, bell: Doorbell) -> None:
        """Tell the peer, if it listens, what OpenSSL has against it: an alert."""
        limit = time.monotonic() + _FAREWELL
        try:
            os.write(self._net, self._leaving.read() or self._to_plain)
            self._sock.shutdown(socket.SHUT_WR)
            # To close with something unread would be a reset, which may overtake the alert.
            while self._net_open and time.monotonic() < limit:
                self._wait(bell, {self._net: select.POLLIN}, limit)
                with suppress(BlockingIOError):  # what comes is dropped
                    self._net_open = os.readv(self._net, [self._buffer]) > 0
        except OSError:
            return

    def run(self, bell: Doorbell) -> bool:
        """Pass on what comes until both directions have ended. Return False if the bell has rung first.

        Raises:
            Closed: TLS was broken, or the network.
        """
        inner = self.inner
        assert inner is not None
        fd = inner.fileno()
        try:
            self._decrypt(bell)  # what came along with the handshake
            while True:
                self._flush(bell)
                self._deliver(inner)
                if not (self._inner_open or self._to_net or self._leaving.pending) and not self._receives:
                    return True
                wanted = {fd: 0, self._net: 0}
                if self._to_net:
                    wanted[self._net] |= select.POLLOUT
                elif self._inner_open:
                    wanted[fd] |= select.POLLIN
                if self._to_inner:
                    wanted[fd] |= select.POLLOUT
                elif self._net_open:
                    wanted[self._net] |= select.POLLIN
                found = self._wait(bell, wanted)
                if found.get(self._net, 0) & ~select.POLLOUT and not self._to_inner:
                    self._take_in()
                    self._decrypt(bell)
                if found.get(fd, 0) & ~select.POLLOUT and not self._to_net and self._inner_open:
                    self._take_over(inner, bell)
        except _Stopped:
            return False

    @property
    def _receives(self) -> bool:
        return self._net_open or bool(self._to_inner)

    # From the engine to the network.

    def _take_over(self, inner: socket.socket, bell: Doorbell) -> None:
        try:
            count = inner.recv_into(self._plain)
        except BlockingIOError:
            return
        except OSError:  # the engine has closed its end with something unread
            count = 0
        if count:
            self._encrypt(memoryview(self._plain)[:count])
            return
        self._inner_open = False
        self._decrypt(bell)
        # What the peer may still send is read afterwards: nothing that has come must be unread here.
        with suppress(ssl.SSLError):
            self._tls.unwrap()

    def _encrypt(self, data: memoryview) -> None:
        at = 0
        try:
            while at < len(data):
                at += self._tls.write(data[at:])
        except ssl.SSLError as error:
            raise Closed(error) from error

    def _flush(self, bell: Doorbell) -> None:
        """Send what there is, as far as there is room."""
        while True:
            if not self._to_net:
                if not self._leaving.pending:
                    return
                self._to_net = memoryview(self._leaving.read())
            try:
                count = os.write(self._net, self._to_net)
            except BlockingIOError:
                return
            except OSError as error:
                self._to_net = memoryview(b"")
                self._hung_up(error, bell)
                return
            self._to_net = self._to_net[count:]

    def _flush_all(self, bell: Doorbell) -> None:
        self._flush(bell)
        while self._to_net:
            self._wait(bell, {self._net: select.POLLOUT})
            self._flush(bell)

    def _hung_up(self, error: OSError, bell: Doorbell) -> None:
        # It may have said why before: an alert, or a word, which is still to be read.
        self._take_in()
        self._decrypt(bell)
        if self.inner is not None:
            self._deliver(self.inner)
        raise Closed(error if self._net_open else None) from error

    # From the network to the engine.

    def _take_in(self) -> None:
        try:
            count = os.readv(self._net, [self._buffer])
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno in SILENT:
                raise Closed(error) from error
            count = 0  # the peer died
        if count:
            self._arrived.write(memoryview(self._buffer)[:count])
        else:
            self._net_open = False

    def _decrypt(self, bell: Doorbell) -> None:
        """Have all that has come as it was. Nothing that was had before is left, or it is added to."""
        found = bytearray(self._to_inner)
        ended = not self._net_open
        try:
            while data := self._tls.read(_RECORD):
                found += data
            ended = True
        except ssl.SSLWantReadError:
            pass
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            ended = True
        except ssl.SSLError as error:
            self._part(bell)
            raise Closed(error) from error
        self._to_inner = memoryview(found)
        if ended:
            self._net_open = False

    def _deliver(self, inner: socket.socket) -> None:
        try:
            while self._to_inner:
                self._to_inner = self._to_inner[inner.send(self._to_inner) :]
        except BlockingIOError:
            return
        except OSError:  # the engine has closed its end: nobody is there to have it
            self._to_inner = memoryview(b"")
            self._engine_there = False
        if not self._net_open and self._engine_there:
            self._engine_there = False
            try:
                inner.shutdown(socket.SHUT_WR)
            except OSError:
                return

    def _wait(self, bell: Doorbell, wanted: dict[int, int], limit: float | None = None) -> dict[int, int]:
        poll = select.poll()
        poll.register(bell.fd, select.POLLIN)
        for fd, events in wanted.items():
            if events:
                poll.register(fd, events)
        found = dict(poll.poll(None if limit is None else max(0.0, limit - time.monotonic()) * 1000))
        if bell.fd in found:
            raise _Stopped
        return found
