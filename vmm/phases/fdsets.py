"""The machine's descriptor sets (`add-fd`), which go over to a successor with all that clients know of them.

A client knows a descriptor by the number that `add-fd` answered. In the process that answered it is the descriptor's
own; in a successor it is a label, and what is added there gets one that is free. By another name, which is never used
again, the descriptor itself travels: `fdset/ID/N`.
"""

from __future__ import annotations

import os
from itertools import count
from typing import TYPE_CHECKING, Any, Final, final

import attrs

from vmm.errors import DescriptorError, StateRejected

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vmm.hw.codec import StateCodec
    from vmm.phases.fdsets_state import FdSetsState
    from vmm.phases.luggage import Luggage

SECTION: Final = "fdsets"
VERSION: Final = 1
"""Of `FdSetsState`."""


_SURELY: Final = 1000
"""So many descriptors fit, whatever their numbers."""


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
        self._codec: StateCodec[FdSetsState] | None = None

    def add(self, fd: int, fdset_id: int | None, opaque: str | None) -> tuple[int, int]:
        """Take over `fd` into set `fdset_id` (None: the lowest unused number); return the set's number and its own."""
        if fdset_id is None:
            fdset_id = next(n for n in range(len(self.sets) + 1) if n not in self.sets)
        if fdset_id < 0:
            os.close(fd)
            raise DescriptorError(reason=f"fdset-id {fdset_id} is negative; a set's number is 0 or more")
        taken = {entry.number for held in self.sets.values() for entry in held}
        number = next(n for n in count(fd) if n not in taken)
        self.sets.setdefault(fdset_id, []).append(FdsetFd(fd, number, next(self._serials), opaque))
        return fdset_id, number

    def remove(self, fdset_id: int, number: int | None) -> None:
        """Close descriptor `number` of a set, or the whole set. Raises `DescriptorError`."""
        held = self.sets.get(fdset_id, [])
        gone = [entry for entry in held if number in (None, entry.number)]
        if not gone:
            which = f"no descriptor {number}" if number is not None and held else "no descriptors"
            raise DescriptorError(reason=f"Descriptor set {fdset_id} has {which}; query-fdsets lists what there is")
        for entry in gone:
            held.remove(entry)
            os.close(entry.fd)
        if not held:
            del self.sets[fdset_id]

    def close(self) -> None:
        """Close every descriptor of every set."""
        for held in self.sets.values():
            for entry in held:
                os.close(entry.fd)
        self.sets.clear()

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
        from vmm.migration.stream import StreamWriter  # As above.
        from vmm.phases.fdsets_state import MOST_OPAQUE

        words = [
            len(entry.opaque.encode()) for held in self.sets.values() for entry in held if entry.opaque is not None
        ]
        if max(words, default=0) > MOST_OPAQUE:
            return f"an opaque of {max(words)} bytes, at most {MOST_OPAQUE} fit"
        section = self.save()
        if section is not None and (sum(words) > MOST_OPAQUE or len(section["descriptors"]) > _SURELY):
            try:
                StreamWriter("a try").section(SECTION, VERSION, section)
            except StateRejected as error:
                return str(error)
        return ""

    def save(self) -> Mapping[str, Any] | None:
        """Return what clients know of each; None where there is nothing."""
        if not self.sets:
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

    def load(self, luggage: Luggage, version: int, section: Mapping[str, Any]) -> Callable[[], None]:
        """Check what a predecessor had, whose descriptors are in `luggage`; return what puts it in force.

        What was added here before stays in its set, under its number unless that has come with another.

        Raises:
            StateRejected: it is none, or a descriptor did not come.
        """
        found = self._codec_of_state().load(section, version, SECTION).descriptors
        names = [_name(entry.fdset, entry.serial) for entry in found]
        faults = [f"descriptor {name} did not come" for name in names if name not in luggage]
        if len(set(names)) < len(names) or len({entry.number for entry in found}) < len(found):
            faults.append("a descriptor is there twice")
        faults += [f"{entry.opaque!r:.60} is no UTF-8" for entry in found if entry.text is None]
        if faults:
            raise StateRejected(section=SECTION, faults=tuple(faults))

        def apply() -> None:
            own = [(fdset, entry) for fdset, held in self.sets.items() for entry in held]
            self.sets.clear()
            for name, entry in zip(names, found, strict=True):
                opaque = None if entry.opaque is None else entry.text
                kept = FdsetFd(luggage.claim(name), entry.number, entry.serial, opaque)
                self.sets.setdefault(entry.fdset, []).append(kept)
            self._serials = count(max((entry.serial for entry in found), default=0) + 1)
            for fdset, mine in own:
                self.add(mine.fd, fdset, mine.opaque)

        return apply


def _name(fdset: int, serial: int) -> str:
    return f"fdset/{fdset}/{serial}"
