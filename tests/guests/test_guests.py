"""The built-in guests on the real KVM, each run until it has printed what a test waits for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import pytest

from tests.guests.machine import RAM_SIZE, boot
from tests.kvm.tiny import TinyMachine
from vmm.guests import build
from vmm.guests.heartbeat import HeartbeatReader, HeartbeatReport
from vmm.kvm.cpuid import LEAF1_ECX_TSC_DEADLINE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

PAGE = 4096


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guests, compiled from the sources as they are now."""
    directory = tmp_path_factory.mktemp("guests")
    for name in build.GUESTS:
        build.build(name, directory)
    return directory


@pytest.fixture
def machine() -> Iterator[TinyMachine]:
    """A machine of one vCPU and 16 MiB."""
    with TinyMachine(size=RAM_SIZE) as machine:
        yield machine


def report_of(machine: TinyMachine) -> HeartbeatReport:
    report = HeartbeatReader(machine.memory.read, tsc_khz=machine.fds[0].tsc_khz).look()
    assert report is not None
    return report


def at_line(text: str) -> Callable[[str], bool]:
    return lambda line: line.startswith(text)


def test_heartbeat_ticks_prints_and_checks_without_a_fault(machine: TinyMachine, images: Path) -> None:
    console = boot(machine, images / "heartbeat.elf", "region=64K")
    console.until = at_line("heartbeat 5 ")
    assert machine.run().reason == "kicked"
    assert console.whole == ["heartbeat: started", *(f"heartbeat {n} ok" for n in range(1, 6))]
    report = report_of(machine)
    assert report.intact, str(report)
    assert report.ticks >= 500
    assert report.header.region_pages == 16


def test_heartbeat_goes_on_where_it_was_kicked_out(machine: TinyMachine, images: Path) -> None:
    console = boot(machine, images / "heartbeat.elf", "region=64K")
    for number in (1, 2, 3):
        console.until = at_line(f"heartbeat {number} ")
        machine.run()
    assert console.whole == ["heartbeat: started", *(f"heartbeat {n} ok" for n in range(1, 4))]
    assert report_of(machine).intact


def test_heartbeat_at_another_rate(machine: TinyMachine, images: Path) -> None:
    console = boot(machine, images / "heartbeat.elf", "hz=100 region=64K")
    console.until = at_line("heartbeat 2 ")
    machine.run()
    report = report_of(machine)
    assert report.ticks >= 20
    assert report.header.rate_hz == 100


@pytest.mark.parametrize("kind", ["lost", "lost altogether", "repeated", "newer", "torn"])
def test_heartbeat_finds_a_page_that_is_not_as_it_left_it(machine: TinyMachine, images: Path, kind: str) -> None:
    console = boot(machine, images / "heartbeat.elf", "region=64K")
    console.until = lambda line: line != "heartbeat: started" and report_of(machine).header.region_generation > 2
    machine.run()
    header = report_of(machine).header
    victim = header.region_address + 5 * PAGE
    page = bytearray(machine.memory.read(victim, PAGE))
    generation = int.from_bytes(page[:4], "little")

    def stamp(at: range, generation: int) -> None:
        for offset in at:
            page[offset : offset + 4] = generation.to_bytes(4, "little")

    match kind:
        case "lost":
            stamp(range(0, PAGE, 512), generation - 1)
        case "lost altogether":
            page[:] = bytes(PAGE)
        case "repeated":
            page[:] = machine.memory.read(victim + PAGE, PAGE)
        case "newer":
            stamp(range(0, PAGE, 512), generation + 2)
        case "torn":
            stamp(range(0, PAGE // 2, 512), generation - 1)
    machine.memory.write(victim, page)
    console.until = lambda line: "FAULT" in line
    machine.run()
    after = report_of(machine).header
    found = (after.lost, after.repeated, after.torn)
    assert found == {"l": (1, 0, 0), "r": (0, 1, 0), "n": (0, 1, 0), "t": (0, 0, 1)}[kind[0]]
    assert after.first_bad_address == victim
    assert console.whole[-1].endswith(f" FAULT lost={found[0]} repeated={found[1]} torn={found[2]} first={victim:#x}")


@pytest.mark.parametrize(
    ("cmdline", "line"),
    [
        ("regoin=4M", "heartbeat: regoin=4M is not an option of this guest"),
        ("hz=100 region=x", "heartbeat: region=x is not a size: give a number, with K, M or G behind it if you like"),
        ("region=4Mx", "heartbeat: region=4Mx is not a size: give a number, with K, M or G behind it if you like"),
        ("hz=5", "heartbeat: hz=5 is out of range"),
        ("region=13M", "heartbeat: a region of 13312 KiB does not fit: there are 12288 KiB of RAM above 4 MiB"),
    ],
)
def test_heartbeat_refuses_a_wrong_option_in_one_sentence(
    machine: TinyMachine, images: Path, cmdline: str, line: str
) -> None:
    console = boot(machine, images / "heartbeat.elf", cmdline)
    machine.run()
    assert (console.whole, console.exit_value) == ([line], 1)


def test_deadline_ticks_and_prints(machine: TinyMachine, images: Path) -> None:
    console = boot(machine, images / "deadline.elf", "hz=1000")
    console.until = at_line("deadline 3 ")
    machine.run()
    assert console.whole == ["deadline: started", "deadline 1 ok", "deadline 2 ok", "deadline 3 ok"]
    report = report_of(machine)
    assert report.intact, str(report)
    assert report.ticks >= 300


def test_deadline_says_when_the_processor_has_no_such_timer(machine: TinyMachine, images: Path) -> None:
    leaves = tuple(
        attrs.evolve(entry, ecx=entry.ecx & ~LEAF1_ECX_TSC_DEADLINE) if entry.function == 1 else entry
        for entry in machine.kvm.supported_cpuid()
    )
    machine.fds[0].set_cpuid(leaves)
    console = boot(machine, images / "deadline.elf")
    machine.run()
    assert console.whole == ["deadline: this processor has no TSC-deadline timer (CPUID 1, ECX bit 24)"]
    assert console.exit_value == 2


def test_chatter_counts_its_lines(machine: TinyMachine, images: Path) -> None:
    console = boot(machine, images / "chatter.elf")
    console.until = at_line("chatter 0000000101 ")
    machine.run()
    assert console.whole == [
        f"chatter {n:010} abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQ" for n in range(1, len(console.whole) + 1)
    ]
    assert len(console.text) == 64 * 101
