"""One machine as a whole process: signals, standard error, exit status."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

import trio

from vmm.cpr.steps import check_step
from vmm.errors import VmmError, leaves
from vmm.phases.boot import run_machine
from vmm.phases.catalog import rank
from vmm.phases.start import Start

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from vmm.cpr.limits import CprLimits
    from vmm.phases.config import GoOn
    from vmm.phases.foundation import Host
    from vmm.recipe import Recipe

SWITCH_INTERVAL = 0.001
"""Seconds that a vCPU thread may keep the interpreter while the loop waits for it. The default of 5 ms would be the
larger part of a live update's pause."""


def run_process(recipe: Recipe, options: argparse.Namespace, *, begun: Callable[[], None] | None = None) -> int:
    """Run the machine that `recipe` makes until it ends; SIGTERM, SIGINT and SIGHUP end it in order.

    Args:
        begun: called once all of `recipe` has been carried out.
    """
    check_step(options.x_cpr_stop_at)
    sys.setswitchinterval(SWITCH_INTERVAL)
    after_preconfig: GoOn | None = None
    if options.preconfig:
        from vmm.phases.config import GoOn  # The machine's options, which the monitor does not need to start.

        after_preconfig = GoOn(start=not options.stopped)
    limits: CprLimits | None = None
    if options.x_cpr_limits:
        from vmm.cpr.limits import CprLimits  # Only for tests.

        limits = CprLimits.parse(options.x_cpr_limits)
    start = Start(
        recipe.ordered(rank),
        after_preconfig,
        options.x_cpr_stop_at,
        limits=limits,
        stderr=2 if sys.stderr is not None else None,
        autostart=not options.stopped,
        begun=begun,
    )
    return trio.run(_run, start)


async def _run(start: Start) -> int:
    statuses: list[int] = []
    try:
        async with trio.open_nursery() as nursery:

            async def machine(*, task_status: trio.TaskStatus[Host]) -> None:
                statuses.append(await run_machine(start, task_status=task_status))
                nursery.cancel_scope.cancel()

            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
                host: Host = await nursery.start(machine)
                async for _ in signals:
                    host.ending.end("host-signal")
    except BaseExceptionGroup as group:
        errors = list(leaves(group))
        if not all(isinstance(error, VmmError) for error in errors):
            raise
        # The same reason can have ended more than one task.
        for reason in dict.fromkeys(str(error) for error in errors):
            start.complain(reason)
        return 1
    return statuses[0] if statuses else 1
