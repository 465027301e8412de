from __future__ import annotations

import pytest

from tests.hw.fakes import Calls, FakeLine
from vmm.hw.acpi_pm import AcpiPm
from vmm.hw.bus import Bus
from vmm.hw.debug_exit import DebugExit
from vmm.hw.irq import GsiLine
from vmm.hw.legacy import PostCode, SystemControlA


@pytest.mark.parametrize(("size", "value", "status"), [(1, 0, 1), (1, 0x2A, 0x55), (2, 0x1234, 0x2469), (4, 3, 7)])
def test_a_write_to_the_debug_exit_port_asks_for_the_end_with_an_odd_status(size: int, value: int, status: int) -> None:
    bus, exits = Bus(), Calls()
    bus.plug(DebugExit(request_exit=exits))
    assert bus.read(0x501, size) == 0
    bus.write(0x501, size, value)
    assert exits.arguments == [(status,)]


def test_the_post_code_reads_back() -> None:
    bus = Bus()
    bus.plug(PostCode())
    bus.write(0x80, 1, 0xAA)
    assert bus.read(0x80, 1) == 0xAA


def test_a20_is_on_and_turning_it_on_resets_nothing() -> None:
    bus, resets = Bus(), Calls()
    bus.plug(SystemControlA(request_reset=resets))
    bus.write(0x92, 1, bus.read(0x92, 1) | 0x02)
    assert bus.read(0x92, 1) == 0x02
    assert resets.count == 0


def test_the_fast_reset_acts_when_its_bit_rises() -> None:
    bus, resets = Bus(), Calls()
    device = SystemControlA(request_reset=resets)
    bus.plug(device)
    bus.write(0x92, 1, 0x03)
    bus.write(0x92, 1, 0x03)
    assert resets.count == 1
    device.reset()
    bus.write(0x92, 1, 0x01)
    assert resets.count == 2


def test_the_power_management_registers_read_as_a_driver_that_probes_wants_them() -> None:
    bus = Bus()
    bus.plug(AcpiPm(request_power_off=Calls()))
    assert [bus.read(0x600 + 2 * register, 2) for register in range(3)] == [0, 0, 0x0001]
    bus.write(0x600, 2, 0xFFFF)
    bus.write(0x602, 2, 0x0120)
    bus.write(0x604, 2, 0xD7FE)
    assert [bus.read(0x600 + 2 * register, 2) for register in range(3)] == [0, 0x0120, 0x1403]
    assert bus.read(0x600, 4) == 0x01200000
    assert [bus.read(address, 1) for address in range(0x600, 0x606)] == [0, 0, 0x20, 0x01, 0x03, 0x14]


@pytest.mark.parametrize(
    ("writes", "times"),
    [
        ([(0x604, 2, 5 << 10), (0x604, 2, 1 << 13 | 5 << 10)], 1),
        ([(0x604, 2, 5 << 10), (0x605, 1, (1 << 13 | 5 << 10) >> 8)], 1),
        ([(0x602, 4, (1 << 13 | 5 << 10) << 16)], 1),
        ([(0x604, 2, 5 << 10)], 0),
        ([(0x604, 2, 1 << 13 | 4 << 10)], 0),
        ([(0x604, 2, 1 << 13 | 4 << 10), (0x604, 2, 5 << 10)], 0),
        ([(0x602, 2, 1 << 13 | 5 << 10)], 0),
    ],
    ids=[
        "by words",
        "by bytes",
        "with the register before",
        "no enable",
        "other type",
        "enable is forgotten",
        "elsewhere",
    ],
)
def test_sleep_enable_with_the_type_of_soft_off_turns_the_machine_off(
    writes: list[tuple[int, int, int]], times: int
) -> None:
    bus, power_offs = Bus(), Calls()
    bus.plug(AcpiPm(request_power_off=power_offs))
    for address, size, value in writes:
        bus.write(address, size, value)
    assert power_offs.count == times


def test_lines_drive_what_they_are_wired_to() -> None:
    driven = Calls()
    line = GsiLine(4, driven)
    line.set(True)
    line.set(False)
    assert driven.arguments == [(4, True), (4, False)]
    assert not FakeLine().is_up()
