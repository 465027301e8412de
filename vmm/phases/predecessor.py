"""The process that a guest came from, kept ready to take it back."""

from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING, Final, final

import attrs

from vmm.errors import HostFileRefused, MigrationRefused, OptionInvalid, Unsupported
from vmm.migration.address import UnixAddress
from vmm.migration.channel import Channels, outgoing_channels

if TYPE_CHECKING:
    from vmm.cpr.channel import CprChannel

_NAME: Final = 200
"""Characters that are kept of a program's name."""


@final
@attrs.define(eq=False)
class Predecessor:
    """It waits at a berth as long as `leash`, which is owned, is open."""

    pid: int
    program: str
    """What it calls itself."""
    channels: Channels
    _leash: int

    @classmethod
    def of(cls, told: object, channel: CprChannel) -> Predecessor | None:
        """Return the one that `told` says, a member of the last message on `channel`.

        None where that says nothing, or no such thing: the guest is here, and does not depend on it.
        """
        if not isinstance(told, dict):
            return None
        try:
            channels = outgoing_channels(None, told.get("channels"))
            if not isinstance(channels.main, UnixAddress) or not isinstance(channels.cpr, UnixAddress):
                return None  # A number would be a descriptor of this process's.
            return cls(channel.peer_pid, str(told.get("program"))[:_NAME], channels, channel.leash())
        except (OptionInvalid, Unsupported, MigrationRefused, HostFileRefused, TypeError):
            return None

    @property
    def waits(self) -> bool:
        """Whether it is still there."""
        poll = select.poll()
        poll.register(self._leash, select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        """Let it end. Idempotent."""
        if self._leash >= 0:
            os.close(self._leash)
            self._leash = -1
