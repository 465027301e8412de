"""Routing of guest accesses to devices.

A bus is read by vCPU threads without a lock: they look into an immutable map, and plugging swaps in a new one.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeAlias, final

import attrs

from vmm.errors import AddressConflict, DeviceNotFound, NameTaken

if TYPE_CHECKING:
    from vmm.hw.device import Addressable

_DIRECT_LIMIT: Final = 64
"""Ranges of up to so many addresses, so all of port I/O, are found by one look-up; wider ones by bisection."""

Read: TypeAlias = Callable[[int, int], int]
Write: TypeAlias = Callable[[int, int, int], None]


@final
@attrs.define(eq=False, repr=False)
class Slot:
    """One range of one device. `read` and `write` are called with `lock` held, and looked up after it is taken."""

    name: str
    addresses: range
    base: int
    """The address of offset 0."""
    sizes: int
    """Bit n is set if the device takes accesses of n bytes."""
    lock: threading.Lock
    read: Read
    write: Write


def _slots(device: Addressable) -> list[Slot]:
    widest, base = device.widest, device.addresses[0].start
    assert widest in (1, 2, 4, 8)
    sizes = sum(1 << size for size in (1, 2, 4, 8) if size <= widest)
    return [
        Slot(device.name, addresses, base, sizes, device.lock, device.read, device.write)
        for addresses in device.addresses
    ]


@final
@attrs.frozen(eq=False, repr=False)
class AddressMap:
    """An immutable map from addresses to slots."""

    slots: tuple[Slot, ...] = ()
    direct: Mapping[int, Slot] = MappingProxyType({})

    @classmethod
    def of(cls, slots: list[Slot]) -> AddressMap:
        """Build the map of `slots`, which do not overlap."""
        narrow = [slot for slot in slots if len(slot.addresses) <= _DIRECT_LIMIT]
        return cls(
            tuple(sorted(slots, key=lambda slot: slot.addresses.start)),
            {address: slot for slot in narrow for address in slot.addresses},
        )

    def find(self, address: int) -> Slot | None:
        """Return the slot that `address` belongs to."""
        at = bisect_right(self.slots, address, key=lambda slot: slot.addresses.start) - 1
        if at >= 0 and address in self.slots[at].addresses:
            return self.slots[at]
        return None


@final
class Bus:
    """One address space of the guest: its I/O ports, or its memory-mapped devices.

    `read` and `write` are called by vCPU threads, many at a time; `plug` and `unplug` by the loop, at any time.
    """

    def __init__(self) -> None:
        self._map = AddressMap()

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Every range that somebody claims, ascending."""
        return self._map.slots

    def plug(self, device: Addressable) -> None:
        """Let `device` answer at its addresses.

        Raises:
            AddressConflict: another device claims some of them.
            NameTaken: a device of that name is plugged in.
        """
        held = self._map.slots
        wanted = _slots(device)
        if any(slot.name == device.name for slot in held):
            raise NameTaken(what="Device", name=device.name)
        for new in wanted:
            for old in held:
                first = max(old.addresses.start, new.addresses.start)
                last = min(old.addresses.stop, new.addresses.stop) - 1
                if first <= last:
                    raise AddressConflict(wanted=new.name, holder=old.name, first=first, last=last)
        self._map = AddressMap.of([*held, *wanted])

    def unplug(self, name: str) -> None:
        """Take the device `name` off. When this returns no vCPU is in it, and none will enter it.

        Waits for an access that is under way. Raises `DeviceNotFound`.
        """
        gone = self._held_by(name)
        self._map = AddressMap.of([slot for slot in self._map.slots if slot.name != name])
        self._cut_off(gone)

    def exchange(self, device: Addressable) -> None:
        """Put `device` in the place of the one that has its name and its addresses.

        Waits for an access that is under way; when this returns, no vCPU is in the other one, and none will enter it.
        One that came at that very moment finds nobody. Raises `DeviceNotFound`.
        """
        gone = self._held_by(device.name)
        wanted = _slots(device)
        assert [slot.addresses for slot in gone] == [slot.addresses for slot in wanted]
        self._map = AddressMap.of([*(slot for slot in self._map.slots if slot.name != device.name), *wanted])
        self._cut_off(gone)

    def _held_by(self, name: str) -> list[Slot]:
        held = self._map.slots
        found = [slot for slot in held if slot.name == name]
        if not found:
            known = ", ".join(sorted({slot.name for slot in held})) or "none"
            raise DeviceNotFound(what="Device", name=name, known=f"; there are: {known}")
        return found

    @staticmethod
    def _cut_off(slots: list[Slot]) -> None:
        for slot in slots:
            # A vCPU may have found the slot and wait for the lock.
            with slot.lock:
                slot.read, slot.write = _read_nothing, _write_nothing

    def read(self, address: int, size: int) -> int:
        """Answer a guest load of 1 to 8 bytes. Addresses that nobody claims read as all ones."""
        found = self._map
        slot = found.direct.get(address) or found.find(address)
        if slot is not None and slot.sizes >> size & 1 and address + size <= slot.addresses.stop:
            with slot.lock:
                return slot.read(address - slot.base, size)
        value, done = 0, 0
        while done < size:
            slot, part = _next_part(found, address + done, size - done)
            if slot is None:
                value |= 0xFF << 8 * done
            else:
                with slot.lock:
                    value |= slot.read(address + done - slot.base, part) << 8 * done
            done += part
        return value

    def write(self, address: int, size: int, value: int) -> None:
        """Carry out a guest store of 1 to 8 bytes. Addresses that nobody claims swallow it."""
        found = self._map
        slot = found.direct.get(address) or found.find(address)
        if slot is not None and slot.sizes >> size & 1 and address + size <= slot.addresses.stop:
            with slot.lock:
                slot.write(address - slot.base, size, value)
            return
        done = 0
        while done < size:
            slot, part = _next_part(found, address + done, size - done)
            if slot is not None:
                with slot.lock:
                    slot.write(address + done - slot.base, part, value >> 8 * done & (1 << 8 * part) - 1)
            done += part


def _next_part(found: AddressMap, address: int, left: int) -> tuple[Slot | None, int]:
    """Return who takes the next part of an access that is too wide or straddles, and its size.

    As on an ISA bus, a wide access is a sequence of narrower ones, from the lowest address up.
    """
    slot = found.find(address)
    if slot is None:
        return None, 1
    room = min(left, slot.addresses.stop - address)
    return slot, next(size for size in (8, 4, 2, 1) if size <= room and slot.sizes >> size & 1)


def _read_nothing(_offset: int, size: int) -> int:
    return (1 << 8 * size) - 1


def _write_nothing(_offset: int, _size: int, _value: int) -> None:
    pass
