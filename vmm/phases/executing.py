"""Live update by exec: this process becomes another program, and the guest comes back to it.

The guest goes to a caretaker as in any live update, and this process ends its machine, executes the new program, and
takes the guest back from the caretaker (`vmm.roles`). What can be found out before is: up to the hand-over all that
goes wrong leaves the guest here.
"""

from __future__ import annotations

import shutil
from contextlib import closing
from typing import TYPE_CHECKING, Any, final

import attrs

from vmm.errors import MigrationRefused
from vmm.phases.caretaker import Caretaker
from vmm.phases.migrating import TransferPlan, run_migrating
from vmm.phases.migration_state import NO_WISHES, Wishes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.decisions import Turn
    from vmm.nursery_tree import Phase
    from vmm.phases.running import Run


@final
@attrs.frozen
class ExecPlan:
    """What to execute."""

    command: Sequence[str]
    wishes: Wishes = NO_WISHES

    def check(self) -> None:
        """Raise `MigrationRefused` unless there is a command, and a program that it names."""
        if not self.command:
            reason = "migrate: mode cpr-exec executes parameter 'cpr-exec-command', which is empty; set it"
            raise MigrationRefused(reason=reason)
        program = self.command[0]
        if any("\0" in word for word in self.command) or shutil.which(program) is None:
            reason = f"migrate: there is no executable {program!r}, which cpr-exec-command begins with; name one"
            raise MigrationRefused(reason=reason)

    def close(self) -> None:
        """Do nothing: it owns nothing."""


async def run_executing(running: Phase, run: Run, plan: ExecPlan, turn: Turn[Any]) -> bool:
    """Hand the guest to a caretaker, and have this process execute `plan` once its machine has ended.

    Return whether the guest is gone; if not, it goes on here.

    Raises:
        VmmError: only before phase migrating has opened; later failures are in `query-migrate`.
    """
    plan.check()
    host = run.machine.made.host
    with closing(Caretaker.start(host.start.caretaker_options)) as caretaker:
        sessions = bool(run.machine.made.migration.parameters["migrate-sessions"])
        transfer = TransferPlan(caretaker.channels, sessions, plan.wishes)
        gone = await run_migrating(running, run, transfer, turn)
        if gone:
            host.ending.afterwards = caretaker.release(plan.command)
    return gone
