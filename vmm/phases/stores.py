"""The back ends that phase boot runs: chardevs, monitors, memory, sources of random bytes, taps, and credentials."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, final

import attrs

from vmm.errors import (
    BackendInUse,
    BackendNotFound,
    DescriptorsUnclaimed,
    DeviceNotFound,
    NameTaken,
    OptionInvalid,
)
from vmm.phases import fdsets, session_moves
from vmm.phases.chardev_sections import BYTES_VERSION, SECTION, byte_loader, byte_saver, loader, saver
from vmm.phases.luggage import FDSET, Luggage, is_luggage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from vmm.backends.chardev import Chardev
    from vmm.backends.chardev_state import ChardevState
    from vmm.backends.memory import MemoryBackend
    from vmm.backends.rng import Rng
    from vmm.backends.snapshots import SnapshotDirectory
    from vmm.backends.tap import Tap
    from vmm.migration.registry import StateRegistry
    from vmm.migration.tls_creds import TlsCredentials
    from vmm.phases.fdsets import FdSets
    from vmm.phases.monitors import Monitor
    from vmm.phases.qtest import QtestBackend
    from vmm.phases.qtest_clients import QtestClients
    from vmm.phases.session_moves import MovingSessions
    from vmm.phases.websocket import WebSocketBackend
    from vmm.recipe import Recipe
    from vmm.residents import Resident, Residents


@final
@attrs.define(eq=False)
class Held:
    """A chardev with its task, and who uses it."""

    chardev: Chardev
    resident: Resident
    user: str | None = None


@final
@attrs.define(eq=False)
class HeldRng:
    """A source of random bytes with its task, and which devices use it."""

    rng: Rng
    resident: Resident
    users: list[str] = attrs.Factory(list)


@final
@attrs.define(eq=False)
class HeldMemory:
    """A back end of RAM with its task, and whether it is the machine's RAM."""

    memory: MemoryBackend
    resident: Resident
    in_use: bool = False


@final
@attrs.frozen
class SectionOwner:
    """How a back end's state is saved and loaded; see `vmm.migration.registry`."""

    version: int
    save: Callable[[], Mapping[str, Any] | None]
    load: Callable[[int, Mapping[str, Any]], Callable[[], None]]
    optional: bool = False


@final
class BootStores:
    """Chardevs, monitors and other objects by name. The facet of `may-create-backend`; others may look and attach."""

    what: ClassVar[str] = "Chardevs"
    phase: ClassVar[str] = "boot"

    def __init__(self, residents: Residents, fdsets: FdSets) -> None:
        self._residents = residents
        self._fdsets = fdsets
        self.luggage: Final = Luggage()
        """What a predecessor's clients had, until the state is loaded that claims it."""
        self.chardevs: Final[dict[str, Held]] = {}
        self.monitors: Final[dict[str, tuple[Monitor | WebSocketBackend | QtestBackend, Resident]]] = {}
        self.rngs: Final[dict[str, HeldRng]] = {}
        self.memories: Final[dict[str, HeldMemory]] = {}
        self.snapshots: Final[dict[str, tuple[SnapshotDirectory, Resident]]] = {}
        self.netdevs: Final[dict[str, tuple[Tap, Resident]]] = {}
        self.tls: Final[dict[str, tuple[TlsCredentials, Resident]]] = {}
        self._sent: frozenset[str] = frozenset()
        self._sent_sets: frozenset[str] = frozenset()
        self._with_sessions = False
        self._moved: dict[str, int] = {}
        self._gone: tuple[str, ...] = ()

    # Creating.

    async def adopt(self, family: str, name: str, backend: Any) -> None:
        """Start `backend` and register it. Raises `NameTaken` before anything was started."""
        stores: Mapping[str, Mapping[str, object]] = {
            "chardev": self.chardevs, "monitor": self.monitors, "rng": self.rngs, "memory": self.memories,
            "netdev": self.netdevs, "snapshots": self.snapshots, "tls": self.tls,
        }  # fmt: skip
        if name in stores[family]:
            raise NameTaken(what=family.capitalize(), name=name)
        resident = await self._residents.start(f"{family} {name}", backend.serve)
        if family == "chardev":
            self.chardevs[name] = Held(backend, resident)
        elif family == "rng":
            self.rngs[name] = HeldRng(backend, resident)
        elif family == "memory":
            self.memories[name] = HeldMemory(backend, resident)
        elif family == "netdev":
            self.netdevs[name] = (backend, resident)
        elif family == "tls":
            self.tls[name] = (backend, resident)
        elif family == "snapshots":
            self.snapshots[name] = (backend, resident)
        else:
            self.monitors[name] = (backend, resident)

    async def dismiss(self, family: str, name: str) -> None:
        """End a back end's task and forget it. `BackendNotFound`, or `BackendInUse` for one with a user."""
        if family == "chardev":
            held = self._held(name)
            if held.user is not None:
                raise BackendInUse(what="Chardev", name=name, user=held.user)
            del self.chardevs[name]
            await held.resident.leave()
        elif family == "rng":
            source = self.rngs[name]
            if source.users:
                raise BackendInUse(what="Object", name=name, user=f"device {', '.join(source.users)}")
            del self.rngs[name]
            await source.resident.leave()
        elif family == "memory":
            memory = self.memories[name]
            if memory.in_use:
                raise BackendInUse(what="Object", name=name, user="the machine, whose RAM it is")
            del self.memories[name]
            await memory.resident.leave()
        elif family == "snapshots":
            await self.snapshots.pop(name)[1].leave()
        elif family == "netdev":
            if name not in self.netdevs:
                raise DeviceNotFound(what="Netdev", name=name, known=_known(self.netdevs))
            await self.netdevs.pop(name)[1].leave()
        elif family == "tls":
            await self.tls.pop(name)[1].leave()
        else:
            await self._dismiss_monitor(name)

    async def _dismiss_monitor(self, name: str) -> None:
        if name not in self.monitors:
            raise BackendNotFound(
                what="Object",
                name=name,
                known=_known({**self.monitors, **self.rngs, **self.memories, **self.snapshots, **self.tls}),
            )
        monitor, resident = self.monitors.pop(name)
        await resident.leave()
        if monitor.chardev is not None:
            self.free_chardev(monitor.chardev)

    def take_memory(self, name: str, size: int) -> MemoryBackend:
        """Make back end `name` the machine's RAM, of `size` bytes. Raises `BackendNotFound`, `OptionInvalid`."""
        if name not in self.memories:
            raise BackendNotFound(what="Memory back end", name=name, known=_known(self.memories))
        held = self.memories[name]
        if held.memory.size != size:
            wanted = f"the size of memory back end {name!r}, which is {held.memory.size}"
            raise OptionInvalid(option="memory.size", value=size, wanted=wanted)
        held.in_use = True
        return held.memory

    def take_rng(self, name: str, user: str) -> Rng:
        """Let device `user` use a source of random bytes. Raises `DeviceNotFound`, as QEMU does."""
        if name not in self.rngs:
            raise DeviceNotFound(what="Random source", name=name, known=_known(self.rngs))
        self.rngs[name].users.append(user)
        return self.rngs[name].rng

    def free_rng(self, name: str, user: str) -> None:
        """Undo `take_rng`."""
        self.rngs[name].users.remove(user)

    def take_chardev(self, label: str, user: str) -> Chardev:
        """Reserve a chardev for `user`. Raises `BackendNotFound`, `BackendInUse`."""
        held = self._held(label)
        if held.user is not None:
            raise BackendInUse(what="Chardev", name=label, user=held.user)
        if held.chardev.surrendered:
            raise BackendInUse(what="Chardev", name=label, user="the client of a monitor that has ended; make another")
        held.user = user
        return held.chardev

    def free_chardev(self, label: str) -> None:
        """Undo `take_chardev`, and what its user has done since: it does not stay at rest."""
        held = self._held(label)
        held.user = None
        held.chardev.set_free()

    def step_aside(self, recipe: Recipe, suffix: str) -> dict[str, str]:
        """Rename chardevs, monitors, memory and snapshots whose names `recipe` gives to others; return old -> new."""
        wanted = {str(step.arguments.get("id")) for step in recipe if step.execute in ("chardev-add", "object-add")}
        there = {*self.chardevs, *self.monitors, *self.memories, *self.snapshots}
        renamed = {name: f"{name}{suffix}" for name in wanted & there}
        self.rename(renamed)
        return renamed

    def rename(self, renamed: Mapping[str, str]) -> None:
        """Give the chardevs, monitors, memory and snapshots in `renamed` their new names."""
        for label in renamed.keys() & self.chardevs.keys():
            held = self.chardevs[renamed[label]] = self.chardevs.pop(label)
            held.chardev.label = renamed[label]
        for name in renamed.keys() & self.monitors.keys():
            self.monitors[renamed[name]] = held_monitor = self.monitors.pop(name)
            moving = getattr(held_monitor[0], "moving", None)
            if moving is not None:
                moving.name = renamed[name]
            clients = getattr(held_monitor[0], "qtest_clients", None)
            if clients is not None:
                clients.name = renamed[name]
        for name in renamed.keys() & self.memories.keys():
            self.memories[renamed[name]] = self.memories.pop(name)
        for name in renamed.keys() & self.snapshots.keys():
            self.snapshots[renamed[name]] = self.snapshots.pop(name)
        for held in self.chardevs.values():
            if held.user is not None and held.user.startswith(MONITOR):
                name = held.user.removeprefix(MONITOR)
                held.user = f"{MONITOR}{renamed.get(name, name)}"

    def _held(self, label: str) -> Held:
        if label not in self.chardevs:
            raise BackendNotFound(what="Chardev", name=label, known=_known(self.chardevs))
        return self.chardevs[label]

    # Live update. A monitor's chardev is always at rest: the monitor has its listener.

    async def quiesce(self) -> None:
        """Come to rest: afterwards this process accepts nobody, and reads and writes no chardev."""
        for monitor, _ in self.monitors.values():
            monitor.hold()
        for held in self.chardevs.values():
            await held.chardev.quiesce()

    def resume(self) -> None:
        """Go on, here: this process owns what the descriptors stand for."""
        for monitor, _ in self.monitors.values():
            monitor.go_on()
        for held in self.chardevs.values():
            if not held.chardev.surrendered and (held.user is None or not held.user.startswith(MONITOR)):
                held.chardev.resume()

    def begin(self) -> None:
        """Let those carry out what they want who drive the machine: what that needs is granted from now on."""
        for clients in self._qtest_clients():
            clients.begin()

    def _qtest_clients(self) -> list[QtestClients]:
        found = [getattr(monitor, "qtest_clients", None) for monitor, _ in self.monitors.values()]
        return [clients for clients in found if clients is not None]

    async def quiesce_chardevs(self) -> None:
        """Bring the chardevs of devices to rest; monitors, and whoever else uses one, go on."""
        for held in self._of_devices():
            await held.chardev.quiesce()

    def resume_chardevs(self) -> None:
        """Undo `quiesce_chardevs`."""
        for held in self._of_devices():
            held.chardev.resume()

    def _of_devices(self) -> list[Held]:
        return [held for held in self.chardevs.values() if held.user is None or held.user.startswith(PORT)]

    def give_up(self) -> None:
        """Let go of all that the successor has; sessions stay until they hang up."""
        for monitor, _ in self.monitors.values():
            monitor.give_up()
        for held in self.chardevs.values():
            held.chardev.give_up()
        for tap, _ in self.netdevs.values():
            tap.close()

    def prepare_to_move(self) -> None:
        """Do now what would else be done in the guest's pause: compile codecs."""
        self._fdsets.prepare()
        for moving in self.moving:
            moving.prepare()

    @property
    def moving(self) -> list[MovingSessions]:
        """The monitors whose clients can go along."""
        found = [getattr(monitor, "goes_along", None) for monitor, _ in self.monitors.values()]
        return [moving for moving in found if moving is not None]

    def standing_descriptors(self, *, sessions: bool = False) -> dict[str, int]:
        """Return what there is before the pause, by resource name; `changed_descriptors` is relative to it.

        Args:
            sessions: whether clients of monitors go along.
        """
        self._with_sessions = sessions
        descriptors, of_sets = self._descriptors(), self._fdsets.descriptors()
        self._sent, self._sent_sets = frozenset(descriptors), frozenset(of_sets)
        return descriptors | of_sets

    def changed_descriptors(self) -> tuple[dict[str, int], list[str]]:
        """Return what has come since `standing_descriptors`, and the names of what has gone."""
        descriptors, sent = self._descriptors(), self._sent
        if not self._fdsets.is_as_told:  # There may be thousands.
            descriptors, sent = descriptors | self._fdsets.descriptors(), sent | self._sent_sets
        new = {name: fd for name, fd in descriptors.items() if name not in sent}
        return new, sorted(sent - set(descriptors))

    def tell_fdsets(self, *, heard: bool) -> list[list[Any]] | None:
        """Return what is told of descriptor sets before the pause; None for a successor by which it is not `heard`."""
        if heard:
            return self._fdsets.tell()
        self._fdsets.tell_nothing()
        return None

    def expect_fdsets(self, told: object) -> None:
        """Take the descriptors of a predecessor's sets, of which it has `told`, out of the luggage. `StateRejected`."""
        if told is not None:
            self._fdsets.expect(told, self.luggage)

    def settle_fdsets(self) -> None:
        """Put them in force, unless what came with the state has replaced them."""
        self._fdsets.settle()

    def _descriptors(self) -> dict[str, int]:
        chardevs = {
            f"{_prefix(label)}{suffix}": fd
            for label, held in self.chardevs.items()
            for suffix, fd in held.chardev.descriptors().items()
        }
        monitors = {
            f"monitor/{name}/{suffix}": fd
            for name, (monitor, _) in self.monitors.items()
            for suffix, fd in monitor.descriptors().items()
        }
        held_objects: tuple[tuple[str, Rng | MemoryBackend | SnapshotDirectory], ...] = (
            *((name, held.rng) for name, held in self.rngs.items()),
            *((name, held.memory) for name, held in self.memories.items()),
            *((name, directory) for name, (directory, _) in self.snapshots.items()),
        )
        objects = {
            f"object/{name}/{suffix}": fd
            for name, backend in held_objects
            for suffix, fd in backend.descriptors().items()
        }
        netdevs = {f"netdev/{name}": tap.fd for name, (tap, _) in self.netdevs.items()}
        sessions = {
            f"monitor/{moving.name}/{suffix}": fd
            for moving in (self.moving if self._with_sessions else ())
            for suffix, fd in moving.descriptors().items()
        }
        return chardevs | monitors | objects | netdevs | sessions

    def adopt_changes(self, new: dict[str, int], gone: list[str]) -> None:
        """Keep what the source's last message brought until the sections are loaded that it belongs to."""
        if any(name.startswith(FDSET) for name in (*new, *gone)):
            self._fdsets.put_back(self.luggage)
        self.luggage.drop(gone)
        self.luggage.add({name: new.pop(name) for name in sorted(new) if is_luggage(name)})
        self._moved, self._gone = new, tuple(gone)

    def require_all_adopted(self) -> None:
        """Raise `DescriptorsUnclaimed`, having closed them, if descriptors came that nothing took."""
        left, self._moved = self._moved, {}
        for fd in left.values():
            os.close(fd)
        names = sorted((*left, *self.luggage))
        self.luggage.close()
        if names:
            raise DescriptorsUnclaimed(names=tuple(names))

    # State.

    def single_monitors(self) -> set[str]:
        """Return the names of the monitors, and of their chardevs, that go along only with their one client."""
        found = {
            name: monitor.chardev
            for name, (monitor, _) in self.monitors.items()
            if getattr(monitor, "goes_along", None) is not None and not getattr(monitor, "moves", False)
        }
        return {*found, *(label for label in found.values() if label is not None)}

    def extra_sections(self, sessions: bool) -> Iterator[tuple[str, int]]:
        """Yield name and version of those sections that there are only now and then, and will be in a live update."""
        if self._fdsets.sets:
            yield fdsets.SECTION, fdsets.VERSION
        for clients in self._qtest_clients():
            yield f"{_QTEST}{clients.name}", _QTEST_VERSION
        for moving in self.moving if sessions else ():
            yield f"{session_moves.SECTION}{moving.name}", session_moves.VERSION

    def sections(self, recipe: Recipe | None = None) -> Iterator[tuple[str, SectionOwner]]:
        """Yield the sections of a live update; with a predecessor's `recipe`, of its chardevs alone."""
        moved = (
            None if recipe is None else {step.arguments.get("id") for step in recipe if step.execute == "chardev-add"}
        )
        for label, held in self.chardevs.items():
            if not held.chardev.surrendered and (moved is None or label in moved):
                load = loader(label, partial(self._take_over, label, held.chardev))
                yield f"{SECTION}{label}", SectionOwner(1, saver(held.chardev), load)
        theirs = None if recipe is None else {step.arguments["id"] for step in recipe if step.execute == "object-add"}
        for clients in self._qtest_clients():
            if theirs is None or clients.name in theirs:
                load = partial(clients.load, self.luggage)
                yield f"{_QTEST}{clients.name}", SectionOwner(_QTEST_VERSION, clients.save, load, optional=True)
        load = partial(self._fdsets.load, self.luggage)
        yield fdsets.SECTION, SectionOwner(fdsets.VERSION, self._fdsets.save, load, optional=True)
        for moving in self.moving:
            if theirs is None or moving.name in theirs:
                name = f"{session_moves.SECTION}{moving.name}"
                load = partial(moving.load, self.luggage)
                yield name, SectionOwner(session_moves.VERSION, moving.save, load, optional=True)

    def declare_again(self, state: StateRegistry) -> None:
        """Declare the sections of a live update, of what there is now: it came and went since the board was made."""
        _forget(state)
        self.declare(state.register)

    def declare(self, register: Callable[..., None], recipe: Recipe | None = None) -> None:
        """Declare what `sections` yields by `register`, of a state registry."""
        for name, owner in self.sections(recipe):
            register(name, owner.version, save=owner.save, load=owner.load, optional=owner.optional)

    def declare_ports(self, state: StateRegistry) -> None:
        """Give each chardev of a device its section by the device's port, whatever its label and its kind.

        So a guest goes from one machine to another whose chardevs are its own. `declare_again` undoes it.
        """
        _forget(state)
        for port, chardev in self._ports():
            load = byte_loader(port, chardev.take_bytes)
            state.register(f"{SECTION}{port}", BYTES_VERSION, save=byte_saver(chardev), load=load)

    def save_ports(self) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
        """Yield name, version and state of each section that `declare_ports` declares, as they are now."""
        for port, chardev in self._ports():
            yield f"{SECTION}{port}", BYTES_VERSION, byte_saver(chardev)()

    def _ports(self) -> Iterator[tuple[str, Chardev]]:
        for held in self.chardevs.values():
            if held.user is not None and held.user.startswith(PORT):
                yield held.user, held.chardev

    def _take_over(self, label: str, chardev: Chardev, state: ChardevState) -> None:
        prefix = _prefix(label)
        mine = [name for name in self._moved if name.startswith(prefix)]
        new = {name.removeprefix(prefix): self._moved.pop(name) for name in mine}
        gone = [name.removeprefix(prefix) for name in self._gone if name.startswith(prefix)]
        chardev.take_over(state, new, gone)


_QTEST: Final = "qtest-server/"
"""How the section of a qtest's clients begins; its present version."""
_QTEST_VERSION: Final = 1


def _forget(state: StateRegistry) -> None:
    for name in state.order():
        if name.startswith((SECTION, _QTEST, session_moves.SECTION)) or name == fdsets.SECTION:
            state.unregister(name)


MONITOR: Final = "monitor "
"""How the user of a chardev begins that a monitor has."""


PORT: Final = "COM"
"""How the user of a chardev begins that is a serial port."""


def _prefix(label: str) -> str:
    return f"chardev/{label}/"


def _known(names: Mapping[str, object]) -> str:
    return f"; there are: {', '.join(sorted(names)) or 'none'}"
