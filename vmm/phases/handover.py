"""Phase ``handover``: the guest changes its owner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

import attrs

from vmm.capabilities import MayReleaseGuest
from vmm.cpr.handover import give

if TYPE_CHECKING:
    from vmm.capabilities import Mint
    from vmm.nursery_tree import Phase
    from vmm.phases.quiesced import Stopwatch, Transfer

TAKING: Final = 1.0
"""Seconds that an offer stands."""


@final
@attrs.frozen
class HandoverGrants:
    """Tokens of this phase."""

    release_guest: MayReleaseGuest


async def run_handover(quiesced: Phase, transfer: Transfer, watch: Stopwatch) -> None:
    """Offer the guest, and return once the destination runs it. Raises `CprError` if it stays here."""
    async with quiesced.child("handover") as phase:

        def grants(mint: Mint) -> HandoverGrants:
            return HandoverGrants(release_guest=mint(MayReleaseGuest, transfer.cell))

        transfer.channel.step = "handing over"
        async with phase.window(grants) as window:
            resumed = await give(
                window.grants.release_guest, transfer.cell, transfer.channel, transfer.steps, within=TAKING
            )
            watch.lap("resume", resumed)
            transfer.steps.reach("given")
