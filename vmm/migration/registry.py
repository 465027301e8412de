"""Whose the sections of a state stream are, and in which order they are saved and loaded.

Loading is in two passes. First every section of the stream is checked, by its device, and turned into an `Applier`;
nothing has changed until all are. Then the appliers run. So a stream that is refused leaves no half-loaded machine.
One exception is asked for by name: `StateRegistry.load_ahead`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TypeAlias, final

import attrs

from vmm.errors import DeviceNotFound, NameTaken, StateRejected
from vmm.migration.section_payload import StateValue
from vmm.migration.stream_records import Section

if TYPE_CHECKING:
    from collections.abc import Iterable

Applier: TypeAlias = Callable[[], None]
"""Puts a checked state in force. What it raises is a failure of the host; the machine cannot be used after it."""

CheckedAhead: TypeAlias = dict[str, tuple[Section, Applier]]
"""Sections that were checked, by name, and what is left to be done to put each in force."""

Save: TypeAlias = Callable[[], Mapping[str, StateValue] | None]
"""Returns None only of an optional section: it has nothing, and is left out."""
Load: TypeAlias = Callable[[int, Mapping[str, StateValue]], Applier]
"""Takes a version (within the declared ones) and a hostile state. Changes nothing; raises `StateRejected`."""


@final
@attrs.frozen(kw_only=True)
class StateOwner:
    """One section's declaration."""

    name: str
    version: int
    accepts: int
    """The oldest version that is read."""
    save: Save
    load: Load
    after: tuple[str, ...]
    """Names of the sections that must be in force before this one."""
    optional: bool
    """Whether it may be missing: whoever wrote the stream had nothing of the kind."""


@final
class CheckedState:
    """A whole machine's state, checked and not yet in force."""

    def __init__(self, appliers: Iterable[tuple[str, Applier]]) -> None:
        self._appliers: Final = list(appliers)

    @property
    def order(self) -> tuple[str, ...]:
        """Names of the sections in the order in which they are put in force."""
        return tuple(name for name, _ in self._appliers)

    def apply(self) -> None:
        """Put every section in force, each after those that it declared. May be called once.

        Raises:
            VmmError: of an applier; the later ones have not run, and the machine must be given up.
        """
        appliers = self._appliers[:]
        self._appliers.clear()
        for _, applier in appliers:
            applier()


@final
class StateRegistry:
    """The sections of one machine."""

    def __init__(self) -> None:
        self._owners: Final[dict[str, StateOwner]] = {}

    def register(
        self,
        name: str,
        version: int,
        *,
        save: Save,
        load: Load,
        accepts: int | None = None,
        after: Iterable[str] = (),
        optional: bool = False,
    ) -> None:
        """Declare a section.

        Args:
            accepts: the oldest version that is read; None for `version` alone.
            after: sections that must be in force before this one; they may be registered later.

        Raises:
            NameTaken: there is a section of that name.
            ValueError: the declaration closes a cycle, or contradicts itself. A bug of the device.
        """
        if name in self._owners:
            raise NameTaken(what="State section", name=name)
        oldest = version if accepts is None else accepts
        if not 0 <= oldest <= version < 1 << 32:
            raise ValueError(f"section {name}: reads versions {oldest} to {version}")
        owner = StateOwner(
            name=name, version=version, accepts=oldest, save=save, load=load, after=tuple(after), optional=optional
        )
        cycle = self._way(owner.after, name)
        if cycle is not None:
            raise ValueError(f"sections wait for each other: {' after '.join((name, *cycle))}")
        self._owners[name] = owner

    def unregister(self, name: str) -> None:
        """Forget a section whose device is gone. Raises `DeviceNotFound`, or `ValueError` if another waits for it."""
        if name not in self._owners:
            raise DeviceNotFound(what="State section", name=name)
        for owner in self._owners.values():
            if name in owner.after and owner.name != name:
                raise ValueError(f"section {owner.name} is after {name}, which is to be unregistered")
        del self._owners[name]

    def order(self) -> tuple[str, ...]:
        """Return the names, each after those that it declared, else as they were registered.

        Raises:
            ValueError: a section waits for one that was never registered. A bug of the device.
        """
        ordered: dict[str, None] = {}
        for name in self._owners:
            self._append(name, ordered)
        return tuple(ordered)

    def versions(self) -> dict[str, int]:
        """Return the version of every section by name, in order, but for the optional ones."""
        return {name: self._owners[name].version for name in self.order() if not self._owners[name].optional}

    def save(self, *, optional: bool = True) -> Iterator[Section]:
        """Yield every section, in order, or but for the optional ones. The guest stands still until the last."""
        for name in self.order():
            owner = self._owners[name]
            if owner.optional and not optional:
                continue
            state = owner.save()
            if state is not None:
                yield Section(name, owner.version, state)
            else:
                assert owner.optional, f"section {name} was left out"

    def check_ahead(self, sections: Iterable[Section]) -> CheckedAhead:
        """Check sections before all are here, for `check`, which tells what is wrong with one. Changes nothing."""
        checked: CheckedAhead = {}
        for section in sections:
            owner = self._owners.get(section.name)
            if owner is not None:
                with suppress(StateRejected):
                    checked[section.name] = section, self._check(owner, section)
        return checked

    def load_ahead(self, section: Section, ahead: CheckedAhead) -> None:
        """Put a section in force before all are here, one that waits for no other, and note it in `ahead`.

        For a state that nothing but its own vCPUs would see, and the next one that is loaded replaces. One that is
        refused is left for `check` to tell. Raises what its applier raises.
        """
        for _, applier in self.check_ahead([section]).values():
            if not self._owners[section.name].after:
                applier()
                ahead[section.name] = section, _already

    def check(self, sections: Iterable[Section], ahead: CheckedAhead | None = None) -> CheckedState:
        """Check a whole machine's state. Nothing has changed when this returns or raises.

        Args:
            ahead: what `check_ahead` and `load_ahead` have done: sections that are among `sections` are not looked at
                again.

        Raises:
            StateRejected: a section is missing, has no owner here, is of a version that is not read, or its owner
                refuses it. Missing and foreign ones are named together, else the first refusal is told.
        """
        found = {section.name: section for section in sections}
        self._check_names(found)
        known = ahead or {}
        return CheckedState(
            (name, self._applier(self._owners[name], found[name], known)) for name in self.order() if name in found
        )

    def _check_names(self, found: Mapping[str, Section]) -> None:
        missing = [name for name, owner in self._owners.items() if name not in found and not owner.optional]
        faults = [f"{name!r} is missing from the stream" for name in missing]
        faults += [
            f"{name!r} is in the stream, and no device here has it" for name in found if name not in self._owners
        ]
        if faults:
            names = missing + [name for name in found if name not in self._owners]
            raise StateRejected(section=", ".join(names), faults=tuple(faults))

    def _applier(self, owner: StateOwner, section: Section, ahead: CheckedAhead) -> Applier:
        seen, applier = ahead.get(section.name, (None, None))
        return applier if applier is not None and seen is section else self._check(owner, section)

    def _check(self, owner: StateOwner, section: Section) -> Applier:
        if not owner.accepts <= section.version <= owner.version:
            readable = f"{owner.accepts} to {owner.version}" if owner.accepts < owner.version else f"{owner.version}"
            fault = f"it has version {section.version}, read here: {readable}"
            raise StateRejected(section=owner.name, faults=(fault,))
        return owner.load(section.version, section.state)

    def _append(self, name: str, ordered: dict[str, None]) -> None:
        # Terminates: register() admits no cycle.
        if name in ordered:
            return
        for earlier in self._owners[name].after:
            if earlier not in self._owners:
                raise ValueError(f"section {name} is after {earlier}, which is not registered")
            self._append(earlier, ordered)
        ordered[name] = None

    def _way(self, after: Iterable[str], goal: str) -> tuple[str, ...] | None:
        """Return a way from one of `after` to `goal` along the declarations so far, both ends included."""
        for name in after:
            if name == goal:
                return (name,)
            rest = self._way(self._owners[name].after, goal) if name in self._owners else None
            if rest is not None:
                return (name, *rest)
        return None


def _already() -> None:
    """Do nothing: it is in force."""
