"""Run control before there is anything to run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import trio

from vmm.errors import InvalidState
from vmm.phases.config import GoOn

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from vmm.nursery_tree import Inbox


@final
class WishToRun:
    """The facet of `may-run-vcpus` in the phases that build: `cont` leads through all of them, to a running guest."""

    def __init__(self, inbox: Inbox[Any]) -> None:
        self._inbox = inbox

    def cont(self) -> Awaitable[None]:
        """Go on to phase running and start the guest."""
        return self._inbox.post(GoOn(start=True), until="running")

    async def stop(self) -> None:
        """Do nothing: nothing runs."""
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        """Refuse: there is no state to reset."""
        await trio.lowlevel.checkpoint()
        raise InvalidState(
            what="system_reset",
            state="before the machine is ready",
            instead="finish-machine-init or cont makes it ready",
        )
