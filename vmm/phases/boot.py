"""Phase ``boot``: monitors and chardevs, in every state of the machine; the outermost phase, which ends last."""

from __future__ import annotations

from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Final, final

import attrs
import trio

from vmm.capabilities import (
    ADMIN,
    MayAddDescriptor,
    MayCancelMigration,
    MayCreateBackend,
    MayDismissJob,
    MayOpenHostFile,
    MayQuery,
    MayQuit,
)
from vmm.errors import VmmError, leaves
from vmm.monitor.command import CommandTable
from vmm.monitor.events import EventHub
from vmm.nursery_tree import open_tree
from vmm.phases.catalog import COMMANDS, EVENTS
from vmm.phases.chain import hint
from vmm.phases.fdsets import FdSets
from vmm.phases.foundation import Ending, Host
from vmm.phases.host import HostFiles
from vmm.phases.jobs import Jobs
from vmm.phases.monitors import MonitorMaker
from vmm.phases.overrides import Overrides
from vmm.phases.precreate import run_precreate
from vmm.phases.recorder import Recorder
from vmm.phases.replay import REPLAYER, SUCCESSOR, replay_start
from vmm.phases.run_state import RunState
from vmm.phases.stores import BootStores

if TYPE_CHECKING:
    from vmm.capabilities import Grant, Mint
    from vmm.monitor.ports import Caller
    from vmm.nursery_tree import Phase
    from vmm.phases.start import Start


_FAMILIES: Final = frozenset({"chardev", "monitor", "memory", "snapshots", "tls"})
"""Of the back ends that this phase makes: what needs no machine."""


@final
@attrs.frozen
class BootGrants:
    """Tokens of this phase. Its window stays open to the end."""

    query: MayQuery
    quit: MayQuit
    dismiss_job: MayDismissJob
    cancel_migration: MayCancelMigration
    add_descriptor: MayAddDescriptor
    create_backend: MayCreateBackend
    open_host_file: MayOpenHostFile


async def run_machine(start: Start, *, task_status: trio.TaskStatus[Host] = trio.TASK_STATUS_IGNORED) -> int:
    """Run one machine to its end and return its exit status. Started once its monitors can be.

    A cancel unwinds the phases, innermost first, and then goes on up.

    Raises:
        VmmError: the machine could not be built, or taken over.
    """
    events = EventHub(EVENTS)
    ending = Ending()
    failure: VmmError | None = None
    async with open_tree("boot", events.emit) as phase:
        with ExitStack() as stack:
            fdsets = stack.enter_context(closing(FdSets()))
            tree = phase.tree
            recorder = Recorder()
            overrides = Overrides()
            table = CommandTable(
                COMMANDS,
                tree,
                grant_of=_grant_of,
                hint=hint,
                record=recorder.record,
                notes=lambda caller: overrides.noting and caller is not SUCCESSOR,
            )
            status = RunState(events.emit)
            stores = BootStores(phase.residents, fdsets)
            stack.callback(stores.luggage.close)
            jobs = Jobs(events.emit)
            await phase.residents.start("events", events.serve)
            host = Host(
                start,
                tree,
                events,
                table,
                status,
                stores,
                jobs,
                recorder,
                ending,
                HostFiles(),
                MonitorMaker(table, events, start.version, start.complain),
                overrides,
                start.service,
            )
            for view in (
                host,
                tree,
                status,
                table,
                events,
                stores,
                jobs,
                fdsets,
                recorder,
                host.monitors,
                start.identity,
                start.version,
            ):
                phase.publish(view)

            def grants(mint: Mint) -> BootGrants:
                return BootGrants(
                    query=mint(MayQuery, tree),
                    quit=mint(MayQuit, ending),
                    dismiss_job=mint(MayDismissJob, jobs),
                    cancel_migration=mint(MayCancelMigration, host.calling_off),
                    add_descriptor=mint(MayAddDescriptor, fdsets),
                    create_backend=mint(MayCreateBackend, stores, only=_FAMILIES),
                    open_host_file=mint(MayOpenHostFile, host.files),
                )

            try:
                async with phase.window(grants):
                    try:
                        with ending.scope:
                            task_status.started(host)
                            await _run_to_the_end(phase, host)
                    except* VmmError as group:
                        failure = next(error for error in leaves(group) if isinstance(error, VmmError))
                    finally:
                        tree.settle(failure)
            finally:
                # After the window, whose end has events too: this is the last that a client sees.
                host.let_predecessor_go()
                cause = ending.cause or ("host-signal" if failure is None else "host-error")
                events.emit("SHUTDOWN", {"guest": cause.startswith("guest"), "reason": cause})
    if failure is not None:
        raise failure
    return ending.exit_status


async def _run_to_the_end(phase: Phase, host: Host) -> None:
    async with trio.open_nursery() as nursery:
        phase.tree.begin_with(REPLAYER.name)
        nursery.start_soon(replay_start, host, phase.tree, name="recipe")
        await run_precreate(phase, host)
        nursery.cancel_scope.cancel()


def _grant_of(caller: Caller) -> Grant:
    grant: Grant = getattr(caller, "grant", ADMIN)
    return grant
