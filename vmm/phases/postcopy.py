"""Phase ``postcopy``: the guest runs at the destination, and some of its RAM is still at the source. On both sides.

From the moment that the source lets go of the guest it cannot run there again. If the connection breaks both sides wait
for another one: `migrate-recover` at the destination, then `migrate` with `resume` at the source.

The two sides are `postcopy_source` and `postcopy_target`; here is what they have in common.
"""

from __future__ import annotations

import os
import socket
from typing import Final, final

import attrs
import trio

from vmm.capabilities import (
    MayCancelMigration,
    MayCreateBackend,
    MayOpenHostFile,
    MayPlugDevice,
    MayRestoreGuest,
    MaySetMigrationCap,
    MayStartMigration,
    MaySteerPostcopy,
)
from vmm.migration.status import MigrationStatus

WITHHELD: Final = (
    MayPlugDevice, MayCreateBackend, MayOpenHostFile, MaySetMigrationCap, MayStartMigration, MayRestoreGuest,
)  # fmt: skip
"""At the destination. At the source the guest is run no more, and the rest is withheld by phase migrating."""

GREETING: Final = 10.0
"""Seconds for the other side to say what it has, on a new connection."""

PAUSED: Final = MigrationStatus.POSTCOPY_PAUSED


@final
@attrs.frozen
class PostcopyGrants:
    """Tokens of this phase at the destination."""

    steer_postcopy: MaySteerPostcopy


@final
@attrs.frozen
class PostcopySourceGrants:
    """Tokens of this phase at the source."""

    steer_postcopy: MaySteerPostcopy
    start_migration: MayStartMigration
    """To resume, and for nothing else."""
    cancel_migration: MayCancelMigration
    """To say that it is too late."""


def hang_up(fd: int) -> None:
    """End a connection for both sides; the descriptor stays the caller's."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it is over already


async def exactly(stream: trio.SocketStream, size: int) -> bytes:
    """Return the next `size` bytes. Raises `trio.BrokenResourceError` where the connection ends before."""
    found = b""
    while len(found) < size:
        data = await stream.receive_some(size - len(found))
        if not data:
            raise trio.BrokenResourceError
        found += data
    return found
