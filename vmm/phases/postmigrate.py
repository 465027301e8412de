"""Phase ``postmigrate``: the guest lives in another process. This one answers its monitor until it is told to quit.

A guest that was copied is whole here too: may-resume-here runs it again, for those who know that it does not run there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import attrs
import trio

from vmm.capabilities import MayResumeHere
from vmm.decisions import Inbox
from vmm.errors import InvalidState
from vmm.migration.status import MigrationStatus
from vmm.phases.run_state import NEEDS_RESET

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from vmm.capabilities import Mint
    from vmm.nursery_tree import Phase
    from vmm.phases.copying import Gone


@final
@attrs.frozen
class PostmigrateGrants:
    """Tokens of this phase."""

    resume_here: MayResumeHere | None
    """Only after a migration that copied the guest."""


@final
class _Resumption:
    """The facet of `may-resume-here`."""

    def __init__(self, inbox: Inbox[None], left: Gone) -> None:
        self._inbox = inbox
        self._left = left

    def decide(self, _decision: object) -> Awaitable[None]:
        """Post the wish. No saved state can go on then with RAM that was left in its file.

        Raises:
            InvalidState: the guest had failed before it was copied.
            HostFileRefused: its RAM cannot be taken back.
        """
        pause = self._left.pause
        if pause.run_state in NEEDS_RESET:
            raise InvalidState(
                what="cont",
                state=f"for a guest that went in run state {pause.run_state}: {pause.failure}",
                instead="system_reset where it went",
            )
        self._left.memory.begin_use()
        return self._inbox.post(None, until="running")


async def run_postmigrate(running: Phase, left: Gone | None) -> None:
    """Wait until the guest, of which `left` is here, is to run here again; else for the end.

    With None it was handed over: all that the successor has was let go, and nothing here can run it.
    """
    async with running.child("postmigrate") as phase:
        inbox: Inbox[None] = Inbox("postmigrate")

        def grants(mint: Mint) -> PostmigrateGrants:
            return PostmigrateGrants(
                resume_here=mint(MayResumeHere, _Resumption(inbox, left)) if left is not None and left.whole else None
            )

        async with phase.window(grants):
            if left is None:
                await trio.sleep_forever()
            else:
                left.progress.advance(MigrationStatus.COMPLETED)
            await phase.decided(inbox, lambda wish: wish)
