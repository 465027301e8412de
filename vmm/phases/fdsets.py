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
    from collections.abc import Callable, Iterator, Mapping

    from vmm.phases.luggage import Luggage

SECTION: Final = "fdsets"
VERSION: Final = 1

_MOST: Final = 1 << 31
_MOST_SETS: Final = 1 << 63


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

    def save(self) -> Mapping[str, Any] | None:
        """Return what clients know of each; None where there is nothing."""
        entries = [
            {
                "set": number,
                "number": entry.number,
                "serial": entry.serial,
                "opaque": None if entry.opaque is None else entry.opaque.encode(),
            }
            for number, held in self.sets.items()
            for entry in held
        ]
        return {"descriptors": entries} if entries else None

    def load(self, section: Mapping[str, Any], luggage: Luggage) -> Callable[[], None]:
        """Check what a predecessor had, whose descriptors are in `luggage`; return what puts it in force.

        What was added here before stays in its set, under its number unless that has come with another.

        Raises:
            StateRejected: it is none, or a descriptor did not come.
        """
        entries = list(_entries(section))
        names = [_name(entry["set"], entry["serial"]) for entry in entries]
        faults = [f"descriptor {name} did not come" for name in names if name not in luggage]
        if len(set(names)) < len(names) or len({entry["number"] for entry in entries}) < len(entries):
            faults.append("a descriptor is there twice")
        if faults:
            raise StateRejected(section=SECTION, faults=tuple(faults))

        def apply() -> None:
            own = [(number, entry) for number, held in self.sets.items() for entry in held]
            self.sets.clear()
            for name, entry in zip(names, entries, strict=True):
                opaque = None if entry["opaque"] is None else entry["opaque"].decode()
                kept = FdsetFd(luggage.claim(name), entry["number"], entry["serial"], opaque)
                self.sets.setdefault(entry["set"], []).append(kept)
            self._serials = count(max(entry["serial"] for entry in entries) + 1)
            for number, mine in own:
                self.add(mine.fd, number, mine.opaque)

        return apply


def _name(number: int, serial: int) -> str:
    return f"fdset/{number}/{serial}"


def _entries(section: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    entries = section.get("descriptors")
    if set(section) != {"descriptors"} or not isinstance(entries, list) or not entries:
        raise StateRejected(section=SECTION, faults=("it must have a list of descriptors, and nothing else",))
    for place, entry in enumerate(entries):
        where = f"descriptors[{place}]"
        if not isinstance(entry, dict) or set(entry) != {"set", "number", "serial", "opaque"}:
            raise StateRejected(section=SECTION, faults=(f"{where} must have set, number, serial and opaque",))
        for member, most in (("set", _MOST_SETS), ("number", _MOST), ("serial", _MOST)):
            value = entry[member]
            if type(value) is not int or not 0 <= value < most:
                fault = f"{where}.{member} is {str(value)[:40]}, not an integer from 0 to {most - 1}"
                raise StateRejected(section=SECTION, faults=(fault,))
        try:
            if entry["opaque"] is not None:
                entry["opaque"].decode()
        except (AttributeError, UnicodeDecodeError):
            raise StateRejected(section=SECTION, faults=(f"{where}.opaque is no UTF-8",)) from None
        yield entry
