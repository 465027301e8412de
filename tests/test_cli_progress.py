"""What is shown of a migration while it is under way: on a terminal, and where nobody watches."""

from __future__ import annotations

import io
import os
import pty
import re
import sys
import termios
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.terminal import Screen
from vmm.cli_progress import LINES, Bar, Figures, sentence, size
from vmm.migration.status import SOURCE_STEPS, MigrationRamStats
from vmm.monitor.arguments import unstructure

if TYPE_CHECKING:
    from collections.abc import Generator

MIB: Final = 1 << 20
HALF: Final = Figures(
    word="copying", done=660 * MIB, total=1024 * MIB, left=364 * MIB, moved=800 * MIB, dirtied=39 * MIB, number=3,
    pause=12,
)  # fmt: skip


class Shown:
    """A bar, and the terminal that it is on."""

    def __init__(self, columns: int = 100, *, terminal: bool = True, colours: bool = False, signs: bool = True) -> None:
        self.now = 0.0
        self.columns = columns
        self.out = io.StringIO()
        self.bar = Bar(
            self.out, terminal=terminal, colours=colours, signs=signs, columns=lambda: self.columns,
            clock=lambda: self.now,
        )  # fmt: skip

    def after(self, seconds: float, figures: Figures) -> str:
        """Show `figures` after so long; return what is written then."""
        self.now += seconds
        before = self.out.tell()
        self.bar.show(figures)
        return self.out.getvalue()[before:]

    def line(self, seconds: float, figures: Figures) -> str:
        """Return what the line shows then."""
        screen = Screen(self.columns)
        screen.feed(self.after(seconds, figures))
        return "".join(screen.rows)


# --- the line that moves ----------------------------------------------------------------------------------------


def test_it_shows_the_word_the_bar_and_the_figures() -> None:
    shown = Shown(120)
    shown.after(0, Figures(word="copying", total=1024 * MIB, left=1024 * MIB))
    assert shown.line(1, HALF) == (
        "copying      ━━━━━━━━━━━━━━━━━━┈┈┈┈┈┈┈┈┈┈  64%   800 MiB/s   364 MiB left    pause ~12 ms    dirtied 39 MiB/s"
        "    pass 3"
    )


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (3, " 6"),
        (8, " 64%"),
        (20, "copying       64%"),
        (30, "copying       64%   800 MiB/s"),
        (40, "copying      ━━━━━━━━━━━━━╸┈┈┈┈┈┈┈  64%"),
        (60, "copying      ━━━━━━━━━┈┈┈┈┈  64%   800 MiB/s   364 MiB left"),
        (80, "copying      ━━━━━━━━━━━╸┈┈┈┈┈┈  64%   800 MiB/s   364 MiB left    pause ~12 ms"),
    ],
)
def test_a_narrow_terminal_has_what_matters_most(columns: int, line: str) -> None:
    shown = Shown(columns)
    shown.after(0, Figures(word="copying", total=1024 * MIB, left=1024 * MIB))
    assert shown.line(1, HALF) == line


bytes_of = st.integers(0, 1 << 50)


@given(st.data(), st.integers(1, 200), st.booleans(), st.booleans())
def test_whatever_the_figures_are_it_stays_in_one_line(
    data: st.DataObject, columns: int, colours: bool, signs: bool
) -> None:
    shown = Shown(columns, colours=colours, signs=signs)
    for _ in range(3):
        total = data.draw(bytes_of)
        figures = Figures(
            word=data.draw(st.sampled_from(["connecting", "copying", "reconnecting"])),
            done=data.draw(st.integers(0, total)), total=total, left=data.draw(st.none() | bytes_of),
            moved=data.draw(bytes_of), dirtied=data.draw(st.none() | bytes_of),
            number=data.draw(st.none() | st.integers(1, 10_000_000)),
            pause=data.draw(st.none() | st.integers(0, 1 << 40)),
        )  # fmt: skip
        assert len(shown.line(data.draw(st.floats(0.01, 10)), figures)) < max(columns, 2)


@pytest.mark.parametrize(
    ("left", "text"),
    [
        (0, ""),
        (1, "~1 s to go"),
        (99 * 800 * MIB, "~99 s to go"),
        (100 * 800 * MIB, "~2 min to go"),
        (6000 * 800 * MIB, "~2 h to go"),
        (360_000 * 800 * MIB, ""),
    ],
)
def test_where_no_pause_is_to_be_expected_there_is_the_time_that_is_left(left: int, text: str) -> None:
    shown = Shown(80)
    shown.after(0, Figures(word="loading", total=1 << 60))
    line = shown.line(1, Figures(word="loading", done=1, total=1 << 60, left=left, moved=800 * MIB))
    assert line.partition(" left")[2].strip() == text
    figures = Figures(word="loading", done=1, total=1 << 60, left=left)
    assert sentence(figures, 800 * MIB).partition(" left")[2].strip(", ") == text


def test_nothing_jumps_when_a_figure_comes_or_goes() -> None:
    shown = Shown(100)
    shown.after(0, HALF)
    begins = {shown.line(0.1, figures).index("64%") for figures in (HALF, HALF, Figures(
        word="switching", done=660 * MIB, total=1024 * MIB, left=364 * MIB, moved=900 * MIB,
    ))}  # fmt: skip
    assert len(begins) == 1


def test_of_a_hundred_percent_nothing_is_left() -> None:
    assert Figures(word="copying", done=1024 * MIB - 1, total=1024 * MIB).percent == 99
    assert Figures(word="copying", done=1024 * MIB, total=1024 * MIB).percent == 100


def test_the_rate_is_that_of_the_last_moments() -> None:
    shown = Shown(120)
    moved = 0
    for _ in range(40):
        moved += 100 * MIB
        shown.after(0.1, Figures(word="copying", done=1, total=1 << 40, moved=moved))
    for _ in range(40):
        moved += 10 * MIB
        line = shown.line(0.1, Figures(word="copying", done=1, total=1 << 40, moved=moved))
    assert "   100 MiB/s" in line
    # What begins anew, such as another pass of a load, has no negative rate.
    assert "/s" not in shown.line(0.1, Figures(word="copying", done=1, total=1 << 40, moved=0))


def test_a_terminal_without_signs_has_a_bar_of_letters() -> None:
    shown = Shown(60, signs=False)
    shown.after(0, Figures(word="copying", total=1024 * MIB))
    assert shown.line(1, HALF) == "copying      [#########...]  64%   800 MiB/s   364 MiB left"


def test_colours_are_those_of_a_terminal_and_change_no_column() -> None:
    plain, coloured = Shown(100), Shown(100, colours=True)
    for shown in (plain, coloured):
        shown.after(0, Figures(word="copying", total=1024 * MIB))
    text = coloured.after(1, HALF)
    assert re.sub(r"\x1b\[\d*m", "", text).replace("┈", "━").rstrip() == "\r\x1b[K" + plain.line(1, HALF).replace(
        "┈", "━"
    )
    assert "\x1b[32m━" in text
    assert text.count("\x1b[0m") == len(re.findall(r"\x1b\[[1-9]\d*m", text))


def test_a_sentence_comes_above_it_and_the_end_takes_it_away() -> None:
    shown = Shown(60)
    with shown.bar:
        shown.after(0, HALF)
        shown.bar.say("it cannot be called off: no")
        shown.after(0.1, HALF)
        screen = Screen(60)
        screen.feed(shown.out.getvalue())
        assert screen.rows[0] == "trio-vmm: it cannot be called off: no"
        assert screen.rows[1].startswith("copying ")
    screen = Screen(60)
    screen.feed(shown.out.getvalue())
    assert screen.rows == ["trio-vmm: it cannot be called off: no"]


# --- where nobody watches ---------------------------------------------------------------------------------------


def test_without_a_terminal_there_is_a_whole_line_every_few_seconds() -> None:
    shown = Shown(terminal=False)
    assert shown.after(LINES - 0.1, HALF) == ""
    assert shown.after(0.2, HALF) == (
        "trio-vmm: copying: 64% of 1.0 GiB, 364 MiB left, the guest dirties 39 MiB/s, pass 3, "
        "its pause would be about 12 ms\n"
    )
    assert shown.after(LINES / 2, HALF) == ""
    assert shown.after(LINES / 2, Figures(word="connecting")) == "trio-vmm: connecting\n"


def test_a_rate_is_in_the_sentence_too() -> None:
    assert sentence(Figures(word="copying", done=1, total=4), 1 << 30) == "copying: 25% of 4 B, 1.0 GiB/s"
    assert sentence(Figures(word="copying", total=4, pause=30_000), None).endswith("its pause would be about 30 s")


def test_who_is_not_wanted_says_nothing() -> None:
    bar = Bar.on_stderr(wanted=False)
    with bar:
        bar.show(HALF)
        bar.say("nothing")


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_nobody_to_write_to_any_more_disturbs_nothing() -> None:
    with Bar(Broken(), terminal=True) as bar:
        bar.show(HALF)
        bar.show(HALF)
        bar.say("nothing")


# --- what query-migrate says ------------------------------------------------------------------------------------


def info(status: str, **ram: Any) -> dict[str, Any]:
    reply: Any = unstructure(MigrationRamStats(**ram))
    return {"status": status, "ram": reply, "expected-downtime": 12}


def test_figures_are_those_of_the_reply() -> None:
    reply = info(
        "active", total=1024 * MIB, remaining=364 * MIB, transferred=800 * MIB, dirty_pages_rate=39 * 256,
        dirty_sync_count=3,
    )  # fmt: skip
    assert Figures.of(reply) == HALF
    assert Figures.of({**reply, "status": "device"}).pause is None
    assert Figures.of({"status": "setup"}) == Figures(word="connecting")
    assert Figures.of(info("active")) == Figures(word="copying")


def test_each_status_of_a_migration_has_a_word() -> None:
    words = {status.value: Figures.of({"status": status.value}).word for status in SOURCE_STEPS}
    own = {name for name, word in words.items() if name == word}
    assert own == {"none", "failing", "failed", "cancelled", "completed"}


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 KiB"), (10_188, "9.9 KiB"), (10_189, "10 KiB"), (1023 << 10, "1.0 MiB"),
     (64 << 20, "64 MiB"), (3 << 29, "1.5 GiB"), (12 << 40, "12 TiB")],
)  # fmt: skip
def test_a_size_has_two_or_three_figures_and_a_unit(count: int, text: str) -> None:
    assert size(count) == text


# --- a pseudo terminal ------------------------------------------------------------------------------------------


@contextmanager
def standard_error(columns: int, monkeypatch: pytest.MonkeyPatch) -> Generator[tuple[int, int], None, None]:
    """Make standard error a terminal of so many columns; yield both its ends."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal, os.fdopen(ours, "rb", buffering=0):
        monkeypatch.setattr(sys, "stderr", terminal)
        yield ours, theirs


@pytest.mark.usefixtures("no_leaks")
def test_a_terminal_is_found_and_followed_when_its_width_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    with standard_error(120, monkeypatch) as (ours, theirs):
        with Bar.on_stderr() as bar:
            widths = []
            for columns in (120, 50, 80):
                termios.tcsetwinsize(theirs, (24, columns))
                bar.show(HALF)
                text = os.read(ours, 65536).decode()
                assert "\x1b[32m━" in text
                screen = Screen(columns)
                screen.feed(text)
                widths.append(len(screen.rows[0]))
            assert widths[1] < 50 <= widths[2] < 80 <= widths[0] < 120
        assert os.read(ours, 65536) == b"\r\x1b[K"


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize(("name", "value", "moves"), [("NO_COLOR", "1", True), ("TERM", "dumb", False)])
def test_a_terminal_can_be_told_to_have_less(
    name: str, value: str, moves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv(name, value)
    with standard_error(80, monkeypatch) as (ours, _):
        with Bar.on_stderr() as bar:
            bar.show(HALF)
            bar.say("done")
        text = os.read(ours, 65536).decode()
        assert "\x1b[3" not in text
        assert ("━" in text) is moves
        assert text.endswith("trio-vmm: done\r\n")
