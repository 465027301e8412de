from __future__ import annotations

import attrs
import pytest

from tests.hw.fakes import FakeClock
from vmm.hw.bus import Bus
from vmm.hw.rtc import Rtc

SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, A, B, C, D, CENTURY = (0, 2, 4, 6, 7, 8, 9, 10, 11, 12, 13, 0x32)
SET, BINARY, H24 = 0x80, 0x04, 0x02


@attrs.define(eq=False)
class Cmos:
    """The clock on a bus, with a host's clock that stands still."""

    clock: FakeClock = attrs.Factory(FakeClock)
    bus: Bus = attrs.Factory(Bus)
    rtc: Rtc = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.rtc = Rtc(now_ns=self.clock)
        self.bus.plug(self.rtc)

    def __getitem__(self, address: int) -> int:
        self.bus.write(0x70, 1, address)
        return self.bus.read(0x71, 1)

    def __setitem__(self, address: int, value: int) -> None:
        self.bus.write(0x70, 1, address)
        self.bus.write(0x71, 1, value)

    def time(self) -> list[int]:
        """Century, year, month, day, hours, minutes, seconds, as the registers have them."""
        return [self[address] for address in (CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS)]

    def set_time(self, *values: int) -> None:
        self[B] = self[B] | SET
        for address, value in zip((CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS), values, strict=True):
            self[address] = value
        self[B] = self[B] & ~SET


@pytest.fixture
def cmos() -> Cmos:
    return Cmos()


def test_the_time_is_utc_in_bcd_and_24_hours(cmos: Cmos) -> None:
    assert cmos[B] == H24
    assert cmos.time() == [0x20, 0x23, 0x11, 0x14, 0x22, 0x13, 0x20]
    assert cmos[WEEKDAY] == 3  # Tuesday; Sunday is 1


def test_the_binary_mode_shows_plain_numbers(cmos: Cmos) -> None:
    cmos[B] = BINARY | H24
    assert cmos.time() == [20, 23, 11, 14, 22, 13, 20]


@pytest.mark.parametrize(("hour", "shown"), [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)])
def test_the_12_hour_mode_marks_the_afternoon(cmos: Cmos, hour: int, shown: int) -> None:
    cmos[B] = 0
    cmos.set_time(0x20, 0x24, 0x02, 0x29, shown, 0, 0)
    assert cmos[HOURS] == shown
    cmos[B] = BINARY | H24
    assert cmos.time() == [20, 24, 2, 29, hour, 0, 0]


def test_the_time_goes_on_with_the_host(cmos: Cmos) -> None:
    cmos.clock.pass_seconds(86400 + 61)
    assert cmos.time() == [0x20, 0x23, 0x11, 0x15, 0x22, 0x14, 0x21]
    assert cmos[WEEKDAY] == 4


def test_a_time_that_was_set_is_kept_as_an_offset(cmos: Cmos) -> None:
    cmos.set_time(0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59)
    assert cmos.time() == [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59]
    cmos.clock.pass_seconds(1)
    assert cmos.time() == [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00]
    assert cmos.rtc.state.offset == 946684800 - 1700000001


def test_set_halts_the_clock(cmos: Cmos) -> None:
    cmos[B] = SET | H24
    before = cmos.time()
    cmos.clock.pass_seconds(100.9985)
    assert cmos.time() == before
    assert not cmos[A] & 0x80
    cmos[B] = H24
    assert cmos.time() == before


def test_one_register_can_be_set_without_halting(cmos: Cmos) -> None:
    cmos[MINUTES] = 0x59
    assert cmos.time() == [0x20, 0x23, 0x11, 0x14, 0x22, 0x59, 0x20]
    cmos.clock.pass_seconds(40)
    assert cmos.time() == [0x20, 0x23, 0x11, 0x14, 0x23, 0x00, 0x00]


def test_the_mode_may_change_with_the_write_that_starts_the_clock(cmos: Cmos) -> None:
    cmos[B] = SET | H24
    cmos[HOURS] = 21
    cmos[B] = BINARY | H24
    assert cmos[HOURS] == 21


def test_a_date_that_does_not_exist_carries_over(cmos: Cmos) -> None:
    cmos.set_time(0x20, 0x23, 0x02, 0x30, 0x00, 0x00, 0x00)
    assert cmos.time() == [0x20, 0x23, 0x03, 0x02, 0x00, 0x00, 0x00]


@pytest.mark.parametrize("b", [H24, BINARY | H24, 0, BINARY])
@pytest.mark.parametrize("value", [0x00, 0x7F, 0xFF])
def test_nonsense_in_every_register_is_some_time(cmos: Cmos, b: int, value: int) -> None:
    cmos[B] = b
    cmos.set_time(*[value] * 7)
    cmos.clock.pass_seconds(1e6)
    assert all(0 <= register <= 0xFF for register in cmos.time())


@pytest.mark.parametrize(
    ("century", "year", "shown"),
    [(0x00, 0x00, [0x00, 0x01, 0x01, 0x01, 0, 0, 0]), (0x99, 0x99, [0x99, 0x99, 0x01, 0x01, 0, 0, 0])],
)
def test_the_clock_stays_within_the_years_that_it_can_show(
    cmos: Cmos, century: int, year: int, shown: list[int]
) -> None:
    cmos.set_time(century, year, 0x01, 0x01, 0, 0, 0)
    assert cmos.time() == shown
    cmos.clock.pass_seconds(366 * 86400)
    assert cmos.time()[:2] == [century, 0x02 if not year else 0x99]


def test_uip_announces_an_update_early_enough(cmos: Cmos) -> None:
    assert cmos[A] == 0x26
    cmos.clock.pass_seconds(0.9977)
    assert cmos[A] == 0x26
    cmos.clock.pass_seconds(0.0001)
    assert cmos[A] == 0xA6
    seconds = cmos[SECONDS]
    cmos.clock.pass_seconds(0.0022)
    assert cmos[A] == 0x26
    assert cmos[SECONDS] == seconds + 1


def test_status_registers_c_and_d_say_nothing_pending_and_battery_fine(cmos: Cmos) -> None:
    cmos[C] = cmos[D] = 0x55
    assert (cmos[C], cmos[D]) == (0x00, 0x80)


def test_the_memory_is_kept(cmos: Cmos) -> None:
    addresses = [1, 3, 5, *range(14, CENTURY), *range(CENTURY + 1, 128)]
    for address in addresses:
        cmos[address] = address ^ 0xFF
    assert [cmos[address] for address in addresses] == [address ^ 0xFF for address in addresses]


def test_the_nmi_bit_of_the_index_is_ignored_and_the_index_cannot_be_read(cmos: Cmos) -> None:
    cmos[0x40] = 0x12
    assert cmos[0x80 | 0x40] == 0x12
    assert cmos.bus.read(0x70, 1) == 0xFF


def test_a_reset_disables_interrupts_and_keeps_time_and_memory(cmos: Cmos) -> None:
    cmos.set_time(0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00)
    cmos[B] = 0x7A
    cmos[0x40] = 0x12
    cmos.rtc.reset()
    assert cmos[B] == H24
    assert cmos[0x40] == 0x12
    assert cmos.time() == [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00]


def test_a_successor_on_the_same_host_shows_the_same_time(cmos: Cmos) -> None:
    cmos.set_time(0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00)
    successor = Cmos(clock=cmos.clock)
    successor.rtc.state = cmos.rtc.state
    cmos.clock.pass_seconds(7)
    assert successor.time() == cmos.time()


def test_the_hosts_clock_is_the_default() -> None:
    rtc = Rtc()
    assert 2025 <= int(f"{rtc._time_registers()[CENTURY]:x}{rtc._time_registers()[YEAR]:02x}") < 2100
