"""How far a migration, a save or a load is, for people: one line that moves on a terminal, or a line now and then."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final, final

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from types import TracebackType
    from typing import TextIO

LOOKS: Final = 0.1
"""Seconds between two pictures of the line that moves."""

LINES: Final = 5.0
"""Seconds between two lines where nothing moves. What is over sooner has none."""

_BAR: Final = (12, 34)
"""Fewest and most columns of the bar itself."""

_SPAN: Final = 1.5
"""Seconds over which the rate is taken."""

_WORDS: Final[Mapping[str, str]] = {
    "setup": "connecting",
    "wait-unplug": "unplugging",
    "active": "copying",
    "pre-switchover": "waiting",
    "device": "switching",
    "postcopy-device": "switching",
    "postcopy-active": "fetching",
    "postcopy-paused": "cut off",
    "postcopy-recover-setup": "reconnecting",
    "postcopy-recover": "reconnecting",
    "cancelling": "calling off",
}
"""What each status of `query-migrate` is called here."""

_WORD: Final = max(map(len, _WORDS.values()))

_WIDTHS: Final[Mapping[str, int]] = {"rate": 10, "left": 13, "pause": 14, "dirtied": 18, "pass": 8}
"""What stands behind the percentage, what matters most first, and its columns."""

FIELDS: Final = tuple(_WIDTHS)

_BOLD, _DIM, _GREEN, _CYAN = "1", "2", "32", "36"


@final
@attrs.frozen(kw_only=True)
class Figures:
    """What there is to show at one moment. Bytes, and bytes per second; None is what is not known, and not shown."""

    word: str
    done: int = 0
    total: int = 0
    left: int | None = None
    moved: int = 0
    """Bytes that went over so far, those that went twice too: what the rate is made of."""
    dirtied: int | None = None
    """Bytes per second that the guest writes meanwhile."""
    number: int | None = None
    """Of the pass over RAM, from 1."""
    pause: int | None = None
    """Milliseconds that the guest would stand, as is estimated now. In its place stands the time that is left."""

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> Figures:
        """Make them from what `query-migrate` replies while a migration is under way."""
        status = str(info.get("status", "setup"))
        word, ram = _WORDS.get(status, status), info.get("ram")
        if ram is None or not ram["total"]:
            return cls(word=word)
        dirtied = ram.get("dirty-pages-rate", 0) * ram.get("page-size", 4096)
        number, pause = ram.get("dirty-sync-count", 0), info.get("expected-downtime", 0)
        return cls(
            word=word, done=ram["total"] - ram["remaining"], total=ram["total"], left=ram["remaining"],
            moved=ram["transferred"], dirtied=dirtied or None, number=number or None,
            pause=pause if pause and status == "active" else None,
        )  # fmt: skip

    @property
    def percent(self) -> int:
        """How much is done; 100 only once all is."""
        return min(self.done, self.total) * 100 // self.total if self.total else 0


@final
class Bar:
    """Shows how far something is, on standard error: nothing else is ever written there by this.

    A context manager: whatever comes, the line that moves is gone at the end of the block, so that a sentence can
    follow.

    Args:
        terminal: whether somebody watches. If not, a whole line is written every `LINES` seconds.
        colours, signs: whether the terminal has colours, and shows what is not ASCII.
        columns: how wide it is at this moment.
        fields: what there will be to show, besides how much is done: some of `FIELDS`.
    """

    def __init__(
        self,
        out: TextIO | None,
        *,
        terminal: bool = False,
        colours: bool = False,
        signs: bool = False,
        columns: Callable[[], int] = lambda: 80,
        fields: Collection[str] = FIELDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._out = out
        self._terminal = terminal
        self._colours = colours
        self._signs = signs
        self._columns = columns
        self._fields = fields
        self._clock = clock
        self._moving = False
        self._due = clock() + LINES
        self._moved: deque[tuple[float, int]] = deque()

    @classmethod
    def on_stderr(cls, *, wanted: bool = True, fields: Collection[str] = FIELDS) -> Bar:
        """Return that of this process, which shows nothing if it is not `wanted`, or if nobody can see it."""
        out = sys.stderr
        if not wanted or out is None:
            return cls(None)
        terminal = out.isatty() and os.environ.get("TERM") != "dumb"
        return cls(
            out,
            terminal=terminal,
            colours=terminal and not os.environ.get("NO_COLOR"),
            signs="utf" in (out.encoding or "").lower(),
            columns=lambda: _columns_of(out),
            fields=fields,
        )

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()

    @property
    def period(self) -> float:
        """Seconds after which it should be shown again."""
        return LOOKS if self._terminal else 1.0

    def show(self, figures: Figures) -> None:
        """Show `figures` in place of those before."""
        now = self._clock()
        rate = self._rate(now, figures.moved)
        if self._terminal:
            self._write(f"\r\x1b[K{self._picture(figures, rate)}")
            self._moving = True
        elif now >= self._due:
            self._due = now + LINES
            self._write(f"trio-vmm: {sentence(figures, rate)}\n")

    def say(self, text: str) -> None:
        """Write a whole line, above the one that moves."""
        self.clear()
        self._write(f"trio-vmm: {text}\n")

    def clear(self) -> None:
        """Take the line that moves away. Idempotent."""
        if self._moving:
            self._moving = False
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        if self._out is None:
            return
        try:
            self._out.write(text)
            self._out.flush()
        except (OSError, ValueError):  # nobody sees it any more; what is under way goes on
            self._out = None

    def _rate(self, now: float, moved: int) -> int | None:
        """Return the bytes per second of the last moments; None until something has moved."""
        if self._moved and moved < self._moved[-1][1]:
            self._moved.clear()
        self._moved.append((now, moved))
        while len(self._moved) > 2 and self._moved[1][0] <= now - _SPAN:
            self._moved.popleft()
        (since, before), (_, last) = self._moved[0], self._moved[-1]
        return round((last - before) / (now - since)) if now > since and last > before else None

    def _picture(self, figures: Figures, rate: int | None) -> str:
        """Return the line that moves: as much as the terminal has room for, what matters most first.

        What is not known yet has its columns all the same, so that nothing jumps.
        """
        room = self._columns() - 1  # what stands in the last column makes some terminals begin a new line
        if not figures.total:
            return self._paint(figures.word[: max(room, 0)], _BOLD)
        pieces = _pieces(figures, rate)
        fewest, most = _BAR
        used = len("100%")
        has_word = used + _WORD + 1 <= room
        used += _WORD + 1 if has_word else 0
        has_bar = used + 1 + fewest <= room
        used += 1 + fewest if has_bar else 0
        tail = ""
        for name, width in _WIDTHS.items():
            if name not in self._fields:
                continue
            if used + 2 + width > room:
                break
            used += 2 + width
            tail += f"  {self._paint(pieces[name][:width].rjust(width), _CYAN if name == 'rate' else '')}"
        percent = f"{figures.percent:3d}%"[: max(room, 0)]
        head = f"{self._paint(figures.word.ljust(_WORD), _BOLD)} " if has_word else ""
        bar = f"{self._bar(min(most, fewest + room - used), figures)} " if has_bar else ""
        return f"{head}{bar}{self._paint(percent, _BOLD)}{tail}".rstrip()

    def _bar(self, width: int, figures: Figures) -> str:
        halves = min(figures.done, figures.total) * 2 * width // figures.total
        whole, half = divmod(halves, 2)
        if not self._signs:
            return f"[{'#' * min(whole, width - 2)}{'.' * (width - 2 - min(whole, width - 2))}]"
        done, rest = f"{'━' * whole}{'╸' * half}", width - whole - half
        if self._colours:
            return self._paint(done, _GREEN) + self._paint("━" * rest, _DIM)
        return f"{done}{'┈' * rest}"

    def _paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colours and code and text else text


def _pieces(figures: Figures, rate: int | None) -> dict[str, str]:
    """Return what stands behind the percentage, by name; empty is what is not known."""
    return {
        "rate": f"{size(rate)}/s" if rate is not None else "",
        "left": f"{size(figures.left)} left" if figures.left is not None else "",
        "pause": f"pause ~{_time(figures.pause)}" if figures.pause is not None else _to_go(figures, rate),
        "dirtied": f"dirtied {size(figures.dirtied)}/s" if figures.dirtied is not None else "",
        "pass": f"pass {figures.number}" if figures.number is not None else "",
    }


def sentence(figures: Figures, rate: int | None) -> str:
    """Say the same in words."""
    if not figures.total:
        return figures.word
    pieces = [f"{figures.word}: {figures.percent}% of {size(figures.total)}"]
    if rate is not None:
        pieces.append(f"{size(rate)}/s")
    if figures.left is not None:
        pieces.append(f"{size(figures.left)} left")
    if figures.dirtied is not None:
        pieces.append(f"the guest dirties {size(figures.dirtied)}/s")
    if figures.number is not None:
        pieces.append(f"pass {figures.number}")
    if figures.pause is not None:
        pieces.append(f"its pause would be about {_time(figures.pause)}")
    elif to_go := _to_go(figures, rate):
        pieces.append(to_go)
    return ", ".join(pieces)


def _time(milliseconds: int) -> str:
    return f"{milliseconds} ms" if milliseconds < 10_000 else f"{milliseconds // 1000} s"


def _to_go(figures: Figures, rate: int | None) -> str:
    """Return how long it takes until nothing is left; empty is what is not known, or over."""
    if not figures.left or not rate:
        return ""
    seconds = -(-figures.left // rate)
    for unit, count in (("s", 1), ("min", 60), ("h", 3600)):
        if seconds < 100 * count:
            return f"~{-(-seconds // count)} {unit} to go"
    return ""


def size(count: int) -> str:
    """Return a number of bytes with a unit, in at most 8 characters."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1024
        units.pop(0)
    digits = 1 if value < 9.95 and units[0] != "B" else 0
    return f"{value:.{digits}f} {units[0]}"


def harmless(line: str) -> str:
    """Return a line without what a terminal would obey: what is in it may be anybody's."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in line)


def _columns_of(out: TextIO) -> int:
    # Not shutil's: that looks at standard output, which may be a file.
    try:
        return os.get_terminal_size(out.fileno()).columns or 80
    except (OSError, ValueError):
        return shutil.get_terminal_size((80, 24)).columns
