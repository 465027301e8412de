"""Sending to a TCP socket without a copy: the network's card reads the pages where they lie.

The kernel tells on the socket's error queue when it needs a range of sends no more, and whether it has copied them all
the same, as it must on the loopback. A page that the guest writes to meanwhile goes again, as any other.

Source: Linux Documentation/networking/msg_zerocopy.rst; include/uapi/linux/errqueue.h.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from typing import TYPE_CHECKING, Final, final

from vmm import hostio
from vmm.errors import MigrationRefused

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.migration.pump import Bulk

_SO_ZEROCOPY: Final = 60
_MSG_ZEROCOPY: Final = 0x4000000
_ORIGIN: Final = 5  # SO_EE_ORIGIN_ZEROCOPY
_COPIED: Final = 1  # SO_EE_CODE_ZEROCOPY_COPIED
_ERROR: Final = struct.Struct("=IBBBBII")  # struct sock_extended_err
_ROOM: Final = 256  # bytes of one message's control data
_IOV_MAX: Final = 1024


@final
class ZeroCopy:
    """The sends of one socket. For one thread."""

    def __init__(self, bulk: Bulk) -> None:
        """Raises `MigrationRefused` where the socket cannot."""
        self._bulk: Final = bulk
        self._sock: Final = socket.socket(fileno=hostio.dup(bulk.fd))
        try:
            if self._sock.family not in (socket.AF_INET, socket.AF_INET6):
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            self._sock.setsockopt(socket.SOL_SOCKET, _SO_ZEROCOPY, 1)
        except OSError as error:
            self._sock.close()
            reason = os.strerror(error.errno or 0)
            raise MigrationRefused(
                reason=f"migrate: zero-copy-send is for tcp: without TLS ({reason}); turn it off"
            ) from error
        self._under_way = 0
        self._copied = False
        self.missed = 0
        """How often `settle` found that something was copied all the same."""

    def send(self, pieces: Sequence[memoryview]) -> None:
        """Send all of `pieces`, which must stay until `settle`. Raises `ChannelBroken`."""
        left = list(pieces)
        flags = _MSG_ZEROCOPY
        while left:
            try:
                count = self._sock.sendmsg(left[:_IOV_MAX], [], flags | socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._reap()  # else the poll would not wait for room
                self._bulk.wait_for(select.POLLOUT)
                continue
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise self._bulk.failure("write", error) from error
                # So much memory of a process may be locked, or so much told of sends: some of them have to end first.
                if self._under_way:
                    self._bulk.wait_for(select.POLLERR)
                    self._reap()
                else:
                    flags = 0
                continue
            if flags:
                self._under_way += 1
            else:
                self._copied = True
            self._bulk.bytes += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if count:
                left[0] = left[0][count:]

    def settle(self) -> None:
        """Wait until the kernel needs nothing any more of what was sent. Raises `ChannelBroken`."""
        self._reap()
        while self._under_way:
            self._bulk.wait_for(select.POLLERR)
            self._reap()
        self.missed += self._copied
        self._copied = False

    def _reap(self) -> None:
        """Take in what the kernel has told."""
        while self._under_way:
            try:
                _, told, _, _ = self._sock.recvmsg(0, _ROOM, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                raise self._bulk.failure("write", error) from error
            for _, _, data in told:
                number, origin, _, code, _, first, last = _ERROR.unpack_from(data)
                if origin == _ORIGIN and not number:
                    self._under_way -= (last - first & 0xFFFF_FFFF) + 1
                    self._copied = self._copied or bool(code & _COPIED)

    def close(self) -> None:
        """Let go of the socket. Idempotent."""
        self._sock.close()
