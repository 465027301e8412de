"""`trio-vmm demo`, as whoever types it sees it."""

from __future__ import annotations

import io
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import attrs
import pytest

from vmm.cli_demo_screen import GREEN, Screen
from vmm.cli_demo_ticks import TickClock
from vmm.guests.heartbeat import HEADER_ADDRESS, MAGIC, VERSION, HeartbeatHeader

ROOT: Final = Path(__file__).resolve().parent.parent
REGION: Final = 0x40_0000
"""Where the guest's checked pages begin (layout.h)."""

UPDATE: Final = re.compile(r"old is process (\d+), new is process (\d+)")


class Demo:
    """A demo under way, whose output is a pipe and whose temporary directory is its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.text = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vmm", "demo", *options],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            cwd=ROOT, env={**os.environ, "TMPDIR": str(folder)},
        )  # fmt: skip

    def until(self, pattern: str) -> re.Match[str]:
        """Read on until a line has `pattern` in it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.text += line
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"no line has {pattern!r} in it:\n{self.text}")

    def end(self) -> int:
        """Read the rest, and return the exit status."""
        assert self.process.stdout is not None
        with self.process.stdout:
            self.text += self.process.stdout.read()
        return self.process.wait()

    def machines(self) -> set[int]:
        """Every process that has a file of this demo's, or that its output names, and that lives."""
        named = {int(pid) for pid in re.findall(r"process (\d+)", self.text)}
        mine = str(self.folder).encode()
        with_files = {int(entry.name) for entry in Path("/proc").glob("[0-9]*") if mine in command_line(entry)}
        return {pid for pid in named | with_files if Path(f"/proc/{pid}").exists()}

    def left(self) -> list[str]:
        """What it has left behind."""
        return [*(path.name for path in self.folder.iterdir()), *(f"process {pid}" for pid in self.machines())]


def command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory whose path is short enough to have sockets in it."""
    return tmp_path_factory.mktemp("d")


def in_order(text: str, *parts: str) -> bool:
    return re.search(".*".join(re.escape(part) for part in parts), text, re.DOTALL) is not None


@pytest.mark.kvm
@pytest.mark.usefixtures("no_leaks")
def test_it_shows_the_phases_and_an_update_that_lost_nothing(folder: Path) -> None:
    demo = Demo(folder)
    assert demo.end() == 0, demo.text

    opened = re.findall(r"^  \+ (\w+) ", demo.text, re.MULTILINE)
    assert opened == ["boot", "precreate", "accel", "backends", "preconfig", "devices", "running"]
    closed = re.findall(r"^  - (\w+) ", demo.text, re.MULTILINE)
    assert closed == ["precreate", "accel", "backends", "preconfig", "devices"]
    assert in_order(demo.text, "+ fd_receive", "+ accel + backends + preconfig + devices", "+ incoming")
    assert in_order(demo.text, "+ migrating", "STOP", "+ quiesced", "+ handover", "+ postmigrate")
    assert "phases closed, innermost first: running, incoming, devices, preconfig,\n  backends, accel," in demo.text
    assert "  running: true\n" in demo.text

    old, new = UPDATE.search(demo.text).groups()  # type: ignore[union-attr]
    before, after = re.findall(r"^  heartbeat (\d+) ok   tick (\d+)   process (\d+)$", demo.text, re.MULTILINE)
    assert (before[2], after[2]) == (old, new)
    assert old != new
    assert int(before[0]) < int(after[0])
    assert int(before[1]) < int(after[1])

    total = float(re.search(r"The guest's pause: ([\d.]+) ms", demo.text)[1])  # type: ignore[index]
    stages = re.search(r"by stage: ([^:]*)  as the guest", demo.text, re.DOTALL)[1]  # type: ignore[index]
    assert sum(float(value) for value in re.findall(r"[\d.]{3,}", stages)) == pytest.approx(total, abs=0.05)
    assert "No tick was lost, repeated or torn: " in demo.text
    assert "\x1b" not in demo.text
    # A path cannot be broken; an ordinary one is no longer than this.
    assert max(len(line.replace(str(folder), "/tmp")) for line in demo.text.splitlines()) <= 80
    assert not demo.left()


@pytest.mark.kvm
@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize(
    "place",
    [r"\$ trio-vmm run ", r"> cpu-model-set", r"^The guest lives", r"\$ trio-vmm update", r"^The same socket answers"],
)
def test_an_interrupt_ends_it_anywhere_and_leaves_nothing(folder: Path, place: str) -> None:
    demo = Demo(folder)
    demo.until(place)
    demo.process.send_signal(signal.SIGINT)
    assert demo.end() == 128 + signal.SIGINT, demo.text
    assert demo.text.endswith("\nInterrupted. The guest has been ended, and nothing is left.\n")
    assert not demo.left()


@pytest.mark.kvm
@pytest.mark.usefixtures("no_leaks")
def test_pages_that_lose_what_the_guest_wrote_are_told(folder: Path) -> None:
    demo = Demo(folder)
    pid = int(demo.until(r"^  heartbeat \d+ ok .* process (\d+)$")[1])
    ram = next(entry for entry in Path(f"/proc/{pid}/fd").iterdir() if "memfd:ram" in os.readlink(entry))
    with open(ram, "r+b", buffering=0) as memory:
        memory.seek(REGION)
        memory.write(bytes(16 * 4096))
    assert demo.end() == 1, demo.text
    assert re.search(r"Not as it should be: the serial line said 'heartbeat \d+ FAULT lost=", demo.text)
    assert re.search(r"pages:\s+[1-9]\d* lost", demo.text)
    assert "No tick was lost" not in demo.text
    assert not demo.left()


def test_without_kvm_it_says_so_in_a_sentence(folder: Path) -> None:
    shell = 'mount -t tmpfs none /dev && exec "$0" -m vmm demo'
    if subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine permits no mount namespace of one's own")
    run = subprocess.run(
        ["unshare", "-rm", "sh", "-c", shell, sys.executable],
        capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "TMPDIR": str(folder)},
    )  # fmt: skip
    assert (run.returncode, run.stdout, run.stderr) == (
        1,
        "",
        "trio-vmm: Cannot use /dev/kvm: it does not exist; "
        "load the module kvm_intel or kvm_amd, and enable virtualization in the firmware\n",
    )


@pytest.mark.kvm
def test_whoever_stops_reading_gets_no_traceback(folder: Path) -> None:
    demo = Demo(folder)
    demo.until("A process with a monitor")
    assert demo.process.stdout is not None
    demo.process.stdout.close()
    assert demo.process.wait() == 1
    assert not demo.left()


@pytest.mark.kvm
@pytest.mark.parametrize(("options", "colours"), [((), True), (("--plain",), False)])
def test_a_terminal_gets_colours_unless_they_are_not_wanted(
    folder: Path, options: tuple[str, ...], colours: bool
) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "vmm", "demo", *options],
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT,
        env={**{name: value for name, value in os.environ.items() if name != "NO_COLOR"}, "TMPDIR": str(folder)},
    )  # fmt: skip
    os.close(theirs)
    text = b""
    while b"precreate" not in text:
        text += os.read(ours, 4096)
    process.send_signal(signal.SIGINT)
    try:
        while data := os.read(ours, 4096):
            text += data
    except OSError:  # EIO: it has ended
        pass
    os.close(ours)
    assert process.wait() == 128 + signal.SIGINT
    assert (b"\x1b[1m" in text) is colours
    assert not list(folder.iterdir())


# --- the screen -------------------------------------------------------------------------------------------------


def screen(*, colours: bool = False, terminal: bool = False) -> tuple[Screen, io.StringIO]:
    out = io.StringIO()
    return Screen(out, colours=colours, terminal=terminal), out


def test_what_a_window_allows_stays_in_its_column() -> None:
    shown, out = screen()
    shown.opened(["devices"], "may " + ", ".join(f"token-{n}" for n in range(9)))
    first, *rest = out.getvalue().splitlines()
    assert first.startswith("  + devices     may token-0, ")
    assert rest
    assert all(line.startswith(" " * 16 + "token-") for line in rest)
    assert max(map(len, [first, *rest])) <= 80


def test_several_phases_stand_in_one_line_with_what_is_said_of_them() -> None:
    shown, out = screen()
    shown.opened(["accel", "backends", "preconfig"], "as before", margin="   -1.0  new  ")
    assert out.getvalue() == "   -1.0  new  + accel + backends + preconfig  as before\n"


def test_a_line_takes_the_place_of_the_moving_one() -> None:
    shown, out = screen(terminal=True)
    shown.live("heartbeat 1 ok")
    shown.line("done")
    assert out.getvalue() == "\r\x1b[K  heartbeat 1 ok\r\x1b[Kdone\n"


def test_nothing_moves_where_nobody_watches() -> None:
    shown, out = screen()
    shown.live("heartbeat 1 ok")
    shown.line(shown.paint("done", GREEN))
    assert out.getvalue() == "done\n"


# --- the guest's clock ------------------------------------------------------------------------------------------


class TickingRam:
    """The header and the ring of a guest that ticked at `times`, in ms, with a TSC of 1 MHz."""

    RING: Final = 0x30_0000

    def __init__(self, *times: float) -> None:
        fields = dict.fromkeys((field.name for field in attrs.fields(HeartbeatHeader)), 0)
        fields |= {"magic": MAGIC, "version": VERSION, "guest": 1, "rate_hz": 1000, "tsc_khz": 1000, "period_tsc": 1000}
        fields |= {"ring_address": self.RING, "ring_entries": 16, "head": len(times)}
        self._header = HeartbeatHeader.LAYOUT.pack(*fields.values())
        ring = bytearray(16 * 16)
        for number, at in enumerate(times):
            slot = number % 16 * 16
            ring[slot + 8 : slot + 16] = int(at * 1000).to_bytes(8, "little")
        self._ring = bytes(ring)

    def __call__(self, address: int, size: int) -> bytes:
        if address == HEADER_ADDRESS:
            return self._header[:size]
        return self._ring[address - self.RING : address - self.RING + size]


def test_the_gap_of_the_pause_is_told_from_the_others() -> None:
    clock = TickClock()
    assert clock.sample(TickingRam(0, 1, 2), 5_000_002.25) == 3
    assert clock.sample(TickingRam(0, 1, 2, 3), 5_000_003.5) == 4
    ticks = TickingRam(0, 1, 2, 3, 12, 13, 18, 19)
    assert clock.gaps(ticks, 5_000_014.5, 5_000_016.5) == (5.0, 9.0)


def test_a_guest_that_has_not_ticked_has_no_clock_yet() -> None:
    assert TickClock().sample(TickingRam(), 1.0) == 0
