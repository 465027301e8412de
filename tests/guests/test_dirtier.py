"""The guest `dirtier` on the real KVM, and its reader, which must find what is wrong and nothing else."""

from __future__ import annotations

import os
import struct
from contextlib import closing
from typing import TYPE_CHECKING, final

import attrs
import pytest

from tests.guests.layout import in_c, offsets_of
from tests.guests.machine import RAM_SIZE, boot
from tests.kvm.tiny import TinyMachine
from vmm.errors import StateRejected
from vmm.guests import build, dirtier
from vmm.guests.dirtier import DirtierHeader, DirtierReader, DirtierReport, Filling
from vmm.guests.heartbeat import DIRTIER, HEADER_ADDRESS, HeartbeatHeader, HeartbeatReader
from vmm.hostio import create_ram
from vmm.kvm.memory import GuestMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PAGE = 4096
PAGES = 8
GIB = 1 << 30


# --- the reader, over memory that a test makes ------------------------------------------------------------


@final
@attrs.define
class Guest:
    """The memory of a guest with a region of 8 pages, which does what dirtier.c does."""

    filled: bool = False
    filling: Filling | None = None
    memory: bytearray = attrs.Factory(lambda: bytearray(dirtier.START + PAGES * PAGE))
    written: int = 0
    changed: dict[str, int] = attrs.Factory(dict)

    def __attrs_post_init__(self) -> None:
        self.header()
        for page in range(PAGES if self.filled else 0):
            assert self.filling is not None
            at = self.at(page)
            self.memory[at + 8 : at + PAGE - 8] = self.filling.body(page)
            self.stamp(page, 0)

    def header(self, **fields: int) -> None:
        names = [field.name for field in attrs.fields(HeartbeatHeader)]
        common = dict.fromkeys(names, 0) | {"magic": 0x54414542, "version": 1, "guest": DIRTIER}
        common |= {"rate_hz": 100, "tsc_khz": 1000, "period_tsc": 10000, "ring_entries": 16}
        HeartbeatHeader.LAYOUT.pack_into(
            self.memory, HEADER_ADDRESS, *(common | {n: v for n, v in fields.items() if n in common}).values()
        )
        self.own()

    def own(self, **fields: int) -> None:
        self.changed |= fields
        own = {
            "magic": dirtier.MAGIC,
            "version": dirtier.VERSION,
            "pages": PAGES,
            "low_pages": PAGES,
            "low_address": dirtier.START,
            "high_address": 0,
            "pages_per_tick": 1,
            "filled": int(self.filled),
            "written": self.written,
            "behind": 0,
            "first_bad_page": 0,
            "reserved": 0,
        }
        DirtierHeader.LAYOUT.pack_into(self.memory, dirtier.ADDRESS, *(own | self.changed).values())

    def at(self, page: int) -> int:
        return dirtier.START + page * PAGE

    def stamp(self, page: int, generation: int, *, half: bool = False, of: int | None = None) -> None:
        for index, offset in ((0, 0), (1, PAGE - 8))[: 1 if half else 2]:
            check = ((page if of is None else of) * 2 + index) ^ generation * dirtier.KEY & 0xFFFFFFFF
            struct.pack_into("<II", self.memory, self.at(page) + offset, generation, check)

    def write(self, pages: int) -> None:
        for _ in range(pages):
            self.stamp(self.written % PAGES, self.written // PAGES + 1)
            self.written += 1
        self.own()

    def read(self, address: int, size: int) -> bytes:
        assert address + size <= len(self.memory)
        return bytes(self.memory[address : address + size])


@pytest.fixture(scope="module")
def filling() -> Filling:
    return Filling()


def look(reader: DirtierReader) -> DirtierReport:
    report = reader.look()
    assert report is not None
    return report


def test_the_layout_is_that_of_the_header_file(tmp_path: Path) -> None:
    numbers = [
        *("DIRTIER_ADDRESS", "DIRTIER_MAGIC", "DIRTIER_VERSION", "DIRTIER_START", "DIRTIER_LOW_END", "DIRTIER_KEY"),
        *("FILL_WORDS", "FILL_PAGES", "FILL_FACTOR", "FILL_SUMMAND", "GUEST_DIRTIER", "sizeof(struct dirtier)"),
    ]
    layout = DirtierHeader.LAYOUT
    assert in_c(tmp_path, numbers, "struct dirtier", DirtierHeader) == [
        *(dirtier.ADDRESS, dirtier.MAGIC, dirtier.VERSION, dirtier.START, dirtier.LOW_END, dirtier.KEY),
        *(dirtier.FILL_WORDS, dirtier.FILL_PAGES, dirtier.FILL_FACTOR, dirtier.FILL_SUMMAND, DIRTIER, layout.size),
        *offsets_of(layout),
    ]


def test_before_the_guest_has_started_there_is_no_report() -> None:
    guest = Guest()
    guest.header(magic=0)
    reader = DirtierReader(guest.read)
    assert (reader.look(), reader.written()) == (None, None)


@pytest.mark.parametrize("written", [0, 1, 7, 8, 9, 16, 21])
@pytest.mark.parametrize("filled", [False, True])
def test_memory_as_the_counter_says_is_intact(filling: Filling, written: int, filled: bool) -> None:
    guest = Guest(filled=filled, filling=filling)
    guest.write(written)
    report = look(DirtierReader(guest.read))
    assert (report.intact, report.stood, report.generation) == (True, True, written // PAGES), str(report)


def test_the_page_that_is_being_written_may_be_half_done() -> None:
    guest = Guest()
    guest.write(11)
    guest.stamp(3, 2, half=True)
    assert look(DirtierReader(guest.read)).intact


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda g: g.stamp(2, 1), "page 2 at 0x802000: generation 1, not generation 2"),
        (lambda g: g.stamp(2, 3), "page 2 at 0x802000: generation 3, not generation 2"),
        (lambda g: g.stamp(5, 2), "page 5 at 0x805000: generation 2, not generation 1"),
        (lambda g: g.stamp(2, 2, of=4), "page 2 at 0x802000: generation 2 of page 4, not generation 2"),
        (lambda g: g.stamp(2, 1, half=True), "page 2 at 0x802000: torn, not generation 2"),
        (lambda g: g.memory.__setitem__(slice(g.at(2), g.at(3)), bytes(PAGE)), "page 2 at 0x802000: empty, not "),
        (
            lambda g: g.memory.__setitem__(g.at(4) + 100, 1),
            "page 4 at 0x804000: what is between its stamps is not zero",
        ),
    ],
)
def test_a_page_that_is_not_as_the_counter_says_is_named(damage: Callable[[Guest], object], words: str) -> None:
    guest = Guest()
    guest.write(11)
    damage(guest)
    report = look(DirtierReader(guest.read))
    assert (report.wrong, report.intact) == (1, False)
    assert report.first_wrong[0].startswith(words)
    assert str(report).startswith("11 pages written, generation 1, 0 ticks; 1 of 8 pages wrong from outside, 0 from")


def test_a_counter_that_is_behind_the_pages_is_found() -> None:
    guest = Guest()
    guest.write(11)
    guest.own(written=9)
    assert look(DirtierReader(guest.read)).first_wrong == (
        "page 2 at 0x802000: generation 2, not generation 1",
    )  # page 1 is the one that could be under way


def test_a_filled_page_that_was_never_written_is_verified_too(filling: Filling) -> None:
    guest = Guest(filled=True, filling=filling)
    guest.memory[guest.at(6) + 2000] ^= 1
    guest.memory[guest.at(7) : guest.at(8)] = bytes(PAGE)
    assert look(DirtierReader(guest.read)).first_wrong == (
        "page 6 at 0x806000: what is between its stamps is not its filling",
        "page 7 at 0x807000: empty, not generation 0",
    )


def test_what_is_written_during_the_look_may_have_any_generation_of_that_time() -> None:
    guest = Guest()
    guest.write(8)

    def read(address: int, size: int) -> bytes:
        if address == dirtier.START:
            guest.write(3)
            data = guest.read(address, size)
            guest.write(6)
            return data
        return guest.read(address, size)

    report = look(DirtierReader(read))
    assert (report.intact, report.stood, report.dirtier.written) == (True, False, 17), str(report)


def test_what_was_not_written_during_the_look_is_verified_exactly() -> None:
    guest = Guest()
    guest.write(8)
    guest.stamp(6, 2)

    def read(address: int, size: int) -> bytes:
        if address == dirtier.START:
            guest.write(3)
        return guest.read(address, size)

    assert look(DirtierReader(read)).first_wrong == ("page 6 at 0x806000: generation 2, not generation 1",)


def test_many_wrong_pages_are_counted_and_few_are_named() -> None:
    guest = Guest(memory=bytearray(dirtier.START + 20 * PAGE))
    guest.own(pages=20, low_pages=20, written=20)
    report = look(DirtierReader(guest.read))
    assert (report.wrong, len(report.first_wrong)) == (20, 8)


def test_a_guest_that_went_back_is_found_in_another_process_too() -> None:
    guest, older = Guest(), Guest()
    guest.write(5)
    older.write(3)
    reader = DirtierReader(guest.read)
    assert look(reader).intact
    reader.follow(older.read)
    assert reader.written() == 3
    report = look(reader)
    assert (report.went_back, report.intact, report.wrong) == (True, False, 0)
    assert "the counter went back" in str(report)


@pytest.mark.parametrize(
    ("common", "own", "fault"),
    [
        ({"guest": 1}, {}, "guest 1 is not 3 (dirtier)"),
        ({}, {"magic": 5}, "it begins with 0x5, not 0x54524944"),
        ({}, {"version": 9}, "version 9, 1 is read here"),
        ({}, {"pages": 0}, "0 pages, 8 of them low, filled 0"),
        ({}, {"low_pages": 9}, "8 pages, 9 of them low, filled 0"),
        ({}, {"filled": 2}, "8 pages, 8 of them low, filled 2"),
    ],
)
def test_a_header_that_makes_no_sense_is_rejected(common: dict[str, int], own: dict[str, int], fault: str) -> None:
    guest = Guest()
    guest.header(**common)
    guest.own(**own)
    with pytest.raises(StateRejected) as caught:
        DirtierReader(guest.read).look()
    assert str(caught.value) == f"Section dirtier header: {fault}"


def test_no_page_of_the_filling_is_like_another(filling: Filling) -> None:
    pages = [*range(600), 1 << 17, (1 << 18) - 1]
    assert len({filling.body(page) for page in pages}) == len(pages)


def test_a_guest_that_starts_afresh_during_the_look_is_no_fault_of_its_memory() -> None:
    guest = Guest()

    def read(address: int, size: int) -> bytes:
        if address == dirtier.START:
            guest.own(pages=4, low_pages=4)
        return guest.read(address, size)

    with pytest.raises(StateRejected, match="Section dirtier header: the guest has started afresh"):
        DirtierReader(read).look()


@pytest.mark.parametrize("start", [dirtier.START, (3 << 30) - 2 * PAGE, (4 << 30) + PAGE])
def test_what_is_filled_behind_the_region_can_be_verified_too(filling: Filling, start: int) -> None:
    size = 3 * GIB + 16 * PAGE
    memory = GuestMemory.from_memfd(create_ram(size, "filled"), size)
    with closing(memory):
        filling.fill(memory.fd, 6, start=start)
        assert filling.wrong(memory.read, range(6), start=start) == 0
        memory.write(4 << 30 if start < 1 << 32 and start > GIB else start, b"x")
        assert filling.wrong(memory.read, range(6), start=start) == 1
        assert filling.wrong(memory.read, range(6, 7), start=start) == 1


# --- the guest on the real KVM ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guest, compiled from its source as it is now."""
    return build.build("dirtier", tmp_path_factory.mktemp("dirtier"))


@pytest.fixture
def machine(no_leaks: None) -> Iterator[TinyMachine]:
    """A machine of one vCPU and 16 MiB."""
    with TinyMachine(size=RAM_SIZE) as machine:
        yield machine


def at_generation(machine: TinyMachine, generation: int) -> Callable[[str], bool]:
    """Return what is true of a line that is printed once so many rounds are complete."""

    def reached(line: str) -> bool:
        found = dirtier.read_dirtier(machine.memory.read)
        return found is not None and found.written >= generation * found.pages

    return reached


@pytest.mark.kvm
def test_it_writes_its_region_round_and_round(machine: TinyMachine, image: Path) -> None:
    console = boot(machine, image, "region=256K pages=20")
    console.until = at_generation(machine, 2)
    assert machine.run().reason == "kicked"
    assert console.whole[:2] == ["dirtier: started", "dirtier 1 ok"]
    report = look(DirtierReader(machine.memory.read))
    assert report.intact, str(report)
    assert (report.stood, report.dirtier.pages) == (True, 64)
    ticks = HeartbeatReader(machine.memory.read).look()
    assert ticks is not None
    assert ticks.intact, str(ticks)
    assert ticks.header.rate_hz == 100


@pytest.mark.kvm
def test_the_host_may_change_its_rate(machine: TinyMachine, image: Path) -> None:
    console = boot(machine, image, "region=64K pages=0")
    console.until = lambda line: line == "dirtier 1 ok"
    machine.run()
    reader = DirtierReader(machine.memory.read)
    assert reader.written() == 0
    at = dirtier.ADDRESS + 8 * 4  # pages_per_tick
    machine.memory.write(at, (3).to_bytes(4, "little"))
    console.until = lambda line: line == "dirtier 2 ok"
    machine.run()
    written = reader.written()
    assert written
    assert written % 3 == 0
    assert look(reader).intact


@pytest.mark.kvm
def test_a_rate_that_it_cannot_keep_is_counted(machine: TinyMachine, image: Path) -> None:
    console = boot(machine, image, "region=64K pages=1M")
    console.until = lambda line: line == "dirtier 1 ok"
    machine.run()
    report = look(DirtierReader(machine.memory.read))
    assert report.intact, str(report)
    assert report.dirtier.behind > 0


@pytest.mark.kvm
@pytest.mark.parametrize("kind", ["lost", "lost altogether", "repeated", "newer", "torn"])
def test_it_finds_a_page_that_is_not_as_it_left_it(machine: TinyMachine, image: Path, kind: str) -> None:
    console = boot(machine, image, "region=64K pages=16 hz=200")
    console.until = at_generation(machine, 2)
    machine.run()
    found = dirtier.read_dirtier(machine.memory.read)
    assert found is not None
    page = 5
    victim = found.address_of(page)
    generation = int.from_bytes(machine.memory.read(victim, 4), "little")

    def stamp(generation: int, *offsets: int) -> None:
        for offset in offsets:
            check = (page * 2 + bool(offset)) ^ generation * dirtier.KEY & 0xFFFFFFFF
            machine.memory.write(victim + offset, struct.pack("<II", generation, check))

    match kind:
        case "lost":
            stamp(generation - 1, 0, PAGE - 8)
        case "lost altogether":
            machine.memory.write(victim, bytes(PAGE))
        case "repeated":
            machine.memory.write(victim, machine.memory.read(victim + PAGE, PAGE))
        case "newer":
            stamp(generation + 2, 0, PAGE - 8)
        case "torn":
            stamp(generation - 1, 0)
    console.until = lambda line: "FAULT" in line
    machine.run()
    after = look(DirtierReader(machine.memory.read))
    lost, repeated, torn = {"l": (1, 0, 0), "r": (0, 1, 0), "n": (0, 1, 0), "t": (0, 0, 1)}[kind[0]]
    assert console.whole[-1].endswith(f" FAULT lost={lost} repeated={repeated} torn={torn} first={victim:#x}")
    assert (after.errors, after.wrong, after.dirtier.first_bad_page) == (1, 0, page)
    assert not after.intact


@pytest.mark.kvm
@pytest.mark.parametrize("who", ["guest", "host"])
def test_a_filled_region_is_verified_from_inside_and_outside(
    machine: TinyMachine, image: Path, filling: Filling, who: str
) -> None:
    if who == "host":
        filling.fill(machine.memory.fd, 64)
    console = boot(machine, image, f"region=256K pages=64 {'fill' if who == 'guest' else 'filled'}=1")
    console.until = at_generation(machine, 1)
    machine.run()
    assert console.whole[0] == ("dirtier: filling" if who == "guest" else "dirtier: started")
    assert machine.memory.read(dirtier.START + 9 * PAGE + 8, PAGE - 16) == filling.body(9)
    report = look(DirtierReader(machine.memory.read))
    assert report.intact, str(report)


@pytest.mark.kvm
def test_a_region_that_should_be_filled_and_is_not_is_found_in_the_first_round(
    machine: TinyMachine, image: Path
) -> None:
    console = boot(machine, image, "region=64K filled=1")
    console.until = lambda line: "FAULT" in line
    machine.run()
    report = look(DirtierReader(machine.memory.read))
    assert (report.header.repeated, report.dirtier.first_bad_page) == (0, 0)
    assert report.header.lost


@pytest.mark.kvm
@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize(("start", "low"), [("3071M", 256), ("4G", 0), ("4097M", 0)])
def test_a_region_in_high_memory(image: Path, filling: Filling, start: str, low: int) -> None:
    size = 3 * GIB + (16 << 20)
    at = int(start[:-1]) << (30 if start[-1] == "G" else 20)
    with TinyMachine(size=size) as machine:
        filling.fill(machine.memory.fd, 1024, start=at)
        console = boot(machine, image, f"start={start} region=4M pages=512 filled=1", size)
        console.until = at_generation(machine, 2)
        machine.run()
        if console.whole[-1] == "guest: unexpected processor exception, giving up":
            pytest.skip("this KVM lets no guest page but in long mode")
        report = look(DirtierReader(machine.memory.read))
        assert report.intact, str(report)
        assert (report.dirtier.low_pages, report.dirtier.pages) == (low, 1024)
        machine.memory.write(report.dirtier.address_of(700), bytes(PAGE))
        console.until = lambda line: "FAULT" in line
        machine.run()
        assert look(DirtierReader(machine.memory.read)).dirtier.first_bad_page == 700


REFUSED = {
    "region=9M": "dirtier: a region of 9216 KiB does not fit: there are 8192 KiB of RAM for it",
    "region=5G": "dirtier: a region of 5242880 KiB does not fit: there are 8192 KiB of RAM for it",
    "start=4G": "dirtier: a region of 4096 KiB does not fit: there are 0 KiB of RAM for it",
    "start=7M": "dirtier: start=7M is out of range",
    "filled=2": "dirtier: filled=2 is out of range",
}


@pytest.mark.kvm
@pytest.mark.parametrize("cmdline", REFUSED)
def test_it_refuses_a_wrong_option_in_one_sentence(machine: TinyMachine, image: Path, cmdline: str) -> None:
    console = boot(machine, image, cmdline)
    machine.run()
    assert (console.whole, console.exit_value) == ([REFUSED[cmdline]], 1)


def test_what_cannot_be_filled_is_an_error(filling: Filling, tmp_path: Path) -> None:
    read_only = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            filling.fill(read_only, 1)
    finally:
        os.close(read_only)
