from __future__ import annotations

import threading

import attrs
import pytest

from vmm.errors import AddressConflict, DeviceNotFound, NameTaken
from vmm.hw.bus import Bus


@attrs.define(eq=False)
class Memory:
    """A device that answers with what was written, and remembers each access."""

    name: str
    addresses: tuple[range, ...]
    widest: int = 1
    lock: threading.Lock = attrs.Factory(threading.Lock)
    content: dict[int, int] = attrs.Factory(dict)
    accesses: list[tuple[object, ...]] = attrs.Factory(list)

    def read(self, offset: int, size: int) -> int:
        assert self.lock.locked()
        self.accesses.append(("in", offset, size))
        return sum(self.content.get(offset + n, 0) << 8 * n for n in range(size))

    def write(self, offset: int, size: int, value: int) -> None:
        assert self.lock.locked()
        self.accesses.append(("out", offset, size, value))
        self.content |= {offset + n: value >> 8 * n & 0xFF for n in range(size)}


def plugged(*devices: Memory) -> Bus:
    bus = Bus()
    for device in devices:
        bus.plug(device)
    return bus


def test_an_access_reaches_its_device_with_the_offset() -> None:
    low, high = Memory("low", (range(0x10, 0x18),)), Memory("high", (range(0x18, 0x20),))
    bus = plugged(high, low)
    bus.write(0x12, 1, 7)
    assert bus.read(0x12, 1) == 7
    assert bus.read(0x1F, 1) == 0
    assert low.accesses == [("out", 2, 1, 7), ("in", 2, 1)]
    assert high.accesses == [("in", 7, 1)]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_unclaimed_addresses_read_as_all_ones_and_swallow_writes(size: int) -> None:
    bus = plugged(Memory("low", (range(0x10, 0x18),)))
    for address in (0, 0x18, 0xFFFF):
        bus.write(address, size, 0)
        assert bus.read(address, size) == (1 << 8 * size) - 1


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_device_gets_every_size_that_it_takes_whole(size: int) -> None:
    device = Memory("wide", (range(0x1000, 0x2000),), widest=8)
    bus = plugged(device)
    value = 0x8877665544332211 & (1 << 8 * size) - 1
    bus.write(0x1FF8, size, value)
    assert bus.read(0x1FF8, size) == value
    assert device.accesses == [("out", 0xFF8, size, value), ("in", 0xFF8, size)]


def test_an_access_that_is_too_wide_is_cut_up_from_the_lowest_address() -> None:
    device = Memory("narrow", (range(0x10, 0x18),), widest=2)
    bus = plugged(device)
    bus.write(0x11, 4, 0x44332211)
    assert bus.read(0x11, 4) == 0x44332211
    assert device.accesses == [("out", 1, 2, 0x2211), ("out", 3, 2, 0x4433), ("in", 1, 2), ("in", 3, 2)]


def test_an_access_of_an_odd_size_is_cut_up() -> None:
    device = Memory("mmio", (range(0x1000, 0x1200),), widest=4)
    bus = plugged(device)
    bus.write(0x1000, 3, 0x332211)
    assert bus.read(0x1000, 3) == 0x332211
    assert device.accesses[:2] == [("out", 0, 2, 0x2211), ("out", 2, 1, 0x33)]


def test_an_access_that_straddles_goes_to_each_its_part() -> None:
    low, high = Memory("low", (range(0x10, 0x12),), widest=4), Memory("high", (range(0x13, 0x17),), widest=4)
    bus = plugged(low, high)
    bus.write(0x11, 4, 0x44332211)
    assert low.accesses == [("out", 1, 1, 0x11)]
    assert high.accesses == [("out", 0, 2, 0x4433)]
    assert bus.read(0x11, 4) == 0x4433FF11
    assert bus.read(0x0F, 2) == 0x00FF
    assert bus.read(0x16, 8) == 0xFFFF_FFFF_FFFF_FF00


def test_a_device_with_two_ranges_counts_from_the_first() -> None:
    device = Memory("i8042", (range(0x60, 0x61), range(0x64, 0x65)))
    bus = plugged(device)
    bus.read(0x60, 1)
    bus.write(0x64, 1, 0xFE)
    assert bus.read(0x61, 1) == 0xFF
    assert device.accesses == [("in", 0, 1), ("out", 4, 1, 0xFE)]


@pytest.mark.parametrize("length", [8, 0x1000])
def test_an_overlap_names_both_devices_and_the_addresses(length: int) -> None:
    bus = plugged(Memory("com1", (range(0x3F8, 0x3F8 + length),)))
    before = bus.slots
    with pytest.raises(AddressConflict) as caught:
        bus.plug(Memory("com9", (range(0x100, 0x101), range(0x3FC, 0x400))))
    assert str(caught.value) == "com9 wants guest addresses 0x3fc to 0x3ff, held by com1"
    assert bus.slots == before


def test_a_name_is_plugged_in_once() -> None:
    bus = plugged(Memory("com1", (range(0x3F8, 0x400),)))
    with pytest.raises(NameTaken, match=r"^Device 'com1' exists already; choose another name$"):
        bus.plug(Memory("com1", (range(0x2F8, 0x300),)))


def test_an_unplugged_device_is_gone_and_leaves_room() -> None:
    gone, stays = Memory("gone", (range(0x10, 0x11), range(0x14, 0x15))), Memory("stays", (range(0x20, 0x1000),))
    bus = plugged(gone, stays)
    bus.unplug("gone")
    assert bus.read(0x10, 1) == bus.read(0x14, 1) == 0xFF
    assert bus.read(0x20, 1) == 0
    bus.plug(Memory("new", (range(0x10, 0x20),)))
    assert bus.read(0x10, 1) == 0
    assert [(slot.name, slot.addresses.start) for slot in bus.slots] == [("new", 0x10), ("stays", 0x20)]


def test_unplugging_an_unknown_device_names_the_known_ones() -> None:
    bus = plugged(Memory("b", (range(1),)), Memory("a", (range(1, 2), range(3, 4))))
    with pytest.raises(DeviceNotFound, match=r"^Device 'c' does not exist; there are: a, b$"):
        bus.unplug("c")
    with pytest.raises(DeviceNotFound, match=r"^Device 'c' does not exist; there are: none$"):
        Bus().unplug("c")


def test_unplug_waits_for_the_access_under_way_and_lets_no_other_in() -> None:
    device = Memory("com1", (range(8),))
    bus = plugged(device)
    device.lock.acquire()  # an access is under way
    late, unplug = [], threading.Thread(target=bus.unplug, args=("com1",))
    (slot,) = bus.slots
    unplug.start()
    unplug.join(0.01)
    assert unplug.is_alive()
    device.lock.release()
    unplug.join()
    with slot.lock:  # a vCPU that had found the slot before
        late.append(slot.read(0, 2))
        slot.write(0, 1, 0)
    assert late == [0xFFFF]
    assert device.accesses == []


def test_a_bug_in_a_device_is_not_caught_and_frees_the_lock() -> None:
    class Broken(Memory):
        def read(self, offset: int, size: int) -> int:
            raise ZeroDivisionError

    device = Broken("broken", (range(8),))
    bus = plugged(device)
    with pytest.raises(ZeroDivisionError):
        bus.read(0, 1)
    assert not device.lock.locked()
