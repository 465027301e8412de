"""A berth: where a guest can arrive by live update, for a process that is to be found by one other process alone.

Two listening sockets, for the main and the CPR channel, under names in the abstract namespace that nobody guesses by
chance: so nothing is left on disk, however the process ends. Every user can read and connect to such a name, so who
connects is looked at: on the CPR channel before a byte is read and by its hello, on the main one when accepted. The
sockets can be handed to a child, or be kept over the end of one machine and the start of the next in this process.

Source: unix(7), abstract sockets.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any, Final, final

import attrs

from vmm import host_sockets
from vmm.migration.address import DescriptorAddress, UnixAddress
from vmm.migration.channel import Channel, Channels

if TYPE_CHECKING:
    import socket

_KINDS: Final = ("main", "cpr")


@final
@attrs.define(eq=False)
class Berth:
    """The two sockets, which it owns, and their names."""

    channels: Channels
    """Where to connect to."""
    _sockets: dict[str, socket.socket]

    @classmethod
    def bind(cls) -> Berth:
        """Make one. Raises `HostFileRefused` where the host has no descriptor left."""
        word = secrets.token_hex(16)
        sockets: dict[str, socket.socket] = {}
        try:
            for kind in _KINDS:
                sockets[kind] = host_sockets.listen_abstract(f"trio-vmm/{word}/{kind}")
        except BaseException:
            for sock in sockets.values():
                sock.close()
            raise
        main, cpr = (UnixAddress(f"trio-vmm/{word}/{kind}", abstract=True) for kind in _KINDS)
        return cls(Channels(main, cpr), sockets)

    def filenos(self) -> tuple[int, ...]:
        """Return the numbers of the two sockets, for a child to inherit."""
        return tuple(sock.fileno() for sock in self._sockets.values())

    def incoming(self) -> list[dict[str, Any]]:
        """Return the channels that `migrate-incoming` gets in the process that has the sockets, by their numbers."""
        return [Channel(kind, DescriptorAddress(str(self._sockets[kind].fileno()))).to_json() for kind in _KINDS]

    def occupy(self) -> list[dict[str, Any]]:
        """Return what `incoming` does. Whoever carries that out owns the sockets from here on."""
        channels = self.incoming()
        for sock in self._sockets.values():
            sock.detach()
        self._sockets.clear()
        return channels

    def close(self) -> None:
        """Close the sockets that are still the berth's. Idempotent."""
        for sock in self._sockets.values():
            sock.close()
        self._sockets.clear()
