"""What of a client of qtest goes to a successor, besides its connection."""

from __future__ import annotations

from typing import Annotated, ClassVar, final

import attrs

from vmm.hw.state import I64, U32, Items, Octets, Schema
from vmm.qtest.protocol import MAX_LINE

READ_SIZE = 64 << 10
"""Bytes that are read at once at most."""

_RUNS = 16
"""Replies and interrupts that wait take turns, and there is one reply at most."""


@final
@attrs.frozen(kw_only=True)
class Interception:
    """What a client is told the interrupts of."""

    path: Annotated[bytes, Octets(256)]  # ASCII, as are all lines
    name: Annotated[bytes, Octets(256)] | None
    inputs: bool


@final
@attrs.frozen(kw_only=True)
class Unsent:
    """Lines that wait to be sent, of one kind."""

    data: Annotated[bytes, Octets(8 << 20)]
    events: bool


@final
@attrs.frozen(kw_only=True)
class QtestSessionState:
    """A session that is held."""

    unread: Annotated[bytes, Octets(MAX_LINE + 1 + READ_SIZE)] = b""
    """Input of which nothing has been carried out, from the beginning of a line, or of what is left of it."""
    overlong: bool = False
    """Whether that is in the middle of a line that is too long already."""
    unsent: Annotated[tuple[Unsent, ...], Items(_RUNS)] = ()
    intercepted: Interception | None = None


@final
@attrs.frozen(kw_only=True)
class NumberedSession:
    """A session, with the number that its descriptor has."""

    number: U32
    state: QtestSessionState


@final
@attrs.frozen(kw_only=True)
class QtestServerState:
    """All clients of a qtest."""

    SCHEMA: ClassVar[Schema] = Schema("qtest-server", version=1, accepts=1)

    log_began: I64 = 0
    """When the log began: CLOCK_MONOTONIC, nanoseconds."""
    sessions: Annotated[tuple[NumberedSession, ...], Items(1024)] = ()
