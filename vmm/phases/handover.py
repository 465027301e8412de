"""Phase ``handover``: the guest changes its owner."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import attrs

from vmm.capabilities import MayReleaseGuest
from vmm.cpr.handover import give

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vmm.capabilities import Mint
    from vmm.cpr.handover import Given
    from vmm.nursery_tree import Phase
    from vmm.phases.quiesced import Transfer


@final
@attrs.frozen
class HandoverGrants:
    """Tokens of this phase."""

    release_guest: MayReleaseGuest


async def run_handover(quiesced: Phase, transfer: Transfer, loaded: Callable[[], Awaitable[None]]) -> Given:
    """Offer the guest once it is `loaded`, and return once the destination runs it.

    The phase opens while the destination loads, when there is time.

    Raises:
        CprError: the guest stays here.
    """
    async with quiesced.child("handover") as phase:

        def grants(mint: Mint) -> HandoverGrants:
            return HandoverGrants(release_guest=mint(MayReleaseGuest, transfer.cell))

        channel, steps = transfer.channel, transfer.steps
        async with phase.window(grants) as window:
            await loaded()
            channel.step = "handing over"
            given = await give(
                window.grants.release_guest, transfer.cell, channel, steps, within=transfer.limits.taking
            )
            steps.reach("given")
    return given
