"""`trio-vmm update --exec`, `--undo` and `--forget`: what the machine's process does by itself, asked for and watched.

The session that asks goes along with the guest, from process to process; who answers on it is who has the guest.
"""

from __future__ import annotations

import json
import os
import select
import sys
from typing import TYPE_CHECKING, Any, ClassVar, Final, final

import attrs
import trio

from vmm.cli_successor import UpdateFailed, successor_command
from vmm.cli_update import COMPLETION, KEEP, SESSIONS, UpdateUnclear
from vmm.errors import VmmError, leaves
from vmm.qmp_client import CommandFailed, MonitorGone, qmp_session

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from vmm.qmp_client import QmpClient

_LOOKS: Final = 0.05
"""Seconds between two looks at how far it is, where no event comes: events are the client's to turn on."""


@final
class UndoRefused(VmmError):
    """There is nothing to go back to, or to forget."""

    text: ClassVar[str] = "The machine goes on where it is: {reason}"
    reason: str


@final
@attrs.frozen
class ReplaceReport:
    """What came of it."""

    old_pid: int
    new_pid: int
    pauses: tuple[Mapping[str, float], ...]
    """Each as `x-pause` of `query-migrate`."""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {"old-pid": self.old_pid, "new-pid": self.new_pid, "pauses-ms": [dict(pause) for pause in self.pauses]}

    def to_text(self) -> str:
        """Return it as lines for people."""
        if self.old_pid == self.new_pid:
            what = f"updated: process {self.old_pid} executes the new program"
        else:
            what = f"undone: process {self.old_pid} -> {self.new_pid}"
        totals = [pause["total"] for pause in self.pauses if "total" in pause]
        if len(totals) < (2 if self.old_pid == self.new_pid else 1):
            return f"{what}\nthe guest's pause: not known"
        each = f" ({' + '.join(f'{total:.2f}' for total in totals)})" if len(totals) > 1 else ""
        return f"{what}\nthe guest's pause: {sum(totals):.2f} ms{each}"


def replace_program(path: str, binary: str | None, *, as_json: bool) -> int:
    """Let the process of the machine at `path` become `binary`, or this very program; return the exit status."""
    command = [*successor_command(binary), "run"]
    return _reported(lambda: _exec(path, command), as_json=as_json)


def undo_update(path: str, *, as_json: bool) -> int:
    """Give the guest of the machine at `path` back to the process that it came from; return the exit status."""
    return _reported(lambda: _undo(path), as_json=as_json)


def forget_predecessor(path: str) -> int:
    """Let the process that the guest came from end; return the exit status."""
    _run(lambda: _forget(path))
    return 0


def _reported(work: Callable[[], Awaitable[ReplaceReport]], *, as_json: bool) -> int:
    report = _run(work)
    assert isinstance(report, ReplaceReport)
    print(json.dumps(report.to_json()) if as_json else report.to_text())
    return 0


def _run(work: Callable[[], Awaitable[object]]) -> object:
    async def run() -> object:
        return await work()

    try:
        return trio.run(run)
    except BaseExceptionGroup as group:
        errors = list(leaves(group))
        if not all(isinstance(error, VmmError) for error in errors):
            raise
        raise errors[0] from group
    except KeyboardInterrupt:
        print("trio-vmm: interrupted; query-migrate on the machine's monitor says how far it came", file=sys.stderr)
        return sys.exit(1)


async def _forget(path: str) -> None:
    async with qmp_session(path) as client:
        await _ask(client, "x-cpr-forget")


async def _undo(path: str) -> ReplaceReport:
    async with qmp_session(path) as client:
        old = _process(client)
        await _ask(client, "x-cpr-undo")
        info = await _settled(client, lambda: client.peer_pid != old, old)
        return ReplaceReport(old, client.peer_pid, (info["x-pause"],) if "x-pause" in info else ())


async def _exec(path: str, command: list[str]) -> ReplaceReport:
    async with qmp_session(path) as client:
        old = _process(client)
        parameters = {"mode": "cpr-exec", "cpr-exec-command": command, SESSIONS: True, KEEP: False}
        await _ask(client, "migrate", parameters=parameters)
        info = await _settled(client, lambda: client.peer_pid == old, old)
        pauses = tuple(info[name] for name in ("x-pause-before", "x-pause") if name in info)
        return ReplaceReport(old, client.peer_pid, pauses)


async def _ask(client: QmpClient, command: str, **arguments: Any) -> None:
    try:
        await client.execute(command, **arguments)
    except CommandFailed as error:
        if command == "migrate":
            raise UpdateFailed(reason=error.desc) from error
        raise UndoRefused(reason=error.desc) from error


def _process(client: QmpClient) -> int:
    """Return who answers. Raises `UpdateFailed` if that cannot be known: it would not be known who has the guest."""
    if client.peer_pid <= 0:
        raise UpdateFailed(reason="it runs in a PID namespace that cannot be seen from here; give the command there")
    return client.peer_pid


async def _settled(client: QmpClient, arrived: Callable[[], bool], old: int) -> Mapping[str, Any]:
    """Return what `query-migrate` says once the guest has `arrived` where it is to go.

    Raises:
        UpdateFailed: the guest is where it was.
        UpdateUnclear: it is somewhere else, or nobody says where.
    """
    pidfd = os.pidfd_open(old)
    try:
        with trio.fail_after(COMPLETION):
            while True:
                info: Mapping[str, Any] = await client.execute("query-migrate")
                if info["status"] in ("failed", "cancelled"):
                    reason = info.get("error-desc", info["status"])
                    if client.peer_pid == old:
                        raise UpdateFailed(reason=reason)
                    raise UpdateUnclear(reason=f"{reason}; the guest goes on in process {client.peer_pid}")
                if info["status"] == "completed" and arrived():
                    return info
                if client.peer_pid != old and not arrived() and _is_readable(pidfd):
                    reason = f"process {old} ended, and the guest goes on in process {client.peer_pid}"
                    raise UpdateUnclear(reason=reason)
                with trio.move_on_after(_LOOKS):
                    await client.wait_event(lambda event: event["event"] == "MIGRATION")
    except MonitorGone as error:
        raise UpdateUnclear(reason="the process that answered last ended, and the guest with it") from error
    except trio.TooSlowError as error:
        reason = f"it was not over within {COMPLETION:g} s; process {client.peer_pid} answered last"
        raise UpdateUnclear(reason=reason) from error
    finally:
        os.close(pidfd)


def _is_readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
