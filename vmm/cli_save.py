"""`trio-vmm save`: a machine over an end of its process, or of its host's.

RAM stays where it is if it is in a file (`memory-backend-file`); else each page has its place in the file of the saved
machine, so that the guest need not wait for all of it when it comes back. The file of a saved machine is whole or not
there: it is written under another name beside it.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, final

import trio

from vmm import hostio
from vmm.cli_progress import Bar
from vmm.cli_watch import Interrupted, Interruption, interruptible, outcome
from vmm.errors import HostFileRefused, VmmError
from vmm.qmp_client import CommandFailed, MonitorGone, qmp_session

if TYPE_CHECKING:
    from vmm.qmp_client import QmpClient

_WHAT: Final = "The save"

_ON: Final = ("mapped-ram", "x-ignore-shared", "events")
"""Migration capabilities: where RAM can stay it stays, else it has fixed places; and an event tells when it is over."""

_OFF: Final = (
    "auto-converge", "background-snapshot", "dirty-limit", "multifd", "pause-before-switchover", "postcopy-blocktime",
    "postcopy-preempt", "postcopy-ram", "return-path", "switchover-ack", "zero-copy-send",
)  # fmt: skip
"""Those that an operator may have turned on for a migration, and that a save has no use for."""


@final
class SaveFailed(VmmError):
    """The machine was not saved."""

    text: ClassVar[str] = "The machine was not saved, and goes on: {reason}"
    reason: str


@final
class SaveUnclear(VmmError):
    """The machine was not saved, and need not go on."""

    text: ClassVar[str] = "The save went wrong: {reason}"
    reason: str


def save_machine(monitor: str, path: str) -> int:
    """Save the machine whose monitor is at `monitor` in the file `path`, and end it. Return the exit status."""
    target = Path(os.path.abspath(path))
    interruption = Interruption()
    try:
        with Bar.on_stderr() as bar:
            report: str = trio.run(_save, monitor, target, interruption, bar)
    except Interrupted as error:
        return interruption.told(error)
    print(f"saved: {target}, {report}; the machine has ended")
    return 0


async def _save(monitor: str, target: Path, interruption: Interruption, bar: Bar) -> str:
    async def work() -> str:
        return await save(monitor, target, interruption, bar)

    return await interruptible(_WHAT, work, interruption)


async def save(monitor: str, target: Path, interruption: Interruption, bar: Bar | None = None) -> str:
    """Save a machine in `target`, and end it; say what of its RAM is there.

    If it does not come about, or an interruption comes before all is on disk, the guest goes on, and `target` is as it
    was.

    Raises:
        VmmError: why there is no such file.
    """
    if os.path.isdir(target):  # noqa: ASYNC240 - as fast as what is done with it next
        raise HostFileRefused(action="write", path=str(target), reason="it is a directory, not a regular file")
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}")  # no other save's, into the same file
    async with qmp_session(monitor) as client:
        phase = (await client.execute("query-machine-phase"))["phase"]
        if phase != "machine-ready":
            reason = f"the machine at {monitor} has no guest yet; its phase is {phase}, and must be machine-ready"
            raise SaveFailed(reason=reason)
        ran = (await client.execute("query-status"))["running"]
        try:
            info = await _written(client, part, interruption, bar or Bar(None))
            with trio.CancelScope(shield=True):
                await _put_in_place(client, part, target, ran=ran)
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        await _quit(client)
    ram = info["ram"]
    if ram["normal"] or ram["duplicate"]:
        return f"with {ram['normal-bytes']} bytes of RAM"
    return "its RAM where it was"


async def _written(client: QmpClient, part: Path, interruption: Interruption, bar: Bar) -> dict[str, Any]:
    """Have the machine write `part`; return what `query-migrate` says once all is on disk."""
    try:
        try:
            await client.execute(
                "migrate", parameters={"mode": "cpr-reboot", "tls-creds": ""},
                channels=[{"channel-type": "main", "addr": {"transport": "file", "filename": str(part), "offset": 0}}],
                capabilities=[{"capability": name, "state": name in _ON} for name in (*_ON, *_OFF)],
            )  # fmt: skip
        except CommandFailed as error:
            raise SaveFailed(reason=error.desc) from error
        info = await outcome(client, interruption, bar)
    except (CommandFailed, MonitorGone) as error:  # of which the first may come just before the other
        raise SaveUnclear(reason="the machine ended while it was being saved") from error
    if info["status"] == "cancelled":
        raise Interrupted(what=_WHAT, outcome="the machine goes on")
    if info["status"] == "failed":
        raise SaveFailed(reason=info["error-desc"])
    return info


async def _put_in_place(client: QmpClient, part: Path, target: Path, *, ran: bool) -> None:
    """Give the file its name, on disk too. If that cannot be, the guest goes on."""
    renamed = False
    try:
        os.rename(part, target)
        renamed = True
        hostio.sync_directory(str(target.parent))
    except (OSError, HostFileRefused) as error:
        if renamed:
            with suppress(OSError):
                os.unlink(target)
        await client.execute("cont")
        if not ran:
            await client.execute("stop")
        refused = hostio.refused("write", str(target), error) if isinstance(error, OSError) else error
        raise SaveFailed(reason=str(refused)) from error


async def _quit(client: QmpClient) -> None:
    with suppress(MonitorGone):  # the end of its monitor is the end of the machine
        await client.execute("quit")
        while True:
            await client.read()
