"""What a process has to do beside its machine, for a guest that comes back or is only looked after.

    stands by     its guest has gone, and may come back: it waits at a berth
    takes back    it has become another program, and asks the caretaker for the guest
    caretaker     it has the guest of a process that becomes another program

Each is one task beside the machine, which is an ordinary destination of a live update.
"""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar, Final, Protocol, final

import attrs
import trio

from vmm.cpr.berth import Berth
from vmm.errors import OptionInvalid, VmmError
from vmm.phases.incoming_port import IncomingPort
from vmm.phases.start import Identity
from vmm.qmp_client import CommandFailed, MonitorGone, NoMonitor, qmp_over
from vmm.recipe import Recipe, Step

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from vmm.phases.afterwards import BecomeProgram, StandBy
    from vmm.phases.foundation import Host
    from vmm.phases.start import Start
    from vmm.qmp_client import QmpClient

VARIABLE: Final = "TRIO_VMM_TAKE_BACK"
"""Environment variable by which a program learns that it has to take a guest from a caretaker."""

_GREETING: Final = 60.0
"""Seconds for the caretaker's monitor to answer: it runs a guest already."""


@final
class GuestNotTaken(VmmError):
    """The guest stays with the caretaker, or died with it."""

    text: ClassVar[str] = "Process {caretaker}, which looks after the guest, did not hand it over: {reason}; {outcome}"
    caretaker: int
    reason: str
    outcome: str


class Role(Protocol):
    """A task beside the machine."""

    def prepare(self, start: Start) -> Start:
        """Return how the machine is to be started in place of `start`. Called once, first."""

    async def serve(self, host: Host) -> None:
        """Do what is to be done beside the machine of `host`. Raises `VmmError` to end it."""

    def close(self) -> None:
        """Close what is left. Idempotent."""


def _awaiting(berth: Berth, start: Start) -> Start:
    """Return `start` with nothing but what awaits a guest at `berth`."""
    recipe = Recipe("of a guest that comes back", (Step("migrate-incoming", {"channels": berth.occupy()}),))
    return attrs.evolve(start, recipe=recipe, after_preconfig=None, begun=None, failure="", identity=Identity())


@final
@attrs.frozen(eq=False)
class StandingBy:
    """The guest has gone, and may come back."""

    _plan: StandBy

    def prepare(self, start: Start) -> Start:
        """See `Role`."""
        return _awaiting(self._plan.berth, start)

    async def serve(self, host: Host) -> None:
        """End the machine, if it has no guest, once whoever has the guest has let go of this process."""
        await trio.lowlevel.wait_readable(self._plan.leash)
        if host.tree.view(IncomingPort).arrival is None:
            host.ending.end("host-qmp-quit")

    def close(self) -> None:
        """See `Role`."""
        self._plan.close()


@final
@attrs.define(eq=False)
class TakingBack:
    """A caretaker has the guest, and hands it over when it is asked to."""

    _caretaker: int
    _monitor: int
    _failure: str = ""
    """Why the guest comes back to the program that had it; empty where another has taken that one's place."""
    _berth: Berth | None = None

    @classmethod
    def of(cls, environment: MutableMapping[str, str]) -> TakingBack:
        """Return what `environment` says, and take it out. Raises `OptionInvalid`."""
        text = environment.pop(VARIABLE)
        try:
            value = json.loads(text)
            caretaker, monitor = int(value["caretaker"]), int(value["monitor"])
            os.set_inheritable(monitor, False)
        except (ValueError, TypeError, KeyError, OSError) as error:
            wanted = "set by a trio-vmm that executes another one in its place; unset it"
            raise OptionInvalid(option=VARIABLE, value=text, wanted=wanted) from error
        return cls(caretaker, monitor)

    @classmethod
    def after_failure(cls, plan: BecomeProgram, reason: str) -> TakingBack:
        """Return what is to be done once the program of `plan` could not be executed."""
        monitor, plan.monitor = plan.monitor, -1
        return cls(plan.caretaker, monitor, reason)

    def prepare(self, start: Start) -> Start:
        """See `Role`."""
        self._berth = Berth.bind()
        return attrs.evolve(_awaiting(self._berth, start), failure=self._failure)

    async def serve(self, host: Host) -> None:
        """Ask for the guest. Raises `GuestNotTaken` if it does not come."""
        assert self._berth is not None, "prepare() comes first"
        if self._failure:
            host.complain(f"{self._failure}; the guest comes back to this process")
        monitor, self._monitor = socket.socket(fileno=self._monitor), -1
        refusal = ""
        try:
            async with qmp_over(monitor, f"process {self._caretaker}", within=_GREETING) as caretaker:
                refusal = await self._ask(caretaker)
        except MonitorGone:
            pass  # It ends once its guest has gone; or it died.
        except (CommandFailed, NoMonitor) as error:
            refusal = str(error)
        arrival = host.tree.view(IncomingPort).arrival
        # Whoever has the guest does not end for what is said of it.
        if refusal and not (arrival is not None and arrival.over.is_set()):
            raise self._not_taken(refusal, "the guest goes on there")
        if arrival is None:
            raise self._not_taken("it ended", "the guest ended with it")
        # If it does not come, the machine fails, and this task with it.
        await arrival.over.wait()
        await self._reap()

    def _not_taken(self, reason: str, outcome: str) -> GuestNotTaken:
        return GuestNotTaken(caretaker=self._caretaker, reason=reason, outcome=outcome)

    async def _ask(self, caretaker: QmpClient) -> str:
        """Return why the guest stays there; empty if the caretaker is about to end, which it does once it has gone.

        Raises:
            MonitorGone: it has ended.
            CommandFailed: it refused at once.
        """
        assert self._berth is not None
        await caretaker.execute(
            "migrate",
            channels=self._berth.channels.to_json(),
            capabilities=[{"capability": "events", "state": True}],
            parameters={"mode": "cpr-transfer", "migrate-sessions": True, "x-keep-source": False},
        )
        while True:
            try:
                info = await caretaker.execute("query-migrate")
            except CommandFailed:
                return ""  # Its phases are closing: the last that it answers are its monitors.
            if info["status"] in ("failed", "cancelled"):
                return str(info.get("error-desc", "it was cancelled"))
            await caretaker.wait_event(lambda event: event["event"] == "MIGRATION")

    async def _reap(self) -> None:
        """Wait for the caretaker's end. It is a child of the program that this process was, and so of this one."""
        with suppress(ProcessLookupError, ChildProcessError):
            pidfd = os.pidfd_open(self._caretaker)
            try:
                await trio.lowlevel.wait_readable(pidfd)
            finally:
                os.close(pidfd)
            os.waitpid(self._caretaker, os.WNOHANG)  # noqa: ASYNC222 - which does not wait

    def close(self) -> None:
        """See `Role`."""
        if self._berth is not None:
            self._berth.close()
        if self._monitor >= 0:
            os.close(self._monitor)
            self._monitor = -1


@final
@attrs.frozen(eq=False)
class LookingAfter:
    """This process has, or will have, the guest of process `ward` until that has become another program."""

    _ward: int

    def prepare(self, start: Start) -> Start:
        """See `Role`: the command line says it all."""
        return start

    async def serve(self, host: Host) -> None:
        """Watch the ward. When it ends, the guest goes on here, which is said; without a guest this process ends."""
        try:
            pidfd = os.pidfd_open(self._ward)
        except ProcessLookupError:
            host.ending.end("host-qmp-quit")
            return
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)
        arrival = host.tree.view(IncomingPort).arrival
        if arrival is None:
            host.ending.end("host-qmp-quit")
            return
        # It may have died as the guest's owner: then the machine fails, and this task with it.
        await arrival.over.wait()
        host.complain(
            f"process {self._ward} has ended before it took its guest back: the guest goes on in process {os.getpid()}"
        )
        host.service.main_process_is(os.getpid())

    def close(self) -> None:
        """See `Role`: there is nothing."""
