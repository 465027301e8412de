from __future__ import annotations

import struct
from typing import TYPE_CHECKING, final

import attrs
import pytest

from tests.guests.layout import in_c, offsets_of
from vmm.errors import StateRejected
from vmm.guests import heartbeat
from vmm.guests.heartbeat import HeartbeatHeader, HeartbeatReader, HeartbeatReport

if TYPE_CHECKING:
    from pathlib import Path

KHZ = 1_000_000
PERIOD = 1_000_000
RING = 0x30_0000
ENTRIES = 16


@final
@attrs.define
class Guest:
    """A guest's memory, as far as a reader looks at it: `deadline` at 1 kHz with a TSC of 1 GHz and a ring of 16."""

    memory: bytearray = attrs.Factory(lambda: bytearray(0x30_0000 + ENTRIES * 16))
    fields: dict[str, int] = attrs.Factory(dict)
    now: int = 5_000_000_000

    def __attrs_post_init__(self) -> None:
        self.fields = dict.fromkeys((field.name for field in attrs.fields(HeartbeatHeader)), 0)
        self.set(
            magic=heartbeat.MAGIC,
            version=1,
            guest=heartbeat.DEADLINE,
            rate_hz=1000,
            tsc_khz=KHZ,
            period_tsc=PERIOD,
            ring_address=RING,
            ring_entries=ENTRIES,
        )

    def set(self, **fields: int) -> None:
        self.fields.update(fields)
        HeartbeatHeader.LAYOUT.pack_into(self.memory, heartbeat.HEADER_ADDRESS, *self.fields.values())

    def tick(self, count: int = 1, period: int = PERIOD) -> None:
        for _ in range(count):
            self.now += period
            self.put(self.fields["head"], self.now)
            self.set(head=self.fields["head"] + 1)

    def put(self, number: int, tsc: int, *, check: int | None = None) -> None:
        right = number & 0xFFFFFFFF ^ tsc & 0xFFFFFFFF ^ tsc >> 32 ^ heartbeat.RING_CHECK
        entry = (number & 0xFFFFFFFF, right if check is None else check, tsc)
        struct.pack_into("<IIQ", self.memory, RING + number % ENTRIES * 16, *entry)

    def read(self, address: int, size: int) -> bytes:
        assert address + size <= len(self.memory)
        return bytes(self.memory[address : address + size])


def look(reader: HeartbeatReader) -> HeartbeatReport:
    report = reader.look()
    assert report is not None
    return report


def test_the_layout_is_that_of_the_header_file(tmp_path: Path) -> None:
    numbers = [
        *("HEADER_ADDRESS", "HEADER_MAGIC", "HEADER_VERSION", "RING_CHECK", "RING_ENTRIES"),
        *("GUEST_HEARTBEAT", "GUEST_DEADLINE", "sizeof(struct header)", "sizeof(struct ring_entry)"),
    ]
    layout = HeartbeatHeader.LAYOUT
    assert in_c(tmp_path, numbers, "struct header", HeartbeatHeader) == [
        *(heartbeat.HEADER_ADDRESS, heartbeat.MAGIC, heartbeat.VERSION, heartbeat.RING_CHECK, heartbeat.RING_LIMIT),
        *(heartbeat.HEARTBEAT, heartbeat.DEADLINE, layout.size, 16, *offsets_of(layout)),
    ]


def test_before_the_guest_has_started_there_is_no_report() -> None:
    guest = Guest()
    guest.set(magic=0)
    assert HeartbeatReader(guest.read).look() is None


def test_a_steady_guest_is_intact() -> None:
    guest = Guest()
    guest.tick(10)
    report = look(HeartbeatReader(guest.read))
    assert (report.ticks, report.window, report.expected, report.missing) == (10, 10, 9.0, 0.0)
    assert (report.window_gap_ms, report.gaps_ms, report.intact) == (1.0, (), True)


def test_a_guest_that_has_not_ticked_yet_is_intact() -> None:
    report = look(HeartbeatReader(Guest().read))
    assert (report.ticks, report.window, report.missing, report.intact) == (0, 0, 0.0, True)


def test_a_pause_is_a_gap_and_no_damage() -> None:
    guest = Guest()
    guest.tick(5)
    guest.tick(1, 7_500_000)
    guest.tick(2)
    report = look(HeartbeatReader(guest.read))
    assert (report.window_gap_ms, report.gaps_ms, report.missing, report.intact) == (7.5, (7.5,), 6.5, True)


def test_the_second_look_sees_the_gap_between_it_and_the_first() -> None:
    guest = Guest()
    reader = HeartbeatReader(guest.read)
    guest.tick(5)
    assert look(reader).gaps_ms == ()
    guest.tick(1, 3_000_000)
    report = look(reader)
    assert (report.window, report.gaps_ms, report.missing) == (2, (3.0,), 2.0)


def test_entries_that_were_overwritten_before_they_were_seen_are_no_damage() -> None:
    guest = Guest()
    guest.tick(100)
    report = look(HeartbeatReader(guest.read))
    assert (report.ticks, report.window, report.intact) == (100, ENTRIES - 1, True)


def test_an_entry_of_the_round_before_is_a_sequence_gap() -> None:
    guest = Guest()
    guest.tick(20)
    old = bytes(guest.memory)
    guest.tick(10)
    at = RING + 25 % ENTRIES * 16
    guest.memory[at : at + 16] = old[at : at + 16]
    report = look(HeartbeatReader(guest.read))
    assert (report.sequence_gaps, report.torn, report.repeats, report.intact) == (1, 0, 0, False)


def test_an_entry_with_the_wrong_check_is_torn() -> None:
    guest = Guest()
    guest.tick(10)
    guest.put(4, guest.now, check=0)
    report = look(HeartbeatReader(guest.read))
    assert (report.torn, report.sequence_gaps, report.intact) == (1, 0, False)


def test_time_that_goes_back_is_counted() -> None:
    guest = Guest()
    guest.tick(5)
    guest.tick(1, -5)
    report = look(HeartbeatReader(guest.read))
    assert (report.backwards, report.intact) == (1, False)


def test_a_guest_that_went_back_is_a_repeat() -> None:
    guest = Guest()
    guest.tick(5)
    before, now = bytes(guest.memory), guest.now
    reader = HeartbeatReader(guest.read)
    guest.tick(3)
    assert look(reader).repeats == 0
    guest.memory[:] = before
    guest.set(head=5)
    guest.now = now
    assert look(reader).repeats == 1
    assert look(reader).repeats == 0


def test_a_guest_that_ran_twice_is_a_repeat_even_if_it_is_further_on() -> None:
    guest = Guest()
    reader = HeartbeatReader(guest.read)
    guest.tick(5)
    look(reader)
    guest.set(head=4)
    guest.now += 17
    guest.tick(4)
    report = look(reader)
    assert (report.ticks, report.repeats, report.intact) == (8, 1, False)


def test_a_reader_follows_the_guest_into_another_process() -> None:
    guest = Guest()
    reader = HeartbeatReader(guest.read)
    guest.tick(5)
    look(reader)
    successor = Guest(memory=bytearray(guest.memory), now=guest.now)
    successor.set(head=5)
    reader.follow(successor.read)
    successor.tick(2)
    report = look(reader)
    assert (report.window, report.repeats, report.intact) == (3, 0, True)


def test_faults_that_the_guest_found_in_its_memory_are_reported() -> None:
    guest = Guest()
    guest.tick(3)
    guest.set(lost=1, repeated=2, torn=3, first_bad_kind=1, first_bad_address=0x400000, pages_checked=77)
    report = look(HeartbeatReader(guest.read))
    assert (report.region_faults, report.intact) == (6, False)
    assert str(report) == (
        "3 ticks, largest gap 0.00 ms; 77 pages checked; ring: 0 lost, 0 repeated, 0 torn, 0 backwards; "
        "pages: 1 lost, 2 repeated, 3 torn, first at 0x400000"
    )


def test_entries_overwritten_while_they_are_read_are_left_out() -> None:
    guest = Guest()
    guest.tick(40)

    def read(address: int, size: int) -> bytes:
        data = guest.read(address, size)
        if address >= RING:  # the guest goes on while the reader is at it, and overtakes the first entries
            guest.tick(2)
            data = guest.read(address, size)
        return data

    report = look(HeartbeatReader(read))
    assert (report.torn, report.sequence_gaps, report.intact) == (0, 0, True)
    assert report.window == ENTRIES - 5


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"version": 2}, "version 2, 1 is read here"),
        ({"guest": 9}, "guest 9 is none of 1 (heartbeat), 2 (deadline) and 3 (dirtier)"),
        ({"ring_entries": 17}, "a ring of 17 entries, not a power of two up to 65536"),
        ({"ring_entries": 1 << 31}, "a ring of 2147483648 entries, not a power of two up to 65536"),
        ({"tsc_khz": 0}, "rate 1000 Hz, TSC 0 kHz and period 1000000 have a zero"),
    ],
)
def test_a_header_that_makes_no_sense_is_rejected(fields: dict[str, int], fault: str) -> None:
    guest = Guest()
    guest.set(**fields)
    with pytest.raises(StateRejected) as caught:
        HeartbeatReader(guest.read).look()
    assert str(caught.value) == f"Section heartbeat header: {fault}"


def test_the_period_of_the_pit_is_that_of_its_divisor() -> None:
    guest = Guest()
    guest.set(guest=heartbeat.HEARTBEAT)
    guest.tick(10)
    report = look(HeartbeatReader(guest.read, tsc_khz=1193182))
    assert report.expected == pytest.approx(9 * 1000 / 1193)
