"""`trio-vmm save` and `trio-vmm resume`: a machine over an end of its process, or of its host's.

RAM stays where it is if it is in a file (`memory-backend-file`); else it is copied. The file of a saved machine is
whole or not there: it is written under another name beside it. It is used up: once the guest is here, it is removed.
"""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, final

import attrs
import trio

from vmm import hostio
from vmm.cli_options import OPTIONS, given
from vmm.cli_progress import Bar
from vmm.cli_watch import Interrupted, Interruption, interruptible, outcome
from vmm.errors import HostFileRefused, OptionInvalid, VmmError
from vmm.qmp_client import CommandFailed, MonitorGone, qmp_session
from vmm.recipe import Recipe, Step

if TYPE_CHECKING:
    import argparse
    from collections.abc import Generator, Iterator, Mapping

    from vmm.migration.stream_records import Record
    from vmm.qmp_client import QmpClient

_WHAT: Final = "The save"
_PIECE: Final = 1 << 20
_HEAD_LIMIT: Final = 16 << 20
"""Bytes in which the recipe of a machine must be found. Both of its records are smaller."""


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


@final
class SavedStateRefused(VmmError):
    """A file that no machine can be resumed from."""

    text: ClassVar[str] = "Cannot resume from {path}: {reason}"
    path: str
    reason: str


# --- save -----------------------------------------------------------------------------------------------------


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
        await client.execute(
            "migrate", parameters={"mode": "cpr-reboot"},
            channels=[{"channel-type": "main", "addr": {"transport": "file", "filename": str(part), "offset": 0}}],
            # The event tells at once when it is over.
            capabilities=[{"capability": name, "state": True} for name in ("x-ignore-shared", "events")],
        )  # fmt: skip
        info = await outcome(client, interruption, bar)
    except CommandFailed as error:
        raise SaveFailed(reason=error.desc) from error
    except MonitorGone as error:
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
        _sync_directory(target.parent)
    except (OSError, HostFileRefused) as error:
        if renamed:
            with suppress(OSError):
                os.unlink(target)
        await client.execute("cont")
        if not ran:
            await client.execute("stop")
        refused = hostio.refused("write", str(target), error) if isinstance(error, OSError) else error
        raise SaveFailed(reason=str(refused)) from error


def _sync_directory(path: Path) -> None:
    fd = hostio.open_directory(str(path))
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


async def _quit(client: QmpClient) -> None:
    with suppress(MonitorGone):  # the end of its monitor is the end of the machine
        await client.execute("quit")
        while True:
            await client.read()


# --- resume ---------------------------------------------------------------------------------------------------


def resume_machine(path: str, options: argparse.Namespace) -> int:
    """Go on with the machine that is saved in `path`, in this process; return its exit status at its end."""
    from vmm.process import run_process

    target = os.path.abspath(path)
    with claimed(target) as claim:

        def used_up() -> None:
            with suppress(FileNotFoundError):
                os.unlink(target)
            claim.close()

        return run_process(resumed(target, options), options, os.environ, begun=used_up)


@contextmanager
def claimed(path: str) -> Generator[ExitStack, None, None]:
    """Lock the file at `path`, until the block is left or what it is given is closed: of two that resume, one does.

    RAM that is in the file itself has no lock of its own.

    Raises:
        SavedStateRefused, HostFileRefused: another process resumes from it, or it cannot be opened.
    """
    with ExitStack() as claim:
        fd = hostio.open_saved_state(path, 0)
        claim.callback(os.close, fd)
        if not hostio.lock_saved_state(fd, path):
            reason = "another process is resuming from it; its guest is that process's"
            raise SavedStateRefused(path=path, reason=reason)
        yield claim


def resumed(path: str, options: argparse.Namespace) -> Recipe:
    """Return the recipe that goes on with the machine in `path`, with what `options` of `run` say besides.

    Raises:
        OptionInvalid: an option that has no place here.
        SavedStateRefused, HostFileRefused: the file is not the operator's own, or is none.
    """
    from vmm.cli_recipe import recipe_of

    for option in OPTIONS:
        if given(options, option) and option.name not in _BESIDES:
            wanted = f"possible with resume: the machine is the one in {path}; leave it out"
            raise OptionInvalid(option=option.name, value=getattr(options, option.attribute), wanted=wanted)
    more = recipe_of(options)
    saved = Saved.read(path)
    return Recipe(f"of {path}", (*saved.steps(more), *more, Step("loadvm", {"name": path})))


_BESIDES: Final = (
    "-chardev", "-qmp", "-mon", "-websocket", "-S", "-allow-difference", "-nodefaults", "-nographic",
)  # fmt: skip


@final
@attrs.frozen
class Saved:
    """What a file says of the machine that is saved in it."""

    path: str
    recipe: tuple[Step, ...]
    """The guest's machine, and what else it had where it was."""

    @classmethod
    def read(cls, path: str) -> Saved:
        """Read the beginning of a file, which must be this user's own: it says what is opened here.

        Raises:
            SavedStateRefused, HostFileRefused: it is not, or is no saved machine.
        """
        from vmm.migration.stream_records import PROCESSOR, Home, Section
        from vmm.migration.stream_records import Recipe as RecipeRecord

        commands: list[Mapping[str, Any]] = []
        homes = 0
        for record in _records(path):
            if isinstance(record, RecipeRecord):
                commands += record.commands
            elif isinstance(record, Home):
                commands += record.commands
                homes += 1
            elif isinstance(record, Section) and record.name != PROCESSOR:
                break
        if not commands or not homes:
            reason = "it does not say what the machine had beside its guest; load it by run -loadvm"
            raise SavedStateRefused(path=path, reason=reason)
        steps = Recipe.from_json(f"of {path}", [dict(command) for command in commands])
        return cls(path, tuple(step for step in steps if step.execute != "finish-machine-init"))

    def steps(self, more: Recipe) -> Iterator[Step]:
        """Yield what makes the machine, without what `more` has in its place, by id.

        Raises:
            SavedStateRefused: something that nobody can open again.
        """
        instead = {(step.execute, step.arguments.get("id")) for step in more if "id" in step.arguments}
        for step in self.recipe:
            if "id" in step.arguments and (step.execute, step.arguments["id"]) in instead:
                continue
            if step.execute == "chardev-add" and _was_a_descriptor(step.arguments):
                name = step.arguments["id"]
                reason = (
                    f"chardev {name!r} was a socket that its process was started with, and cannot be opened again; "
                    f"give -chardev with id={name} in its place"
                )
                raise SavedStateRefused(path=self.path, reason=reason)
            yield _appending(step) if step.execute == "chardev-add" else step


def _appending(step: Step) -> Step:
    """Return `step`, which makes a chardev, so that it does not empty the file that it has written to before."""
    backend = step.arguments["backend"]
    if backend["type"] != "file":
        return step
    return Step(step.execute, {**step.arguments, "backend": {**backend, "data": {**backend["data"], "append": True}}})


def _was_a_descriptor(arguments: Mapping[str, Any]) -> bool:
    data = arguments["backend"].get("data", {})
    return bool(arguments["backend"]["type"] == "socket" and data["addr"]["type"] == "fd")


def _records(path: str) -> Iterator[Record]:
    """Yield the records that a file of this user's own begins with."""
    from vmm.errors import StreamCorrupt
    from vmm.migration.stream import StreamReader

    fd = hostio.open_saved_state(path, 0)
    try:
        found = os.fstat(fd)
        if found.st_uid != os.geteuid():
            reason = f"it belongs to uid {found.st_uid}, not to uid {os.geteuid()}, whose machine it would be"
            raise SavedStateRefused(path=path, reason=reason)
        if found.st_mode & 0o022:
            reason = f"its mode is {stat.S_IMODE(found.st_mode):04o}, so others can write it; use chmod 600"
            raise SavedStateRefused(path=path, reason=reason)
        reader = StreamReader()
        for _ in range(_HEAD_LIMIT // _PIECE):
            data = os.read(fd, _PIECE)
            if not data:
                reader.close()
                return
            yield from reader.feed(data)
    except StreamCorrupt as error:
        raise SavedStateRefused(path=path, reason=str(error)) from error
    except OSError as error:
        raise hostio.refused("read", path, error) from error
    finally:
        os.close(fd)
