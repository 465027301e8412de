"""Phase ``postmigrate``: the guest lives in another process. This one answers its monitor until it is told to quit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from vmm.nursery_tree import Phase


async def run_postmigrate(running: Phase) -> None:
    """Wait for the end. All that the successor has was let go when it took the guest; nothing here can run it."""
    async with running.child("postmigrate"):
        await trio.sleep_forever()
