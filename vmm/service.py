"""What a service manager is told: which process of the service is the main one now.

systemd watches the process that it started. When the guest goes to another process, so does the service: the process
that had it says so, which is still the main one then, and so is believed. Nothing is said where there is no such
manager, and one that does not listen is no reason to stop anything.

Source: sd_notify(3), MAINPID; the protocol is one datagram to the socket that $NOTIFY_SOCKET names.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final, final

import attrs

if TYPE_CHECKING:
    from collections.abc import Mapping

VARIABLE: Final = "NOTIFY_SOCKET"

_LONGEST: Final = 107
"""Bytes of a unix socket's address."""


@final
@attrs.frozen
class ServiceManager:
    """Where the service manager listens; empty where there is none."""

    address: str = ""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> ServiceManager:
        """Return the one that `environment` names."""
        return cls.named(environment.get(VARIABLE))

    @classmethod
    def named(cls, address: object) -> ServiceManager:
        """Return the one at `address`, a path or @NAME; none at all if it is no such thing."""
        if isinstance(address, str) and address[:1] in ("/", "@") and len(address.encode()) <= _LONGEST:
            return cls(address)
        return cls()

    def main_process_is(self, pid: int) -> None:
        """Say that process `pid` is the service's main one now. Never waits, never raises."""
        if not self.address:
            return
        name = f"\0{self.address[1:]}" if self.address.startswith("@") else self.address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
                sock.sendto(f"MAINPID={pid}\n".encode(), name)
        except (OSError, ValueError):
            return


NO_MANAGER: Final = ServiceManager()
