"""How a guest is made to leave, from phase running: the facet of `may-start-migration`."""

from __future__ import annotations

from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any, final

from vmm.errors import InvalidState, MigrationRefused
from vmm.phases.blockers import require_unblocked
from vmm.phases.copy_plan import CopyPlan
from vmm.phases.executing import ExecPlan
from vmm.phases.migrating import TransferPlan, ask_destination
from vmm.phases.migration_state import Wishes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping

    from vmm.decisions import Inbox
    from vmm.migration.dirty_rate import Measurement
    from vmm.phases.dirty_limits import DirtyLimits
    from vmm.phases.dirty_rate import DirtyRates
    from vmm.phases.predecessor import Predecessor
    from vmm.phases.running import Plan, Run
    from vmm.phases.snapshots import DeletePlan, SavePlan


@final
class Departure:
    """The facet of `may-start-migration`."""

    def __init__(self, inbox: Inbox[Plan], run: Run, rates: DirtyRates, limits: DirtyLimits) -> None:
        self._inbox = inbox
        self._run = run
        self._rates = rates
        self._limits = limits

    async def check(self, plan: TransferPlan) -> Mapping[str, Any]:
        """Ask the destination of `plan`, whose descriptors are closed afterwards. Raises as `start` does."""
        with closing(plan):
            self._require_unblocked("x-cpr-check", "cpr-transfer", plan)
            return await ask_destination(self._run.machine, plan)

    def limit(self, index: int | None, quota: int) -> None:
        """Limit how fast vCPUs write. Raises as `DirtyLimits.set`."""
        self._limits.set(index, quota)

    def measure(self, wanted: Measurement) -> None:
        """Begin to measure how fast the guest writes. Raises as `DirtyRates.begin`."""
        if wanted.mode == "dirty-bitmap" and self._limits.under_way:
            state, instead = "by dirty-bitmap while vCPUs are limited in what they write", "use page-sampling"
            raise InvalidState(what="calc-dirty-rate", state=state, instead=instead)
        self._rates.begin(wanted)

    def start(self, plan: TransferPlan | ExecPlan | CopyPlan | SavePlan | DeletePlan) -> Awaitable[None]:
        """Post `plan`, whose descriptors are closed if it is not carried out.

        Raises:
            MigrationRefused: something of the machine cannot leave this process.
        """
        with ExitStack() as undo:
            undo.callback(plan.close)
            if isinstance(plan, CopyPlan) and plan.resume:
                reason = "migrate: there is no paused postcopy to resume; leave 'resume' out"
                raise MigrationRefused(reason=reason)
            if isinstance(plan, TransferPlan):
                self._require_unblocked("migrate", "cpr-transfer", plan)
            elif isinstance(plan, ExecPlan):
                self._require_unblocked("migrate", "cpr-exec", plan)
            undo.pop_all()
        turn = self._inbox.post(plan, until="migrating")
        turn.on_settled(lambda: plan.close() if turn.failed else None)
        return turn

    def _require_unblocked(self, command: str, mode: str, plan: TransferPlan | ExecPlan) -> None:
        made, given = self._run.machine.made, plan.wishes.parameters
        asked = {
            name: given.get(name, made.migration.parameters[name]) for name in ("migrate-sessions", "x-keep-source")
        }
        require_unblocked(command, made.host, {"mode": mode, **asked})

    def undo(self) -> Awaitable[None]:
        """Post the guest's return. Raises `MigrationRefused` if no process is kept for it."""
        predecessor = self._predecessor("x-cpr-undo")
        parameters = {"mode": "cpr-transfer", "migrate-sessions": True, "x-keep-source": False}
        return self.start(TransferPlan(predecessor.channels, True, Wishes(parameters=parameters)))

    def forget(self) -> None:
        """Let the process that the guest came from end. Raises as `undo`."""
        self._predecessor("x-cpr-forget")
        self._run.machine.made.host.let_predecessor_go()

    def _predecessor(self, command: str) -> Predecessor:
        predecessor = self._run.machine.made.host.predecessor
        if predecessor is None or not predecessor.waits:
            reason = "no process is kept ready to take the guest back; a live update with x-keep-source keeps one"
            raise MigrationRefused(reason=f"{command}: {reason}")
        return predecessor
