"""`trio-vmm snapshot`: snapshots of a running machine's guest, which goes on."""

from __future__ import annotations

import json
import secrets
import time
from typing import TYPE_CHECKING, Any, ClassVar, Final, final

import attrs
import trio

from vmm.cli_progress import Bar, Figures, harmless, size
from vmm.cli_watch import Interrupted, Interruption, interruptible
from vmm.errors import VmmError
from vmm.qmp_client import CommandFailed, MonitorGone, qmp_session

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping, Sequence

    from vmm.qmp_client import QmpClient

_DONE: Final[Mapping[str, str]] = {"save": "saved", "load": "loaded", "delete": "deleted"}
_DOING: Final[Mapping[str, str]] = {"save": "saving", "load": "loading", "delete": "deleting"}
_FIELDS: Final = ("rate", "left", "pause")
_WHAT: Final = "The snapshot"


@final
class SnapshotFailed(VmmError):
    """A snapshot was not made, loaded or removed."""

    text: ClassVar[str] = "Snapshot {tag} was not {done}: {reason}"
    tag: str
    done: str
    reason: str


@final
class SnapshotUnclear(VmmError):
    """The machine ended, and nobody tells how far it was."""

    text: ClassVar[str] = "The machine ended while snapshot {tag} was being {done}; a snapshot is whole or not there"
    tag: str
    done: str


def add_snapshot_options(parser: argparse.ArgumentParser) -> None:
    """Add the four commands."""
    commands = parser.add_subparsers(dest="what", metavar="save|load|delete|list", required=True)
    for what, help_text in (
        ("save", "save the guest, which goes on meanwhile"),
        ("load", "put the guest that was saved in place of the present one"),
        ("delete", "remove a snapshot"),
        ("list", "list the snapshots of a machine"),
    ):
        command = commands.add_parser(what, help=help_text, allow_abbrev=False)
        command.add_argument("--qmp", required=True, metavar="SOCK", help="the machine's QMP socket")
        if what == "list":
            command.add_argument("--json", action="store_true", help="as JSON")
            continue
        command.add_argument(
            "--directory", metavar="ID", help="the object of type snapshot-directory that it is in (default: the only "
            "one, or the only one that has any snapshots, or has this one)",
        )  # fmt: skip
        command.add_argument("tag", metavar="TAG", help="the snapshot's name")


def run_snapshot_command(options: argparse.Namespace) -> int:
    """Carry one of them out; return the exit status."""
    if options.what == "list":
        found: list[dict[str, Any]] = trio.run(_listed, options.qmp)
        if options.json:
            print(json.dumps(found))
        else:
            print("".join(f"{line}\n" for line in table(found)), end="")
        return 0
    interruption = Interruption()
    wish = Wish(options.what, options.tag, options.directory)
    try:
        with Bar.on_stderr(fields=_FIELDS) as bar:
            said: str = trio.run(_watched, options.qmp, wish, interruption, bar)
    except Interrupted as error:
        return interruption.told(error)
    print(said)
    return 0


def table(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line for each snapshot: name, directory, size, time, and the machine or what is wrong with it."""
    names = max((len(each["tag"]) for each in found), default=0)
    places = max((len(each["vmstate"]) for each in found), default=0)
    for each in found:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each["date-sec"]))
        rest = each.get("machine") or each.get("fault", "")
        yield harmless(f"{each['tag']:{names}}  {each['vmstate']:{places}}  {size(each['size']):>8}  {when}  {rest}")


async def _listed(monitor: str) -> Any:
    async with qmp_session(monitor) as client:
        return await client.execute("x-query-snapshots")


@final
@attrs.frozen
class Wish:
    """What is to be done with which snapshot."""

    what: str
    """ "save", "load" or "delete"."""
    tag: str
    directory: str | None = None
    """The object that it is in; None where that is to be found out."""

    @property
    def name(self) -> str:
        """The tag for a text: it need not be one that a snapshot can have."""
        return harmless(self.tag) or "''"

    def failed(self, reason: str) -> SnapshotFailed:
        """Return the error."""
        return SnapshotFailed(tag=self.name, done=_DONE[self.what], reason=harmless(reason))


async def _watched(monitor: str, wish: Wish, interruption: Interruption, bar: Bar) -> str:
    async def work() -> str:
        return await snapshot(monitor, wish, interruption, bar)

    return await interruptible(_WHAT, work, interruption)


async def snapshot(monitor: str, wish: Wish, interruption: Interruption, bar: Bar) -> str:
    """Do what is wished, as a job of the machine whose monitor is at `monitor`; say what has been done.

    Raises:
        SnapshotFailed, SnapshotUnclear, Interrupted: it has not.
    """
    async with qmp_session(monitor) as client:
        try:
            directory = wish.directory or await _directory_of(client, wish)
            job = f"trio-vmm-{secrets.token_hex(4)}"
            where: dict[str, Any] = {"devices": [directory]} if wish.what == "delete" else {"devices": []}
            if wish.what != "delete" and directory is not None:
                where["vmstate"] = directory
            await client.execute(f"snapshot-{wish.what}", job_id=job, tag=wish.tag, **where)
        except CommandFailed as failure:
            lacks_directory = wish.directory is None and "vmstate" in failure.desc
            hint = "; say by --directory which one is meant" if lacks_directory else ""
            raise wish.failed(failure.desc + hint) from failure
        began = time.monotonic()
        try:
            error = await _concluded(client, job, wish, interruption, bar)
            seconds = time.monotonic() - began
            info = await client.execute("query-migrate") if error is None and wish.what == "save" else {}
        except (CommandFailed, MonitorGone) as failure:  # of which the first may come just before the other
            raise SnapshotUnclear(tag=wish.name, done=_DONE[wish.what]) from failure
    if error is not None:
        if interruption.came and wish.what == "save":
            raise Interrupted(what=_WHAT, outcome=f"{error}; the guest goes on")
        raise wish.failed(error)
    if not info:
        return f"{_DONE[wish.what]}: snapshot {wish.name}"
    amount = f"{size(info['ram']['transferred'])} in {seconds:.1f} s"
    return f"saved: snapshot {wish.name}, {amount}; the guest's pause: {info['downtime']} ms"


async def _directory_of(client: QmpClient, wish: Wish) -> str | None:
    """Return the directory that is meant; None for the only one, if there is only one.

    Raises:
        SnapshotFailed: that cannot be known.
    """
    found = await client.execute("x-query-snapshots")
    there = {each["vmstate"] for each in found if wish.what == "save" or each["tag"] == wish.tag}
    if len(there) == 1:
        return str(there.pop())
    if wish.what == "save":
        if not there:
            return None
        known = f"{', '.join(sorted(there))} have snapshots"
    else:
        known = f"it is in {', '.join(sorted(there))}" if there else "no directory has it"
    raise wish.failed(f"{known}; say by --directory which object of type snapshot-directory is meant")


async def _concluded(client: QmpClient, job: str, wish: Wish, interruption: Interruption, bar: Bar) -> str | None:
    """Show a job until it is over, and forget it; return what went wrong.

    An interruption cancels it. Where that cannot be, it is said, and the job goes on.
    """
    cancelled = False
    while True:
        found = next((each for each in await client.execute("query-jobs") if each["id"] == job), None)
        if found is None:
            return "its job was dismissed over another monitor session"
        if found["status"] == "concluded":
            await client.execute("job-dismiss", id=job)
            error: str | None = found.get("error")
            return error
        # A removal is no migration, and tells nothing.
        figures = Figures.of(await client.execute("query-migrate") if wish.what != "delete" else {})
        bar.show(attrs.evolve(figures, word=_DOING[wish.what]))
        if interruption.came and not cancelled:
            cancelled = True
            try:
                await client.execute("job-cancel", id=job)
            except CommandFailed as error:
                bar.say(f"it cannot be called off: {error.desc}")
            continue
        with trio.move_on_after(bar.period), interruption.ends_wait(not cancelled):
            await client.wait_event(lambda event: event["event"] == "JOB_STATUS_CHANGE")
