"""How long a peer over tcp may give no sign of life before a channel is given up.

Without this a network that was cut is noticed after a quarter of an hour where something was sent, and never where one
only listens: the kernel goes on trying (Linux Documentation/networking/ip-sysctl.rst, tcp_retries2). Two clocks are
needed: a peer that owes nothing is asked now and then (`SO_KEEPALIVE`), and one that owes an acknowledgement is not, so
that has a limit of its own (`TCP_USER_TIMEOUT`). The latter holds too for a peer that is there and takes nothing.
Source: Linux tcp(7); net/ipv4/tcp_timer.c, tcp_keepalive_timer, tcp_probe_timer.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import trio

UNANSWERED_MS: Final = 30_000
"""For what was sent to be acknowledged, and for a peer that takes no more to take more."""

IDLE_SECONDS: Final = 10
"""After which a peer that sends nothing is asked."""

INTERVAL_SECONDS: Final = 5
PROBES: Final = 4
"""It is asked so often, so far apart."""


SILENT: Final = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)
"""What a socket fails with whose peer was silent for too long."""


def bound_silence(sock: socket.socket | trio.socket.SocketType, *, ask: bool = True) -> None:
    """Let a socket fail with ETIMEDOUT once its peer has been silent for too long.

    What its owner has set before stays as it is, and so does a unix socket.

    Args:
        ask: whether an idle peer is asked for a sign of life.
    """
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
        return
    if ask and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, INTERVAL_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
    if not sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNANSWERED_MS)


def silence(error: BaseException | None) -> str | None:
    """Say what a peer does, if `error` is that of a socket whose peer was silent for too long."""
    if isinstance(error, OSError) and error.errno in SILENT:
        return f"does not answer any more ({os.strerror(error.errno)})"
    return None
