"""One machine as a whole process: signals, standard error, exit status."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING

import trio

from vmm.cpr.steps import check_step
from vmm.errors import VmmError, leaves
from vmm.phases.boot import run_machine
from vmm.phases.catalog import rank
from vmm.phases.start import Start
from vmm.service import ServiceManager

if TYPE_CHECKING:
    import argparse
    from collections.abc import Awaitable, Callable, Mapping

    from vmm.cpr.limits import CprLimits
    from vmm.phases.afterwards import Afterwards
    from vmm.phases.config import GoOn
    from vmm.phases.foundation import Host
    from vmm.recipe import Recipe
    from vmm.roles import Role

SWITCH_INTERVAL = 0.001
"""Seconds that a vCPU thread may keep the interpreter while the loop waits for it. The default of 5 ms would be the
larger part of a live update's pause."""


def run_process(
    recipe: Recipe,
    options: argparse.Namespace,
    environment: Mapping[str, str],
    role: Role | None = None,
    *,
    begun: Callable[[], None] | None = None,
    beside: Callable[[Host], Awaitable[None]] | None = None,
) -> int:
    """Run the machine that `recipe` makes until it ends; SIGTERM, SIGINT and SIGHUP end it in order.

    With a `role` that says what the machine is started with, `recipe` is not used. The process goes on after its
    machine, in another role or as another program, if a live update has left it so.

    Args:
        environment: the process's own.
        begun: called once all of `recipe` has been carried out.
        beside: run beside the first machine, from its beginning on.
    """
    check_step(options.x_cpr_stop_at)
    sys.setswitchinterval(SWITCH_INTERVAL)
    start = _start(recipe, options, ServiceManager.of(environment), begun)
    while True:
        with closing(role) if role is not None else nullcontext():
            if role is not None:
                start = role.prepare(start)
            status, afterwards = trio.run(_run, start, role, beside)
        if afterwards is None:
            return status
        role, beside = _next_role(afterwards, environment), None


def _start(
    recipe: Recipe, options: argparse.Namespace, service: ServiceManager, begun: Callable[[], None] | None
) -> Start:
    after_preconfig: GoOn | None = None
    if options.preconfig:
        from vmm.phases.config import GoOn  # The machine's options, which the monitor does not need to start.

        after_preconfig = GoOn(start=not options.stopped)
    limits: CprLimits | None = None
    if options.x_cpr_limits:
        from vmm.cpr.limits import CprLimits  # Only for tests.

        limits = CprLimits.parse(options.x_cpr_limits)
    return Start(
        recipe.ordered(rank),
        after_preconfig,
        options.x_cpr_stop_at,
        limits=limits,
        cpr_uids=frozenset(options.x_cpr_allow_uid),
        stderr=2 if sys.stderr is not None else None,
        autostart=not options.stopped,
        begun=begun,
        own_process=True,
        is_caretaker=bool(options.x_cpr_caretaker_of),
        caretaker_options=tuple(options.x_cpr_caretaker.split()),
        service=service,
    )


def _next_role(afterwards: Afterwards, environment: Mapping[str, str]) -> Role:
    """Return what this process is next, if it comes back from what it is to do afterwards."""
    from vmm.phases.afterwards import StandBy  # Only after a live update.
    from vmm.roles import VARIABLE, StandingBy, TakingBack

    if isinstance(afterwards, StandBy):
        return StandingBy(afterwards)
    with closing(afterwards):
        program, *_ = afterwards.command
        os.set_inheritable(afterwards.monitor, True)
        said = json.dumps({"caretaker": afterwards.caretaker, "monitor": afterwards.monitor})
        try:
            os.execvpe(program, list(afterwards.command), {**environment, VARIABLE: said})
        except (OSError, ValueError) as error:
            os.set_inheritable(afterwards.monitor, False)
            reason = getattr(error, "strerror", None) or str(error)
            return TakingBack.after_failure(afterwards, f"Cannot execute {program}: {reason}")


async def _run(
    start: Start, role: Role | None, beside: Callable[[Host], Awaitable[None]] | None = None
) -> tuple[int, Afterwards | None]:
    statuses: list[int] = []
    try:
        async with trio.open_nursery() as nursery:

            async def machine(*, task_status: trio.TaskStatus[Host]) -> None:
                statuses.append(await run_machine(start, task_status=task_status))
                nursery.cancel_scope.cancel()

            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
                host: Host = await nursery.start(machine)
                if role is not None:
                    nursery.start_soon(role.serve, host)
                if beside is not None:
                    nursery.start_soon(beside, host)
                async for _ in signals:
                    host.ending.end("host-signal")
    except BaseExceptionGroup as group:
        errors = list(leaves(group))
        if not all(isinstance(error, VmmError) for error in errors):
            raise
        # The same reason can have ended more than one task.
        for reason in dict.fromkeys(str(error) for error in errors):
            start.complain(reason)
        return 1, None
    afterwards = host.ending.afterwards
    if afterwards is not None and host.ending.signalled:
        # Told to end while the guest was elsewhere: it ends there.
        afterwards.renounce()
        afterwards = None
    return (statuses[0] if statuses else 1), afterwards
