"""`trio-vmm update`: replace the process under a running machine, in one command."""

from __future__ import annotations

import json
import os
import signal
from contextlib import asynccontextmanager, closing, suppress
from typing import TYPE_CHECKING, Any, ClassVar, Final, NoReturn, final

import attrs
import trio

from vmm.cli_successor import Successor, UpdateFailed, successor_command, successor_of
from vmm.errors import VmmError, leaves
from vmm.qmp_client import CommandFailed, MonitorGone, qmp_session

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from vmm.qmp_client import QmpClient

COMPLETION: Final = 300.0
"""Seconds for the whole hand-over. The guest's own pause has limits of its own, far below."""

CALLING_OFF: Final = 5.0
"""Seconds for the old process to answer when the update is called off."""

ENDING: Final = 30.0
"""Seconds for the old process to end by itself, once the guest and the monitors' clients are in the new one."""

SESSIONS: Final = "migrate-sessions"
KEEP: Final = "x-keep-source"
"""Name of the parameter that takes connected clients along, ours among them. An older program has not got it."""


@final
class UpdateUnclear(VmmError):
    """The update went wrong, and the guest need not be in the old process."""

    text: ClassVar[str] = "The live update went wrong: {reason}"
    reason: str


@final
class UpdateInterrupted(VmmError):
    """A signal ended the update."""

    text: ClassVar[str] = "The live update was interrupted; query-migrate on the machine's monitor says how far it came"


@final
@attrs.frozen
class UpdateReport:
    """What an update did."""

    old_pid: int
    new_pid: int
    stages: dict[str, float]
    """Stage of the guest's pause -> milliseconds, and their sum as `total`; empty if the old process did not tell."""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {"old-pid": self.old_pid, "new-pid": self.new_pid, "pause-ms": self.stages}


def update_machine(path: str, binary: str | None, *, keep: bool, as_json: bool) -> int:
    """Update the machine whose monitor is at `path`, print a report, and return the exit status.

    With `keep` the old process waits, for `trio-vmm update --undo`.
    """
    command = successor_command(binary)
    report = trio.run(_update, path, command, keep)
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        stages = ", ".join(f"{name} {value:.2f}" for name, value in report.stages.items() if name != "total")
        total = f"{report.stages['total']:.2f} ms ({stages})" if "total" in report.stages else "not known"
        print(f"updated: process {report.old_pid} -> {report.new_pid}")
        print(f"the guest's pause: {total}")
        if keep:
            print(f"process {report.old_pid} waits: trio-vmm update --undo goes back to it, --forget lets it end")
    return 0


def check_update(path: str, binary: str | None, *, as_json: bool) -> int:
    """Start a successor for the machine at `path`, print what it would have otherwise, and end it.

    Returns 0 if it would take the machine, else 1. The guest does not notice.
    """
    verdict = trio.run(_check, path, successor_command(binary))
    if as_json:
        print(json.dumps(verdict))
        return 0 if verdict["admitted"] else 1
    for item in verdict["differences"]:
        if item["effect"] != "identical":
            there, here = (json.dumps(item.get(side)) for side in ("source", "here"))
            print(f"{item['effect']:13}  {item['name']}: {there} -> {here}")
    same = sum(item["effect"] == "identical" for item in verdict["differences"])
    print(f"{same} items are identical; " + ("the update would go ahead" if verdict["admitted"] else verdict["reason"]))
    return 0 if verdict["admitted"] else 1


async def _check(path: str, command: Sequence[str]) -> dict[str, Any]:
    verdict: dict[str, Any] = {}
    failure: VmmError | None = None
    try:
        async with qmp_session(path) as source, successor_of(source, path, command) as (successor, _, main, cpr):
            verdict = await source.execute("x-cpr-check", channels=_channels(main, cpr))
            successor.end()
    except* VmmError as group:
        failure = next(error for error in leaves(group) if isinstance(error, VmmError))
    if failure is not None:
        raise failure
    return verdict


async def _update(path: str, command: Sequence[str], keep: bool) -> UpdateReport:
    report: UpdateReport | None = None
    failure: VmmError | None = None
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(_cancel_at_signal, nursery.cancel_scope)
            report = await live_update(path, command, keep=keep)
            nursery.cancel_scope.cancel()
    except* VmmError as group:
        failure = next(error for error in leaves(group) if isinstance(error, VmmError))
    if failure is not None:
        raise failure
    if report is None:
        raise UpdateInterrupted
    return report


async def _cancel_at_signal(scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        task_status.started()
        async for _ in signals:
            scope.cancel()


async def live_update(
    path: str, command: Sequence[str], extra: Sequence[str] = (), *, keep: bool = False
) -> UpdateReport:
    """Hand the machine at `path` over to a new process, and see the old one end. `extra` are options for the successor.

    With `keep` the old process waits, ready to take the guest back.

    Clients of the machine's monitors keep their connections, and so does this one: it is answered by the old process
    and then by the new one. Where one of the two programs is older than that, they stay behind, and the old one is told
    to quit.

    On a failure or a cancel the successor is ended, unless it has the guest, and the guest stays where it is. Once the
    old process has been told to hand over, only its word ends the successor: nobody else knows who has the guest.

    Raises:
        UpdateFailed, VmmError: the update did not come about.
    """
    async with (
        qmp_session(path) as source,
        successor_of(source, path, command, extra) as (successor, destination, main, cpr),
    ):
        new_pid = destination.peer_pid
        with closing(_HandOver(source, destination, successor, _channels(main, cpr))) as handover:
            known = await source.execute("query-migrate-parameters")
            if keep and KEEP not in known:
                raise UpdateFailed(reason="the old process is of a program that cannot wait; leave --keep out")
            if SESSIONS in known and SESSIONS in await destination.execute("query-migrate-parameters"):
                stages = await handover.completed(
                    {"mode": "cpr-transfer", SESSIONS: True, **({KEEP: keep} if KEEP in known else {})}
                )
                if not keep:
                    await handover.ended()
            else:
                async with _changed_settings(source):
                    stages = await handover.completed()
                await _quit(source)
    return UpdateReport(handover.old_pid, new_pid, stages)


@asynccontextmanager
async def _changed_settings(source: QmpClient) -> AsyncGenerator[None, None]:
    """Set what an update needs; if it does not come about, put back what was set before."""
    mode = (await source.execute("query-migrate-parameters"))["mode"]
    known = await source.execute("query-migrate-capabilities")
    events = next(entry["state"] for entry in known if entry["capability"] == "events")
    await source.execute("migrate-set-parameters", mode="cpr-transfer")
    await source.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    try:
        yield
    except BaseException:
        with trio.move_on_after(1, shield=True), suppress(VmmError):
            await source.execute("migrate-set-parameters", mode=mode)
            await source.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": events}])
        raise


def _channels(main: str, cpr: str) -> list[dict[str, Any]]:
    return [
        {"channel-type": kind, "addr": {"transport": "socket", "type": "unix", "path": where}}
        for kind, where in (("main", main), ("cpr", cpr))
    ]


@final
class _HandOver:
    """The guest on its way from whoever answers `source` to `successor`, which listens at `where`."""

    def __init__(
        self, source: QmpClient, destination: QmpClient, successor: Successor, where: list[dict[str, Any]]
    ) -> None:
        self._source = source
        self._destination = destination
        self._successor = successor
        self._where = where
        self.old_pid = source.peer_pid
        """The process that hands over."""
        self._old = -1

    async def completed(self, parameters: dict[str, Any] | None = None) -> dict[str, float]:
        """Hand the guest over, and return the stages of its pause. A cancel calls it off."""
        source, successor = self._source, self._successor
        more = {} if parameters is None else {"parameters": parameters}
        try:
            with trio.fail_after(COMPLETION):
                # Shielded: of what is sent by halves nobody knows. Not a moment's wait: all before it was answered.
                with trio.CancelScope(shield=True):
                    source.events.clear()
                    successor.may_have_the_guest = True
                    await source.send("migrate", channels=self._where, **more)
                await self._begun()
                info = await self._outcome()
        except MonitorGone as error:
            await self._tell_of_a_lost_source(error)
        except (trio.TooSlowError, trio.Cancelled) as error:
            late = await self._call_off()
            if isinstance(error, trio.TooSlowError):
                reason = f"the old process did not finish it within {COMPLETION:g} s; {late}"
                raise UpdateUnclear(reason=reason) from error
            raise
        if info["status"] == "completed":
            stages: dict[str, float] = info.get("x-pause", {})
            return stages
        if "x-pause" not in info:
            successor.may_have_the_guest = False
            raise UpdateFailed(reason=info.get("error-desc", info["status"]))
        raise UpdateUnclear(reason=info["error-desc"])

    async def ended(self) -> None:
        """Wait for the end of the old process, which comes by itself. Raises `UpdateUnclear` if it does not."""
        if self._old >= 0:
            with trio.move_on_after(ENDING) as patience:
                await trio.lowlevel.wait_readable(self._old)
            if patience.cancelled_caught:
                reason = (
                    f"the guest goes on in the new process, {self._destination.peer_pid}, but the old one, "
                    f"{self.old_pid}, has not ended within {ENDING:g} s"
                )
                raise UpdateUnclear(reason=reason)

    def close(self) -> None:
        """Close the old process's pidfd. Idempotent."""
        if self._old >= 0:
            os.close(self._old)
            self._old = -1

    async def _begun(self) -> None:
        """Wait for the old process to say that it has begun. Raises `UpdateFailed` if it has not."""
        if self._successor.is_awaited:
            return
        try:
            await self._source.reply("migrate")
        except CommandFailed as error:
            self._successor.may_have_the_guest = False
            raise UpdateFailed(reason=error.desc) from error
        self._successor.is_awaited = True
        self.old_pid = self._source.peer_pid
        with suppress(OSError):  # it has ended by now, or is of another namespace
            self._old = os.pidfd_open(self.old_pid)

    async def _outcome(self) -> dict[str, Any]:
        """Return what `query-migrate` says once it is over: the old process's word, or the new one's if we moved.

        Each of them has something to tell after that.
        """
        while True:
            info: dict[str, Any] = await self._source.execute("query-migrate")
            if info["status"] in ("completed", "failed", "cancelled"):
                return info
            await self._source.wait_event(lambda event: True)

    async def _call_off(self) -> str:
        """Ask the old process to keep the guest; say in words what is known then."""
        with trio.move_on_after(CALLING_OFF, shield=True), suppress(VmmError):
            await self._begun()
            with suppress(CommandFailed):
                await self._source.execute("migrate_cancel")
            info = await self._outcome()
            if info["status"] != "completed" and "x-pause" not in info:
                self._successor.may_have_the_guest = False
                return "the guest goes on in the old process"
            return "the guest is with the new process"
        if self._successor.may_have_the_guest:
            return "it may be with either process"
        return "the guest goes on in the old process"

    async def _tell_of_a_lost_source(self, error: MonitorGone) -> NoReturn:
        gone = "the old process ended during the update"
        destination, status = self._destination, ""
        if self._source.peer_pid == destination.peer_pid:
            gone = "the new process ended when it had taken over"
        try:
            with trio.move_on_after(CALLING_OFF):
                while status != "completed":
                    status = (await destination.execute("query-migrate"))["status"]
                    if status != "completed":
                        await destination.wait_event(lambda event: True)
        except MonitorGone:
            raise UpdateUnclear(reason=f"{gone}, and the guest with it") from error
        if status == "completed":
            reason = f"{gone}; the guest goes on in the new one, process {destination.peer_pid}"
            raise UpdateUnclear(reason=reason) from error
        # Still waiting for a source to connect: it has nothing, and nobody is left to give it anything.
        self._successor.may_have_the_guest = status != "setup"
        raise UpdateUnclear(reason=f"{gone}, and the guest with it") from error


async def _quit(source: QmpClient) -> None:
    with suppress(VmmError):  # the end of its monitor is the end of the old process
        await source.execute("quit")
        while True:
            await source.read()
