"""A guest whose RAM comes from a file as it is used: seen through, to the last page or the first one that is lost.

Whoever wants all of the guest waits for them: a migration, a live update, another restore.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

import trio

from vmm.errors import GuestPageLost

if TYPE_CHECKING:
    from vmm.errors import VmmError
    from vmm.kvm.faults import PagesFromFile, PagesFromLink
    from vmm.phases.run_state import RunStateName
    from vmm.phases.running import Run


@final
class AbsentPages:
    """The pages that a guest has not got yet. A resident of phase running sees them through."""

    def __init__(self, run: Run, pages: PagesFromFile | PagesFromLink) -> None:
        self._run: Final = run
        self._pages: Final = pages
        self._progress: Final = run.machine.made.migration.progress
        """That of how the guest came: another migration may be the present one before all is here."""
        self.over: Final = trio.Event()
        """Set once all are there, or one is lost."""
        self.complete = False
        """Whether all are there."""
        self.lost = False
        """Whether one could not be had. With neither, the machine has ended before."""

    async def serve(self) -> None:
        """Wait for them. If one is lost, the guest stands, and the run state says why."""
        try:
            failure = await self._pages.wait_over()
            self.complete, self.lost = failure is None, failure is not None
            if failure is not None:
                self._let_go()
                await self._stand(failure)
        finally:
            if not self.complete:
                # Ended from outside, too: a vCPU may be waiting for a page, and would not come out of the guest.
                self._let_go()
            self._pages.close()
            if self._progress is not None and self._progress.side == "target":
                self._progress.keep_ram()  # and let go of the file's tables
            self.over.set()

    def _let_go(self) -> None:
        # In this order: a page that does not come is zero from then on, and no guest may see that.
        for vcpu in self._run.gang.vcpus:
            vcpu.kick()
        self._pages.release()

    async def _stand(self, failure: VmmError) -> None:
        run = self._run
        damaged = isinstance(failure, GuestPageLost) and failure.damaged
        async with run.control:
            await run.gang.stop()
            name: RunStateName = "internal-error" if damaged else "io-error"
            run.machine.made.host.complain(f"{failure}; the machine stands until system_reset")
            run.status.stands(name, failure=str(failure))
