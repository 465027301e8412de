from __future__ import annotations

import pytest

from tests.conformance.devices import Bench, virtio_rng
from tests.hw.virtio.driver import BUFFERS, DEVICE, DRIVER, WRITE, Driver
from vmm.hw.board import virtio_addresses
from vmm.hw.bus import Bus
from vmm.hw.virtio.mmio import NEEDS_RESET, EmptySlot

OK = 15
"""ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK."""


class Rig:
    """A device on a bench, and a driver that speaks to it."""

    def __init__(self) -> None:
        self.bench = Bench()
        self.device = virtio_rng(self.bench)
        self.driver = Driver(self.device, self.bench.ram)

    @property
    def kicks(self) -> int:
        return self.bench.callback.count

    @property
    def line(self) -> bool:
        return self.bench.line.is_up()


def started() -> Rig:
    rig = Rig()
    rig.driver.start()
    return rig


# --- what the guest reads ---------------------------------------------------------------------------------


def test_the_registers_tell_what_is_there() -> None:
    rig = Rig()
    assert [rig.driver.read(offset) for offset in (0x00, 0x04, 0x08)] == [0x7472_6976, 2, 4]
    assert rig.driver.read(0x0C).to_bytes(4, "little") == b"TRIO"
    assert rig.driver.read(0x34) == 64
    assert rig.driver.read(0xFC) == 0


def test_an_empty_slot_says_that_it_is_empty_and_keeps_nothing() -> None:
    bus = Bus()
    base = virtio_addresses(3).start
    bus.plug(EmptySlot("virtio-mmio-bus.3", (virtio_addresses(3),)))
    for offset in range(0, 0x200, 4):
        bus.write(base + offset, 4, 0xFFFF_FFFF)
    assert [bus.read(base + offset, 4) for offset in range(0, 0x200, 4)] == [0x7472_6976, 2, *[0] * 126]
    assert bus.read(base, 1) == 0


def test_the_features_are_read_by_halves_and_none_is_above_63() -> None:
    rig = Rig()
    halves = []
    for select in (0, 1, 2, 0xFFFF_FFFF):
        rig.driver.write(0x14, select)
        halves.append(rig.driver.read(0x10))
    assert halves == [0, 1, 0, 0]


def test_there_is_no_shared_memory_and_no_configuration() -> None:
    rig = Rig()
    assert [rig.driver.read(offset) for offset in (0xB0, 0xB4, 0xB8, 0xBC)] == [0xFFFF_FFFF] * 4
    assert [rig.driver.read(offset) for offset in range(0x100, 0x200, 4)] == [0] * 64


def test_what_is_not_read_and_written_as_32_bits_is_nothing() -> None:
    rig = Rig()
    assert [rig.device.read(0, 1), rig.device.read(0, 2), rig.device.read(2, 2)] == [0, 0, 0]
    rig.device.write(0x70, 1, 1)
    rig.device.write(0x70, 2, 1)
    assert rig.driver.status() == 0


# --- negotiation ------------------------------------------------------------------------------------------


def test_a_driver_that_accepts_version_1_is_agreed_with() -> None:
    assert Rig().driver.negotiate() == 11


@pytest.mark.parametrize(("low", "high"), [(0, 0), (1, 1), (0, 3), (1 << 28, 1)])
def test_other_features_are_not_agreed_to(low: int, high: int) -> None:
    assert Rig().driver.negotiate(high=high, low=low) == 3


def test_features_are_fixed_once_agreed_to() -> None:
    rig = Rig()
    rig.driver.negotiate()
    rig.driver.write(0x24, 1)
    rig.driver.write(0x20, 0xFF)
    assert rig.device.state.transport.driver_features == 1 << 32


def test_status_bits_are_only_added_and_unknown_ones_dropped() -> None:
    rig = started()
    rig.driver.write(0x70, 1)
    assert rig.driver.status() == OK
    rig.driver.write(0x70, 0x30 | NEEDS_RESET)
    assert rig.driver.status() == OK


def test_a_write_of_0_resets() -> None:
    rig = started()
    rig.driver.request(0)
    rig.device.answer(0, b"x")
    assert rig.line
    rig.driver.write(0x70, 0)
    assert rig.device.state == rig.device.function.new_state()
    assert not rig.line


# --- queues -----------------------------------------------------------------------------------------------


def test_a_queue_that_is_not_there_has_no_size_and_cannot_be_made_ready() -> None:
    rig = Rig()
    rig.driver.negotiate()
    rig.driver.write(0x30, 1)
    rig.driver.write(0x38, 8)
    rig.driver.write(0x44, 1)
    assert [rig.driver.read(0x34), rig.driver.read(0x44)] == [0, 0]
    assert rig.driver.status() == 11


def test_a_ready_queue_stays_as_it_is() -> None:
    rig = started()
    rig.driver.write(0x80, 0)
    rig.driver.write(0x38, 4)
    assert (rig.device.state.requests.size, rig.device.state.requests.descriptors) == (8, 0x1000)
    rig.driver.write(0x44, 0)
    assert rig.driver.read(0x44) == 0
    assert rig.device.peek(0) is None


def test_a_queue_that_cannot_be_needs_a_reset_and_is_not_ready() -> None:
    rig = Rig()
    rig.driver.size = 7
    rig.driver.negotiate()
    rig.driver.set_up_queue()
    assert rig.driver.status() == 11 | NEEDS_RESET
    assert rig.driver.read(0x44) == 0
    assert rig.device.fault == "a queue of 7 entries; a power of two up to 64 would be right"
    assert not rig.line, "before DRIVER_OK the driver is not told"


def test_a_request_is_answered_and_the_driver_told() -> None:
    rig = started()
    address = rig.driver.request(2)
    assert rig.device.answer(0, b"0123456789abcdef!") == 16
    assert rig.bench.ram.read(address, 17) == b"0123456789abcdef\0"
    assert rig.driver.used() == [(2, 16)]
    assert rig.line
    assert rig.driver.read(0x60) == 1
    rig.driver.write(0x64, 1)
    assert (rig.line, rig.driver.read(0x60)) == (False, 0)


def test_a_driver_that_wants_no_interrupt_gets_none() -> None:
    rig = started()
    rig.driver.u16(DRIVER, 1)
    rig.driver.request(0)
    assert rig.device.answer(0, b"x") == 1
    assert not rig.line


def test_nothing_is_touched_before_driver_ok() -> None:
    rig = Rig()
    rig.driver.negotiate()
    rig.driver.set_up_queue()
    rig.driver.request(0)
    assert rig.device.answer(0, b"x") == 0
    before = rig.kicks
    rig.driver.write(0x70, OK)
    assert rig.kicks == before + 1, "what was offered before is looked at now"
    assert rig.device.answer(0, b"x") == 1


@pytest.mark.parametrize("status", [0x80, NEEDS_RESET])
def test_nothing_is_touched_once_the_driver_has_failed_or_broken_the_rules(status: int) -> None:
    rig = started()
    rig.driver.request(0)
    if status == NEEDS_RESET:
        rig.device.refuse("for this test")
    else:
        rig.driver.write(0x70, status)
    rig.bench.ram.writes.clear()
    assert rig.device.answer(0, b"x") == 0
    assert rig.bench.ram.writes == []


def test_a_notification_rings_unless_there_is_no_such_queue() -> None:
    rig = started()
    before = rig.kicks
    for number in (0, 1, 0xFFFF_FFFF):
        rig.driver.write(0x50, number)
    assert rig.kicks == before + 1


# --- a guest that breaks the rules ------------------------------------------------------------------------


def test_a_broken_chain_needs_a_reset_which_mends_it() -> None:
    rig = started()
    rig.driver.describe(0, 0xFFFF_0000, 16, WRITE)
    rig.driver.offer(0)
    assert rig.device.peek(0) is None
    assert rig.driver.status() == OK | NEEDS_RESET
    assert rig.driver.read(0x60) == 2, "a change of configuration tells it"
    assert rig.line
    assert rig.device.fault == "descriptor 0 is at 0xffff0000, 16 bytes long, which is not all RAM"
    rig.bench.ram.data[DRIVER : DRIVER + 0x100] = bytes(0x100)
    rig.driver.start()
    rig.driver.request(0)
    assert rig.device.answer(0, b"x") == 1
    assert rig.device.fault == ""


def test_an_answer_never_goes_to_a_request_that_a_reset_took_away() -> None:
    rig = started()
    rig.driver.request(0)
    assert rig.device.peek(0) is not None
    rig.driver.write(0x70, 0)
    rig.bench.ram.writes.clear()
    assert rig.device.answer(0, b"x") == 0
    assert rig.bench.ram.writes == []


# --- rest and live update ---------------------------------------------------------------------------------


def test_a_device_at_rest_touches_nothing_and_looks_again_afterwards() -> None:
    rig = started()
    rig.device.hold()
    rig.driver.request(0)
    rig.driver.write(0x50, 0)
    rig.bench.ram.writes.clear()
    assert rig.device.peek(0) is None
    assert rig.device.answer(0, b"x") == 0
    assert rig.bench.ram.writes == []
    before = rig.kicks
    rig.device.go_on()
    assert rig.kicks == before + 1
    assert rig.device.answer(0, b"x") == 1


def test_a_successor_answers_what_its_predecessor_was_asked() -> None:
    rig = started()
    rig.driver.request(0)
    rig.driver.request(1)
    rig.device.answer(0, b"0123456789abcdef")
    rig.device.hold()
    heir = Rig()
    heir.bench.ram.data[:] = rig.bench.ram.data
    heir.device.held = True
    heir.device.state = rig.device.state
    heir.device.after_load()
    assert heir.line
    assert heir.device.peek(0) is None
    assert heir.kicks == 0
    heir.device.go_on()
    assert heir.kicks == 1
    assert heir.device.answer(0, b"fedcba9876543210") == 16
    heir.driver.size = 8
    assert heir.driver.used() == [(0, 16), (1, 16)]
    assert heir.bench.ram.read(BUFFERS + 0x100, 16) == b"fedcba9876543210"
    assert heir.bench.ram.read(DEVICE + 2, 2) == b"\2\0"
