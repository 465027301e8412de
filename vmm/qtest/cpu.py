"""vCPUs that execute nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

import trio

from vmm.kvm.exits import Stop

if TYPE_CHECKING:
    from collections.abc import Callable


@final
class IdleCpu:
    """A vCPU that is there, started and stopped as others are, and never executes an instruction. On the loop."""

    has_thread: Final = False
    thread_id: Final = 0
    """No thread of the host runs it."""

    def __init__(self, index: int) -> None:
        self.index: Final = index
        self._kicked = trio.Event()

    async def run(
        self, _threads: trio.CapacityLimiter, *, entered: Callable[[], object], left: Callable[[Stop], object]
    ) -> Stop:
        """Wait until kicked. Calls `entered` first, and `left` never: it has no thread."""
        self._kicked = trio.Event()
        entered()
        await self._kicked.wait()
        return Stop("kicked", "", {})

    def kick(self) -> None:
        """Make `run` return."""
        self._kicked.set()

    def hold(self, seconds: float) -> None:
        """Do nothing: it does not run anyhow."""

    def let_go(self) -> None:
        """Do nothing."""
