"""The machine's descriptor sets (`add-fd`), which go over to a successor with all that clients know of them.

A client knows a descriptor by the number that `add-fd` answered. In the process that answered it is the descriptor's
own; in a successor it is a label, and what is added there gets one that is free. By another name, which is never used
again, the descriptor itself travels: `fdset/ID/N`.

There may be thousands. So all of it is told before the guest's pause; only if something has changed by then does it go
with the state once more, whole, as section `fdsets`.
"""

from __future__ import annotations

import os
from itertools import count
from typing import TYPE_CHECKING, Any, Final, final

import attrs

from vmm.errors import DescriptorError, StateRejected

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from vmm.hw.codec import StateCodec
    from vmm.phases.fdsets_state import FdSetsState
    from vmm.phases.luggage import Luggage

SECTION: Final = "fdsets"
VERSION: Final = 1
"""Of `FdSetsState`."""


_MOST_WORDS: Final = 2 << 20
"""Bytes of what clients have said of all of them."""

_LARGEST: Final = 0x7FFF_FFFF


@final
@attrs.define
class FdsetFd:
    """One descriptor of a set."""

    fd: int
    number: int
    """By which clients know it."""
    serial: int
    """By which it travels."""
    opaque: str | None


@final
class FdSets:
    """The descriptor sets. The facet of `may-add-descriptor`; owns the descriptors."""

    def __init__(self) -> None:
        self.sets: Final[dict[int, list[FdsetFd]]] = {}
        self._serials = count(1)
        self._numbers: set[int] = set()
        self._changes = 0
        self._told: int | None = None
        self._expected: dict[int, list[FdsetFd]] | None = None
        self._codec: StateCodec[FdSetsState] | None = None

    def add(self, fd: int, fdset_id: int | None, opaque: str | None) -> tuple[int, int]:
        """Take over `fd` into set `fdset_id` (None: the lowest unused number); return the set's number and its own."""
        if fdset_id is None:
            fdset_id = next(n for n in range(len(self.sets) + 1) if n not in self.sets)
        if fdset_id < 0:
            os.close(fd)
            raise DescriptorError(reason=f"fdset-id {fdset_id} is negative; a set's number is 0 or more")
        number = next(n for n in count(fd) if n not in self._numbers)
        self._numbers.add(number)
        self._changes += 1
        self.sets.setdefault(fdset_id, []).append(FdsetFd(fd, number, next(self._serials), opaque))
        return fdset_id, number

    def remove(self, fdset_id: int, number: int | None) -> None:
        """Close descriptor `number` of a set, or the whole set. Raises `DescriptorError`."""
        held = self.sets.get(fdset_id, [])
        gone = [entry for entry in held if number in (None, entry.number)]
        if not gone:
            which = f"no descriptor {number}" if number is not None and held else "no descriptors"
            raise DescriptorError(reason=f"Descriptor set {fdset_id} has {which}; query-fdsets lists what there is")
        self._changes += 1
        for entry in gone:
            held.remove(entry)
            self._numbers.discard(entry.number)
            os.close(entry.fd)
        if not held:
            del self.sets[fdset_id]

    def close(self) -> None:
        """Close every descriptor of every set, and those of a predecessor that were not taken up."""
        for sets in (self.sets, self._expected or {}):
            for held in sets.values():
                for entry in held:
                    os.close(entry.fd)
            sets.clear()

    # Live update.

    def descriptors(self) -> dict[str, int]:
        """Return what a successor needs, by name."""
        return {_name(number, entry.serial): entry.fd for number, held in self.sets.items() for entry in held}

    def prepare(self) -> None:
        """Do now what would else be done in the guest's pause: compile the codec."""
        self._codec_of_state()

    def _codec_of_state(self) -> StateCodec[FdSetsState]:
        if self._codec is None:
            from vmm.hw.codec import StateCodec  # Which is not needed until a machine moves.
            from vmm.phases.fdsets_state import FdSetsState

            self._codec = StateCodec.of(FdSetsState)
        return self._codec

    def too_much(self) -> str:
        """Say what of all this is more than a successor would take in; empty if nothing is."""
        from vmm.phases.fdsets_state import MOST_DESCRIPTORS, MOST_OPAQUE  # As above.

        words = [len((entry.opaque or "").encode()) for held in self.sets.values() for entry in held]
        if len(words) > MOST_DESCRIPTORS:
            return f"{len(words)} descriptors, at most {MOST_DESCRIPTORS} go over"
        if max(words, default=0) > MOST_OPAQUE:
            return f"an opaque of {max(words)} bytes, at most {MOST_OPAQUE} fit"
        if sum(words) > _MOST_WORDS:
            return f"opaques of {sum(words)} bytes together, at most {_MOST_WORDS} fit"
        return ""

    def tell(self) -> list[list[Any]]:
        """Return what clients know of each, for a successor; `save` has nothing to say until something changes."""
        self._told = self._changes
        return [
            [fdset, entry.number, entry.serial, entry.opaque] for fdset, held in self.sets.items() for entry in held
        ]

    def tell_nothing(self) -> None:
        """The successor is of an older program, which hears it from `save`."""
        self._told = None

    @property
    def is_as_told(self) -> bool:
        """Whether nothing has changed since `tell`."""
        return self._told == self._changes

    def save(self) -> Mapping[str, Any] | None:
        """Return what clients know of each; None where there is nothing, or nothing that has not been told."""
        if self.is_as_told or (self._told is None and not self.sets):
            return None
        from vmm.phases.fdsets_state import FdSetsState, FdState

        found = tuple(
            FdState(
                fdset=fdset,
                number=entry.number,
                serial=entry.serial,
                opaque=None if entry.opaque is None else entry.opaque.encode(),
            )
            for fdset, held in self.sets.items()
            for entry in held
        )
        return self._codec_of_state().dump(FdSetsState(descriptors=found))

    def expect(self, told: object, luggage: Luggage) -> None:
        """Take what a predecessor has told out of `luggage`, to be put in force by `settle`.

        Raises:
            StateRejected: it is none, or a descriptor did not come.
        """
        from vmm.phases.fdsets_state import MOST_DESCRIPTORS

        if not isinstance(told, list) or len(told) > MOST_DESCRIPTORS or not all(_is_row(row) for row in told):
            raise StateRejected(section=SECTION, faults=("what was told of descriptor sets is no list of them",))
        self._check(((fdset, number, serial) for fdset, number, serial, _ in told), luggage)
        self._expected = {}
        for fdset, number, serial, opaque in told:
            entry = FdsetFd(luggage.claim(_name(fdset, serial)), number, serial, opaque)
            self._expected.setdefault(fdset, []).append(entry)

    def put_back(self, luggage: Luggage) -> None:
        """Undo `expect`: something has changed since."""
        expected, self._expected = self._expected or {}, None
        luggage.add({_name(fdset, entry.serial): entry.fd for fdset, held in expected.items() for entry in held})

    def settle(self) -> None:
        """Put in force what is expected. What was added here before stays in its set, with a number that is free."""
        if self._expected is not None:
            expected, self._expected = self._expected, None
            self._become(expected)

    def _become(self, sets: dict[int, list[FdsetFd]]) -> None:
        own = [(fdset, entry) for fdset, held in self.sets.items() for entry in held]
        self.sets.clear()
        self.sets.update(sets)
        entries = [entry for held in sets.values() for entry in held]
        self._numbers = {entry.number for entry in entries}
        self._serials = count(max((entry.serial for entry in entries), default=0) + 1)
        self._changes += 1
        for fdset, mine in own:
            self.add(mine.fd, fdset, mine.opaque)

    def _check(self, entries: Iterable[tuple[int, int, int]], luggage: Luggage) -> None:
        """Raise `StateRejected` for entries (set, number, serial) that cannot be, or whose descriptors did not come."""
        rows = list(entries)
        names = [_name(fdset, serial) for fdset, _, serial in rows]
        faults = [f"descriptor {name} did not come" for name in names if name not in luggage]
        if len(set(names)) < len(names) or len({number for _, number, _ in rows}) < len(rows):
            faults.append("a descriptor is there twice")
        if faults:
            raise StateRejected(section=SECTION, faults=tuple(faults))

    def load(self, luggage: Luggage, version: int, section: Mapping[str, Any]) -> Callable[[], None]:
        """Check what a predecessor had, whose descriptors are in `luggage`; return what puts it in force.

        What was added here before stays in its set, under its number unless that has come with another.

        Raises:
            StateRejected: it is none, or a descriptor did not come.
        """
        self.put_back(luggage)
        found = self._codec_of_state().load(section, version, SECTION).descriptors
        faults = [f"{entry.opaque!r:.60} is no UTF-8" for entry in found if entry.text is None]
        if faults:
            raise StateRejected(section=SECTION, faults=tuple(faults))
        self._check(((entry.fdset, entry.number, entry.serial) for entry in found), luggage)

        def apply() -> None:
            sets: dict[int, list[FdsetFd]] = {}
            for entry in found:
                opaque = None if entry.opaque is None else entry.text
                kept = FdsetFd(luggage.claim(_name(entry.fdset, entry.serial)), entry.number, entry.serial, opaque)
                sets.setdefault(entry.fdset, []).append(kept)
            self._become(sets)

        return apply


def _is_row(row: object) -> bool:
    match row:
        case [int() as fdset, int() as number, int() as serial, None | str()]:
            numbers = all(0 <= value <= _LARGEST and not isinstance(value, bool) for value in (number, serial))
            return numbers and not isinstance(fdset, bool) and 0 <= fdset < 1 << 63
        case _:
            return False


def _name(fdset: int, serial: int) -> str:
    return f"fdset/{fdset}/{serial}"
