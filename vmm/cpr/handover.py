"""The change of owner, both sides of it. What a message says is a hint; the cell alone decides."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import trio

from vmm.cpr.cell import Owner
from vmm.errors import CprError, CprPeerGone

if TYPE_CHECKING:
    from vmm.capabilities import MayReleaseGuest
    from vmm.cpr.cell import OwnershipCell
    from vmm.cpr.channel import CprChannel
    from vmm.cpr.steps import Steps

_RECHECK: Final = 0.05
"""Seconds between two looks at a cell that was taken: a destination passes from TAKEN to RUNNING in microseconds,
so this is waited for only where it was stalled or died in between."""


async def give(
    may: MayReleaseGuest, cell: OwnershipCell, channel: CprChannel, steps: Steps, *, within: float
) -> int:
    """Offer the guest and return once the destination runs it: its CLOCK_MONOTONIC of the first entry, in ns.

    From the offer on this process makes no vCPU ioctl. On an error the guest is back with this process. A
    cancellation is held off while the guest is merely offered (at most `within` seconds); once it is taken it is no
    longer ours to wait for.

    Raises:
        CprError: the destination did not take the guest, or died before it ran it.
    """
    refusal: CprError | None = None
    with trio.CancelScope(shield=True):
        may.offer()
        steps.reach("offered")
        with trio.move_on_after(within):
            try:
                await channel.send("offered", {})
                message = await channel.receive("running")
                if cell.owner is Owner.RUNNING:
                    return _moment(message.body.get("resumed-ns"))
            except CprError as error:
                refusal = error
        if may.take_back():
            raise refusal or _gone(channel, steps, f"did not take the guest within {within:g} s")
    while cell.owner is not Owner.RUNNING:
        if channel.peer_is_dead() and cell.reclaim():
            raise _gone(channel, steps, "died after it took the guest and before it ran it")
        with trio.move_on_after(_RECHECK):
            await channel.peer_died()
    return time.monotonic_ns()


def _moment(value: object) -> int:
    return value if isinstance(value, int) else time.monotonic_ns()


def _gone(channel: CprChannel, steps: Steps, what: str) -> CprPeerGone:
    return CprPeerGone(peer=channel.peer, what=what, step=steps.current, outcome="the guest goes on in the source")


async def take(cell: OwnershipCell, channel: CprChannel, steps: Steps) -> None:
    """Wait for the offer and take the guest. When this returns, this process owns it, and nobody else.

    Waits as long as the source lives: a stalled source is still the owner, and goes on when it wakes.

    Raises:
        CprError: the source took the guest back, died as its owner, or ended the attempt.
    """
    failure: CprError | None = None
    try:
        await channel.receive("offered")
    except CprError as error:
        # A source that died, or broke off, right after it had offered: then the guest is for the taking.
        failure = error
    steps.reach("offer-seen")
    if not cell.take():
        raise failure or CprPeerGone(
            peer=channel.peer, what="took the guest back", step=steps.current, outcome="nothing was taken over"
        )
    steps.reach("taken")
    if not cell.run():
        raise CprPeerGone(
            peer=channel.peer, what="reclaimed the guest", step=steps.current, outcome="nothing was taken over"
        )
