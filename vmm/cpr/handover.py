"""The change of owner, both sides of it. What a message says is a hint; the cell alone decides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

import attrs
import trio

from vmm.cpr.cell import Owner
from vmm.errors import CprError, CprPeerGone, CprRefused

if TYPE_CHECKING:
    from vmm.capabilities import MayReleaseGuest
    from vmm.cpr.cell import OwnershipCell
    from vmm.cpr.channel import CprChannel, Message
    from vmm.cpr.steps import Steps

_RECHECK: Final = 0.05
"""Seconds between two looks at a cell that was taken: a destination passes from TAKEN to RUNNING in microseconds,
so this is waited for only where it was stalled or died in between."""

_DYING: Final = 1.0
"""Seconds for a destination whose channel ended to be seen to die, for the report alone: the guest is its own by then.
A process closes its descriptors before its pidfd tells that it has died."""


@final
@attrs.frozen
class Given:
    """A guest that is the destination's."""

    resumed_ns: int | None
    """CLOCK_MONOTONIC of its first entry there; None if the destination did not say."""
    lost: str = ""
    """A sentence if the destination is known to have died with the guest."""


async def give(may: MayReleaseGuest, cell: OwnershipCell, channel: CprChannel, steps: Steps, *, within: float) -> Given:
    """Offer the guest and return once the destination runs it.

    From the offer on this process makes no vCPU ioctl. On an error the guest is back with this process. A
    cancellation is held off while the guest is merely offered (at most `within` seconds); once it is taken it is no
    longer ours to wait for.

    Raises:
        CprError: the destination did not take the guest, or died before it ran it.
    """
    # A cancel that has been asked for counts now, and not between the offer and the shield.
    await trio.lowlevel.checkpoint_if_cancelled()
    may.offer()
    steps.reach("offered")
    refusal: CprError | None = None
    with trio.CancelScope(shield=True):
        with trio.move_on_after(within):
            try:
                await channel.send("offered", {})
                message = await channel.receive("running")
                found = cell.owner
                if found is Owner.RUNNING:
                    return Given(_moment(message))
                reason = f"it said that it runs the guest, and the ownership cell says {found.name}"
                refusal = CprRefused(side=channel.side, step=steps.current, reason=reason)
            except CprError as error:
                refusal = error
        if may.take_back():
            raise refusal or _gone(channel, steps, f"did not take the guest within {within:g} s")
    while cell.owner is not Owner.RUNNING:
        if channel.peer_is_dead() and cell.reclaim():
            raise _gone(channel, steps, "died after it took the guest and before it ran it")
        with trio.move_on_after(_RECHECK):
            await channel.peer_died()
    if isinstance(refusal, CprPeerGone):
        with trio.move_on_after(_DYING):
            await channel.peer_died()
            what = "died when it had begun to run the guest"
            lost = CprPeerGone(peer=channel.peer, what=what, step=steps.current, outcome="the guest died with it")
            return Given(None, str(lost))
    return Given(None)


def _moment(message: Message) -> int | None:
    moment = message.body.get("resumed-ns")
    return moment if isinstance(moment, int) else None


def _gone(channel: CprChannel, steps: Steps, what: str) -> CprPeerGone:
    return CprPeerGone(peer=channel.peer, what=what, step=steps.current, outcome="the guest goes on in the source")


async def take(cell: OwnershipCell, channel: CprChannel, steps: Steps) -> None:
    """Wait for the offer and take the guest. When this returns, this process owns it, and nobody else.

    Waits as long as the source lives: a stalled source is still the owner, and goes on when it wakes. Between the swap
    that takes the guest and the return there is no cancel point.

    Raises:
        CprError: the source took the guest back, died as its owner, or ended the attempt.
    """
    failure: CprError | None = None
    try:
        await channel.receive("offered")
    except CprError as error:
        # A source that died, or broke off, right after it had offered: then the guest is for the taking.
        failure = error
    # A cancel that has been asked for counts now, and not after the guest was taken.
    await trio.lowlevel.checkpoint_if_cancelled()
    steps.reach("offer-seen")
    if not cell.take():
        raise failure or _lost(channel, steps, "took the guest back")
    steps.reach("taken")
    if not cell.run():
        raise _lost(channel, steps, "reclaimed the guest")


def _lost(channel: CprChannel, steps: Steps, what: str) -> CprPeerGone:
    return CprPeerGone(peer=channel.peer, what=what, step=steps.current, outcome="nothing was taken over")
