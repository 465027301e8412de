"""Phase ``handover``: the guest changes its owner."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import attrs

from vmm.capabilities import MayReleaseGuest
from vmm.cpr.handover import give

if TYPE_CHECKING:
    from vmm.capabilities import Mint
    from vmm.cpr.handover import Given
    from vmm.nursery_tree import Phase
    from vmm.phases.quiesced import Transfer


@final
@attrs.frozen
class HandoverGrants:
    """Tokens of this phase."""

    release_guest: MayReleaseGuest


async def run_handover(quiesced: Phase, transfer: Transfer) -> Given:
    """Offer the guest, and return once the destination runs it. Raises `CprError` if it stays here."""
    async with quiesced.child("handover") as phase:

        def grants(mint: Mint) -> HandoverGrants:
            return HandoverGrants(release_guest=mint(MayReleaseGuest, transfer.cell))

        channel, steps = transfer.channel, transfer.steps
        channel.step = "handing over"
        async with phase.window(grants) as window:
            given = await give(
                window.grants.release_guest, transfer.cell, channel, steps, within=transfer.limits.taking
            )
            steps.reach("given")
    return given
