"""A machine from outside: RAM, buses, lines, clock."""

from __future__ import annotations

import os
import threading
from contextlib import closing
from typing import TYPE_CHECKING, Final, final

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.hw.fakes import FakeLine
from vmm import hostio
from vmm.errors import DeviceNotFound, InvalidState, OptionInvalid
from vmm.hw.bus import Bus
from vmm.hw.doorbell import make_doorbell
from vmm.hw.irq import GsiLine, IrqLine
from vmm.kvm.memory import GuestMemory
from vmm.qtest.accelerator import QtestAccelerator
from vmm.qtest.access import NOT_RAM_LIMIT, MachineAccess

if TYPE_CHECKING:
    from collections.abc import Iterator

RAM: Final = 1 << 20
BASE: Final = 0xD000_0000
"""Of the device."""


@final
@attrs.define(eq=False)
class Memory:
    """A device of 4 KiB that is memory, and notes the accesses to it."""

    irq: IrqLine
    name: str = "memory"
    addresses: tuple[range, ...] = (range(BASE, BASE + 4096),)
    widest: int = 8
    lock: threading.Lock = attrs.Factory(threading.Lock)
    content: bytearray = attrs.Factory(lambda: bytearray(4096))
    seen: list[tuple[str, int, int]] = attrs.Factory(list)
    state: object = None

    def read(self, offset: int, size: int) -> int:
        self.seen.append(("read", offset, size))
        return int.from_bytes(self.content[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append(("write", offset, size))
        self.content[offset : offset + size] = value.to_bytes(size, "little")

    def reset(self) -> None:
        pass

    def after_load(self) -> None:
        pass


@final
@attrs.define(eq=False)
class Place:
    """A machine with RAM and one device."""

    access: MachineAccess
    device: Memory
    ground: QtestAccelerator
    ports: Bus


def place() -> Iterator[Place]:
    """Make one."""
    ground = QtestAccelerator()
    ports, mmio = Bus(), Bus()
    device = Memory(GsiLine(7, ground.lines.set))
    mmio.plug(device)
    with ground.vm._poll, closing(GuestMemory.from_memfd(hostio.create_ram(RAM, "ram"), RAM)) as memory:
        yield Place(MachineAccess(ports, mmio, memory, ground, [device]), device, ground, ports)


@pytest.fixture
def it(no_leaks: None) -> Iterator[Place]:
    yield from place()


# --- memory and ports ---


@given(st.integers(0, RAM - 64), st.binary(max_size=64))
def test_ram_reads_as_it_was_written(address: int, data: bytes) -> None:
    for it in place():
        it.access.write(address, data)
        assert it.access.read(address, len(data)) == data
        assert not it.device.seen


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("address", [0x100, 0x101, RAM - 8, BASE, BASE + 8, BASE + 1])
def test_a_value_is_little_endian_in_ram_and_in_a_device(it: Place, address: int, size: int) -> None:
    value = 0x8899AABBCCDDEEFF & (1 << 8 * size) - 1
    it.access.store(address, size, value)
    assert it.access.load(address, size) == value
    assert it.access.read(address, size) == value.to_bytes(size, "little")


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_value_goes_to_a_device_in_one_access(it: Place, size: int) -> None:
    it.access.store(BASE + 8, size, 1)
    it.access.load(BASE + 8, size)
    assert it.device.seen == [("write", 8, size), ("read", 8, size)]


def test_bytes_go_to_a_device_in_aligned_accesses(it: Place) -> None:
    data = bytes(range(1, 16))
    it.access.write(BASE + 1, data)
    assert it.device.seen == [("write", 1, 1), ("write", 2, 2), ("write", 4, 4), ("write", 8, 8)]
    assert it.access.read(BASE + 1, 15) == data


def test_an_access_over_the_end_of_ram_is_cut_there(it: Place) -> None:
    it.access.write(RAM - 2, b"\1\2\3\4")
    assert it.access.read(RAM - 2, 4) == b"\1\2\xff\xff"
    assert it.access.load(RAM - 2, 4) == 0xFFFF0201


def test_what_nobody_claims_reads_as_all_ones(it: Place) -> None:
    assert it.access.load(0xE000_0000, 8) == (1 << 64) - 1
    assert it.access.read(0xE000_0000, 3) == b"\xff\xff\xff"
    assert it.access.read_port(0x1234, 2) == 0xFFFF
    assert it.access.load((1 << 64) - 8, 8) == (1 << 64) - 1


def test_little_outside_of_ram_is_accessed_at_once(it: Place) -> None:
    assert len(it.access.read(BASE, NOT_RAM_LIMIT)) == NOT_RAM_LIMIT
    for address, size in ((BASE, NOT_RAM_LIMIT + 1), (RAM - 1, NOT_RAM_LIMIT + 2)):
        with pytest.raises(OptionInvalid) as caught:
            it.access.read(address, size)
        assert str(caught.value) == (
            "read: 4097 is not a number of bytes outside of RAM that one read can have, which is up to 4096"
        )
    with pytest.raises(OptionInvalid) as caught:
        it.access.write(RAM - 1, bytes(4098))
    assert str(caught.value).startswith("write: 4097 is not a number of bytes outside of RAM that one write can have")
    assert it.access.read(RAM - 1, 1) == b"\0"


async def test_a_store_that_an_ioeventfd_hears_reaches_no_device(it: Place) -> None:
    with closing(make_doorbell()) as bell:
        it.ground.vm.assign_ioeventfd(bell.fd, BASE + 0x50, 4)
        it.ground.vm.assign_ioeventfd(bell.fd, 0x60, 1, port=True)
        it.access.store(BASE + 0x50, 4, 1)
        it.access.write(BASE + 0x50, b"\1\0\0\0")
        it.access.write_port(0x60, 1, 1)
        assert os.eventfd_read(bell.fd) == 3
        assert not it.device.seen


# --- lines ---


def test_inputs_of_the_ioapic_are_watched_and_driven(it: Place) -> None:
    told: list[tuple[int, bool]] = []
    stop = it.access.watch("ioapic", None, inputs=True, tell=lambda *change: told.append(change))
    it.device.irq.set(True)
    it.access.drive("/machine/ioapic", "unnamed-gpio-in", 23, True)
    stop()
    it.device.irq.set(False)
    assert told == [(7, True), (23, True)]


@pytest.mark.parametrize("path", ["memory", "/machine/memory", "/machine/unattached/memory"])
@pytest.mark.parametrize("name", [None, "sysbus-irq"])
def test_the_output_of_a_device_is_number_0_and_no_other_is_told(it: Place, path: str, name: str | None) -> None:
    told: list[tuple[int, bool]] = []
    it.access.watch(path, name, inputs=False, tell=lambda *change: told.append(change))
    it.ground.lines.set(8, True)
    it.device.irq.set(True)
    it.device.irq.set(False)
    assert told == [(0, True), (0, False)]


def test_one_watches_at_a_time(it: Place) -> None:
    stop = it.access.watch("ioapic", None, inputs=True, tell=lambda *_: None)
    with pytest.raises(InvalidState) as caught:
        it.access.watch("memory", None, inputs=False, tell=lambda *_: None)
    assert str(caught.value) == (
        "A second interception of interrupts is not possible while another client has one; end that"
    )
    stop()
    it.access.watch("memory", None, inputs=False, tell=lambda *_: None)
    stop()  # of the first: leaves the second alone
    assert it.ground.lines.observer is not None


def test_what_has_no_lines_is_named_with_what_has(it: Place) -> None:
    def refusal(path: str, name: str | None, *, inputs: bool) -> str:
        with pytest.raises(DeviceNotFound) as caught:
            it.access.watch(path, name, inputs=inputs, tell=lambda *_: None)
        return str(caught.value)

    assert refusal("pic", None, inputs=True) == "A device with inputs 'pic' does not exist; there are: ioapic"
    assert refusal("disk", None, inputs=False) == "A device with an output 'disk' does not exist; there are: memory"
    assert refusal("memory", "x", inputs=False) == "Output 'x' does not exist at memory; there is sysbus-irq"
    it.device.irq = FakeLine()
    assert refusal("memory", None, inputs=False) == "A device with an output 'memory' does not exist; there are: none"


def test_only_inputs_that_are_there_are_driven(it: Place) -> None:
    with pytest.raises(DeviceNotFound) as caught:
        it.access.drive("memory", "unnamed-gpio-in", 0, True)
    assert str(caught.value) == "A device with inputs 'memory' does not exist; there are: ioapic"
    with pytest.raises(DeviceNotFound) as caught:
        it.access.drive("ioapic", "x", 0, True)
    assert str(caught.value) == "Input 'x' does not exist at ioapic; there is unnamed-gpio-in"
    with pytest.raises(OptionInvalid) as invalid:
        it.access.drive("ioapic", "unnamed-gpio-in", 24, True)
    assert str(invalid.value) == "set_irq_in: 24 is not an input of the IOAPIC, 0 to 23"
