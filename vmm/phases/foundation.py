"""What phase boot leaves to the later ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

import attrs
import trio

from vmm.phases.calling_off import CallingOff

if TYPE_CHECKING:
    from vmm.monitor.command import CommandTable
    from vmm.monitor.events import EventHub
    from vmm.nursery_tree import Tree
    from vmm.phases.afterwards import Afterwards
    from vmm.phases.host import HostFiles
    from vmm.phases.jobs import Jobs
    from vmm.phases.monitors import MonitorMaker
    from vmm.phases.overrides import Overrides
    from vmm.phases.predecessor import Predecessor
    from vmm.phases.recorder import Recorder
    from vmm.phases.run_state import RunState
    from vmm.phases.start import Start
    from vmm.phases.stores import BootStores
    from vmm.service import ServiceManager


@final
@attrs.define(eq=False)
class Host:
    """What phase boot leaves to the later ones."""

    start: Start
    tree: Tree
    events: EventHub
    table: CommandTable
    status: RunState
    stores: BootStores
    jobs: Jobs
    recorder: Recorder
    ending: Ending
    files: HostFiles
    monitors: MonitorMaker
    overrides: Overrides
    service: ServiceManager
    """A guest that comes in brings its own along."""
    calling_off: CallingOff = attrs.Factory(CallingOff)
    """Of what comes in."""
    predecessor: Predecessor | None = None
    """The process that the guest came from, if it is kept ready to take the guest back."""

    def let_predecessor_go(self) -> None:
        """Let the process that the guest came from end, if it is kept."""
        if self.predecessor is not None:
            self.predecessor.close()
            self.predecessor = None

    def complain(self, text: str) -> None:
        """Tell the operator something that the machine survives."""
        self.start.complain(text)

    def end_without_clients(self, failure: str) -> None:
        """End the process: its clients have gone along with the guest, and nobody is left to say so, or to be told."""
        if failure:
            self.complain(failure)
            self.ending.exit_status = 1
        self.ending.end("host-qmp-quit")

    def leave_by_key(self) -> None:
        """End the machine because somebody typed Ctrl-A X."""
        self.ending.end("host-ui")


@final
class Ending:
    """How the process ends, and the way to make it. The facet of `may-quit`."""

    def __init__(self) -> None:
        self.cause = ""
        """QAPI ShutdownCause; empty while nobody wants the end."""
        self.signalled = False
        """Whether a signal asked for the end, be it after something else had."""
        self.exit_status = 0
        self.afterwards: Afterwards | None = None
        """What the process does then, besides; None for nothing. Whoever takes it up owns it."""
        self.scope: Final = trio.CancelScope()

    def end(self, cause: str) -> None:
        """Cancel the innermost phase's body, and so unwind all of them."""
        self.cause = self.cause or cause
        self.signalled = self.signalled or cause == "host-signal"
        self.scope.cancel()

    def guest_exits(self, status: int) -> None:
        """The guest asked for the end of the VMM, with an exit status."""
        self.exit_status = status
        self.end("guest-shutdown")
