"""`trio-vmm resume` and `trio-vmm restore`: a machine from the file in which it was saved.

`resume` goes on with a machine as it was, with its monitors, and uses the file up, which is removed once all of the
guest is here. `restore` starts another one from it, as often as it is asked to, with the monitors that its own options
say.
"""

from __future__ import annotations

import os
import stat
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any, ClassVar, Final, final

import attrs
import trio

from vmm import hostio
from vmm.cli_options import OPTIONS, given
from vmm.cli_progress import Bar, Figures
from vmm.errors import DeviceNotActive, HostFileRefused, OptionInvalid, VmmError
from vmm.recipe import Recipe, Step

if TYPE_CHECKING:
    import argparse
    from collections.abc import Generator, Iterator, Mapping

    from vmm.migration.status import MigrationProgress
    from vmm.migration.stream_records import Record
    from vmm.nursery_tree import Tree
    from vmm.phases.absent_pages import AbsentPages
    from vmm.phases.foundation import Host
    from vmm.phases.migration_state import MigrationState

_PIECE: Final = 1 << 20
_HEAD_LIMIT: Final = 16 << 20
"""Bytes in which the recipe of a machine must be found. Both of its records are smaller."""


@final
class SavedStateRefused(VmmError):
    """A file that no machine can be resumed from, or restored."""

    text: ClassVar[str] = "Cannot {what} from {path}: {reason}"
    what: str
    path: str
    reason: str


def resume_machine(path: str, options: argparse.Namespace, *, whole: bool) -> int:
    """Go on with the machine that is saved in `path`, in this process; return its exit status at its end."""
    from vmm.process import run_process

    with claimed(path) as claim, Bar.on_stderr(fields=_FIELDS) as bar:
        recipe = resumed(claim.path, options, whole=whole)
        loading = Loading(bar, claim, alone=not _speaks(recipe))
        return run_process(recipe, options, os.environ, begun=loading.begun, beside=loading.watch)


def restore_machine(path: str, options: argparse.Namespace, *, whole: bool) -> int:
    """Start the machine that is saved in `path`, in this process; return its exit status at its end."""
    from vmm.process import run_process

    target = os.path.abspath(path)
    with Bar.on_stderr(fields=_FIELDS) as bar:
        recipe = restored(target, options, whole=whole)
        loading = Loading(bar, alone=not _speaks(recipe))
        return run_process(recipe, options, os.environ, beside=loading.watch)


@final
class Claim:
    """A file that a machine is resumed from, locked."""

    def __init__(self, path: str) -> None:
        """Lock it.

        Raises:
            SavedStateRefused, HostFileRefused: another process resumes from it, or it cannot be opened.
        """
        self.path: Final = os.path.realpath(path)
        """The file itself: a link to it would be removed without it."""
        self._fd = hostio.open_saved_state(self.path, 0)
        try:
            if not hostio.lock_saved_state(self._fd, self.path):
                raise self._refused("another process is resuming from it; its guest is that process's")
            if not self._is_there():
                raise self._refused("it was removed or replaced meanwhile, perhaps because its guest runs by now")
        except BaseException:
            self.close()
            raise

    def _refused(self, reason: str) -> SavedStateRefused:
        return SavedStateRefused(what="resume", path=self.path, reason=reason)

    def _is_there(self) -> bool:
        """Say whether what is locked is what has the name."""
        try:
            return os.path.samestat(os.fstat(self._fd), os.stat(self.path))
        except FileNotFoundError:
            return False
        except OSError as error:
            raise hostio.refused("read", self.path, error) from error

    def use_up(self) -> str | None:
        """Remove the file, on disk too, unless another one is there by now, and let go of it. For a thread.

        Return what went wrong, if it did.
        """
        try:
            if self._is_there():
                os.unlink(self.path)
                hostio.sync_directory(os.path.dirname(self.path))
            elif os.path.lexists(self.path):
                return f"{self.path} was replaced while a guest was resumed from it; what is there now stays"
            elif os.fstat(self._fd).st_nlink:
                return f"{self.path} was moved while a guest was resumed from it; remove it: its guest runs here"
        except HostFileRefused as error:
            return str(error)
        except OSError as error:
            return str(hostio.refused("remove", self.path, error))
        finally:
            self.close()
        return None

    def close(self) -> None:
        """Let go of it. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@contextmanager
def claimed(path: str) -> Generator[Claim, None, None]:
    """Lock the file at `path`, until the block is left or it is used up: of two that resume, one does.

    RAM that is in the file of a back end has no lock of its own. Raises as `Claim`.
    """
    with closing(Claim(path)) as claim:
        yield claim


def resumed(path: str, options: argparse.Namespace, *, whole: bool = False) -> Recipe:
    """Return the recipe that goes on with the machine in `path`, with what `options` of `run` say besides.

    Args:
        whole: whether all of RAM is loaded before the guest runs, also where it could come as it is used.

    Raises:
        OptionInvalid: an option that has no place here.
        SavedStateRefused, HostFileRefused: the file is not the operator's own, or is none.
    """
    more = _besides("resume", path, options)
    saved = Saved.read(path, "resume")
    if not saved.has_home:
        reason = "it does not say what the machine had beside its guest; start it by restore"
        raise SavedStateRefused(what="resume", path=path, reason=reason)
    return Recipe(f"of {path}", (*saved.steps(more, home=True), *more, saved.loaded(whole=whole)))


def restored(path: str, options: argparse.Namespace, *, whole: bool = False) -> Recipe:
    """Return the recipe that starts the machine in `path`, with what `options` of `run` say besides.

    What a file that was not written here says of its machine is data: of this host it has what is allowed by name.

    Args:
        whole: as of `resumed`.

    Raises: likewise.
    """
    more = _besides("restore", path, options)
    saved = Saved.read(path, "restore")
    if not saved.has_home:
        return Recipe(f"of {path}", (*more, saved.comes_in(whole=whole)))
    return Recipe(f"of {path}", (*saved.steps(more, home=False), *more, saved.loaded(whole=whole)))


def _besides(what: str, path: str, options: argparse.Namespace) -> Recipe:
    from vmm.cli_recipe import recipe_of

    for option in OPTIONS:
        if given(options, option) and option.name not in _BESIDES[what]:
            wanted = f"possible with {what}: the machine is the one in {path}; leave it out"
            raise OptionInvalid(option=option.name, value=getattr(options, option.attribute), wanted=wanted)
    return recipe_of(options)


_RESUME: Final = (
    "-chardev", "-qmp", "-mon", "-websocket", "-S", "-allow-difference", "-nodefaults", "-nographic",
)  # fmt: skip
_BESIDES: Final[Mapping[str, tuple[str, ...]]] = {"resume": _RESUME, "restore": (*_RESUME, "-allow-resource")}
"""Options of `run` that go with each."""

_FIELDS: Final = ("rate", "left", "pause")


def _speaks(recipe: Recipe) -> bool:
    """Say whether what `recipe` makes writes where this process was started, once it runs."""
    return any(step.execute == "chardev-add" and step.arguments["backend"]["type"] == "stdio" for step in recipe)


@final
class Loading:
    """A guest that comes from a file, shown until all of it is here. Then the file is used up, if it is to be.

    Args:
        alone: whether nobody else writes to the terminal once the guest runs, while its pages still come.
    """

    def __init__(self, bar: Bar, claim: Claim | None = None, *, alone: bool = True) -> None:
        self._alone = alone
        self._bar = bar
        self._claim = claim
        self._begun = trio.Event()
        self._progress: MigrationProgress | None = None
        """That of how the guest comes: it may be on its way elsewhere before all of it is here."""

    def begun(self) -> None:
        """Note that the machine is complete, and its guest has been loaded, or at least runs."""
        self._begun.set()

    async def watch(self, host: Host) -> None:
        """Show how far it is."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._show, host)
            await self._use_up(host)

    async def _show(self, host: Host) -> None:
        from vmm.phases.migration_state import MigrationState  # Which a resumed machine imports anyway.

        with self._bar:
            while (figures := self._figures(host.tree, MigrationState)) is not None:
                self._bar.show(figures)
                await trio.sleep(self._bar.period)

    async def _use_up(self, host: Host) -> None:
        if self._claim is None:
            return
        from vmm.phases.migration_state import MigrationState  # Likewise.

        absent: AbsentPages | None = None
        is_here = False
        try:
            await self._begun.wait()
            with suppress(DeviceNotActive):  # the machine has ended already
                absent = host.tree.view(MigrationState).absent
                if absent is not None:
                    await absent.over.wait()
                is_here = absent is None or absent.complete
        finally:
            # A guest that ran must not run again from there, also where its machine ended before all of it was here.
            # A page that could not be had may be there another time.
            if is_here or (host.status.has_run and not (absent is not None and absent.lost)):
                with trio.CancelScope(shield=True):
                    complaint = await trio.to_thread.run_sync(self._claim.use_up)
                if complaint is not None:
                    self._bar.clear()  # which would else stand before it
                    host.complain(complaint)

    def _figures(self, tree: Tree, kind: type[MigrationState]) -> Figures | None:
        """Return what is to be seen; None once it is over."""
        try:
            state = tree.view(kind)
        except DeviceNotActive:  # it has not come as far
            return Figures(word="loading")
        if self._progress is None and state.progress is not None and state.progress.side == "target":
            self._progress = state.progress
        progress, word = self._progress, "loading"
        if progress is None:
            return Figures(word=word)
        if not progress.under_way:
            if state.absent is None or state.absent.over.is_set() or not self._alone:
                return None
            word = "fetching"  # the guest runs
        ram = progress.ram
        return Figures(
            word=word, done=ram.total - ram.remaining, total=ram.total, left=ram.remaining, moved=ram.transferred
        )


@final
@attrs.frozen
class Saved:
    """What a file says of the machine that is saved in it."""

    what: str
    """What it is read for, for texts."""
    path: str
    recipe: tuple[Step, ...]
    """The guest's machine."""
    home: tuple[Step, ...]
    """What else it had where it was."""
    has_home: bool
    """Whether that is told."""
    is_mapped: bool
    """Whether each page of RAM has its place in the file, so that it can come as it is used."""

    @classmethod
    def read(cls, path: str, what: str) -> Saved:
        """Read the beginning of a file, which must be this user's own: it says what is opened here.

        Raises:
            SavedStateRefused, HostFileRefused: it is not, or is no saved machine.
        """
        from vmm.migration.ram_file_records import RamInPlace, RamMapped
        from vmm.migration.ram_records import RamExtents
        from vmm.migration.stream_records import PROCESSOR, Home, Section
        from vmm.migration.stream_records import Recipe as RecipeRecord

        commands: list[Mapping[str, Any]] = []
        home: list[Mapping[str, Any]] | None = None
        is_mapped = False
        for record in _records(path, what):
            if isinstance(record, RecipeRecord):
                commands += record.commands
            elif isinstance(record, Home):
                home = [*(home or []), *record.commands]
            elif isinstance(record, RamMapped):
                is_mapped = True
                break
            elif isinstance(record, (RamExtents, RamInPlace)) or (
                isinstance(record, Section) and record.name != PROCESSOR
            ):
                break
        if not commands:
            raise SavedStateRefused(what=what, path=path, reason="it does not say what machine it is of")
        made = [step for step in _steps_of(path, commands) if step.execute != "finish-machine-init"]
        return cls(what, path, tuple(made), tuple(_steps_of(path, home or [])), home is not None, is_mapped)

    def loaded(self, *, whole: bool) -> Step:
        """Return what loads the guest into its machine: its RAM as it is used where that can be, unless `whole`."""
        on_demand = {"on-demand": True} if self.is_mapped and not whole else {}
        return Step("loadvm", {"name": self.path, **on_demand})

    def comes_in(self, *, whole: bool) -> Step:
        """Return what makes the machine and loads the guest, likewise."""
        channel = {"channel-type": "main", "addr": {"transport": "file", "filename": self.path, "offset": 0}}
        on_demand = {"parameters": {"x-restore-on-demand": True}} if self.is_mapped and not whole else {}
        return Step("migrate-incoming", {"channels": [channel], **on_demand})

    def steps(self, more: Recipe, *, home: bool) -> Iterator[Step]:
        """Yield what makes the machine, without what `more` has in its place, by id.

        Args:
            home: whether what it had beside its guest is wanted.

        Raises:
            SavedStateRefused: something that nobody can open again.
        """
        instead = {(step.execute, step.arguments.get("id")) for step in more if "id" in step.arguments}
        for step in (*self.recipe, *(self.home if home else ())):
            if "id" in step.arguments and (step.execute, step.arguments["id"]) in instead:
                continue
            if step.execute == "chardev-add" and _was_a_descriptor(step.arguments):
                name = step.arguments["id"]
                reason = (
                    f"chardev {name!r} was a socket that its process was started with, and cannot be opened again; "
                    f"give -chardev with id={name} in its place"
                )
                raise SavedStateRefused(what=self.what, path=self.path, reason=reason)
            yield _appending(step) if step.execute == "chardev-add" else step


def _steps_of(path: str, commands: list[Mapping[str, Any]]) -> Recipe:
    return Recipe.from_json(f"of {path}", [dict(command) for command in commands])


def _appending(step: Step) -> Step:
    """Return `step`, which makes a chardev, so that it does not empty the file that it has written to before."""
    backend = step.arguments["backend"]
    if backend["type"] != "file":
        return step
    return Step(step.execute, {**step.arguments, "backend": {**backend, "data": {**backend["data"], "append": True}}})


def _was_a_descriptor(arguments: Mapping[str, Any]) -> bool:
    data = arguments["backend"].get("data", {})
    return bool(arguments["backend"]["type"] == "socket" and data["addr"]["type"] == "fd")


def _records(path: str, what: str) -> Iterator[Record]:
    """Yield the records that a file of this user's own begins with."""
    from vmm.errors import StreamCorrupt
    from vmm.migration.stream import StreamReader

    fd = hostio.open_saved_state(path, 0)
    try:
        found = os.fstat(fd)
        if found.st_uid != os.geteuid():
            reason = f"it belongs to uid {found.st_uid}, not to uid {os.geteuid()}, whose machine it would be"
            raise SavedStateRefused(what=what, path=path, reason=reason)
        if found.st_mode & 0o022:
            reason = f"its mode is {stat.S_IMODE(found.st_mode):04o}, so others can write it; use chmod 600"
            raise SavedStateRefused(what=what, path=path, reason=reason)
        reader = StreamReader(seekable=True)
        for _ in range(_HEAD_LIMIT // _PIECE):
            data = os.read(fd, _PIECE)
            if not data:
                reader.close()
                return
            yield from reader.feed(data)
    except StreamCorrupt as error:
        raise SavedStateRefused(what=what, path=path, reason=str(error)) from error
    except OSError as error:
        raise hostio.refused("read", path, error) from error
    finally:
        os.close(fd)
