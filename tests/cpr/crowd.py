"""One end of a CPR channel as a process of its own, with limits that a test's process could not take back.

`python -m tests.cpr.crowd send|flood|receive SOCKET COUNT LIMIT`: sends COUNT descriptors with RLIMIT_NOFILE at LIMIT,
as a user without privileges, or awaits them. Prints "held up" when it first waits for a moment, and how it ended. The
clock of who floods does not wait.
"""

from __future__ import annotations

import os
import resource
import socket
import sys
from typing import Final, final

import trio
import trio.testing

from vmm.cpr.channel import CprChannel
from vmm.errors import CprError

OUTSIDER: Final = 12345
"""A user id that nobody here has."""


@final
class _HeldUp(trio.abc.Instrument):
    """Says so, once, when the loop waits for a moment: nothing else here has a time."""

    def __init__(self) -> None:
        self._told = False

    def before_io_wait(self, timeout: float) -> None:
        if 0 < timeout < 1 and not self._told:
            self._told = True
            print("held up", flush=True)


def many(count: int) -> dict[str, int]:
    """Name standard input `count` times: each is another descriptor where it arrives."""
    return {f"many/{n}": 0 for n in range(count)}


def main(role: str, sock: int, count: int, limit: int) -> str:
    """Be `role` until it is done; return how that went."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    if role != "receive" and os.getuid() == 0:
        os.setgroups([])
        os.setresuid(OUTSIDER, OUTSIDER, OUTSIDER)

    async def act() -> str:
        side, peer = ("destination", "source") if role == "receive" else ("source", "destination")
        channel = CprChannel(trio.socket.from_stdlib_socket(socket.socket(fileno=sock)), side=side, peer=peer)
        try:
            if role != "receive":
                await channel.send("machine", {}, many(count))
                return "sent"
            message = await channel.receive("machine")
            return f"{len(message.descriptors)} received"
        except CprError as error:
            return str(error)

    clock = trio.testing.MockClock(autojump_threshold=0) if role == "flood" else None
    return trio.run(act, clock=clock, instruments=[_HeldUp()])


if __name__ == "__main__":
    print(main(sys.argv[1], *map(int, sys.argv[2:])))
