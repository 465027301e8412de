"""How `trio-vmm demo` writes: headings, commands, phases and one line that moves. Knows nothing of machines."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, Final, final

import attrs

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TextIO

BOLD: Final = "1"
DIM: Final = "2"
RED: Final = "31"
GREEN: Final = "32"
YELLOW: Final = "33"
CYAN: Final = "36"

WIDTH: Final = 80
_NAMES: Final = 12
"""Columns that the name of a phase takes, with a blank."""


@final
@attrs.frozen
class Marks:
    """The signs of a phase that opens, of one that closes, and of a command that a monitor gets."""

    opens: str
    closes: str
    command: str


_SIGNS: Final = Marks("\N{BLACK CIRCLE}", "\N{WHITE CIRCLE}", "\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}")
_LETTERS: Final = Marks("+", "-", ">")


@final
class Screen:
    """Writes to one stream, at most `WIDTH` columns; on a terminal with colours and a line that moves."""

    def __init__(self, out: TextIO, *, colours: bool, terminal: bool, width: int = WIDTH) -> None:
        self._out = out
        self._colours = colours
        self._width = width
        self._moving = False
        self.is_terminal: Final = terminal
        """Whether somebody watches, who wants to follow."""
        self.marks: Final = _SIGNS if colours and "utf" in (out.encoding or "").lower() else _LETTERS

    @classmethod
    def on_stdout(cls, *, plain: bool) -> Screen:
        """Return the screen of this process. `plain`, or an environment variable NO_COLOR, takes the colours away."""
        terminal = sys.stdout.isatty()
        colours = terminal and not plain and not os.environ.get("NO_COLOR")
        width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
        return cls(sys.stdout, colours=colours, terminal=terminal, width=max(width, 60))

    def paint(self, text: str, *codes: str) -> str:
        """Return `text` in colour, where there are colours."""
        return f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if self._colours and codes and text else text

    def line(self, text: str = "", *codes: str) -> None:
        """Write one line, whole, in place of the moving one."""
        if self._moving:
            self._out.write("\r\x1b[K")
            self._moving = False
        self._out.write(f"{self.paint(text, *codes)}\n")
        self._out.flush()

    def live(self, text: str) -> None:
        """Show `text` in a line that the next one replaces. Nothing is shown where nobody watches."""
        if self.is_terminal:
            self._out.write(f"\r\x1b[K  {text}")
            self._out.flush()
            self._moving = True

    def heading(self, text: str) -> None:
        """Begin a part."""
        self.line()
        self.line(text, BOLD)

    def text(self, text: str, *codes: str) -> None:
        """Write a sentence, over as many lines as it takes."""
        for line in textwrap.wrap(text, self._width - 2, break_on_hyphens=False):
            self.line(f"  {self.paint(line, *codes)}")

    def command(self, sign: str, text: str) -> None:
        """Write a command, as somebody would type or send it."""
        first, *rest = textwrap.wrap(text, self._width - 4, break_on_hyphens=False, break_long_words=False)
        self.line(f"  {self.paint(sign, DIM)} {self.paint(first, CYAN)}")
        for line in rest:
            self.line(f"    {self.paint(line, CYAN)}")

    def opened(self, phases: Sequence[str], text: str, *, margin: str = "  ") -> None:
        """Say that phases have opened. `margin` stands at the left of the first line."""
        self._row(margin, self.marks.opens, phases, text, (GREEN,), (BOLD,), ())

    def closed(self, phases: Sequence[str], text: str, *, margin: str = "  ") -> None:
        """Say that phases, or their windows, have closed."""
        self._row(margin, self.marks.closes, phases, text, (DIM,), (DIM,), (DIM,))

    def event(self, name: str, text: str, *, margin: str = "  ") -> None:
        """Say that something else has happened."""
        self._row(margin, " ", (name,), text, (), (YELLOW,), ())

    def _row(
        self,
        margin: str,
        mark: str,
        names: Sequence[str],
        text: str,
        mark_codes: tuple[str, ...],
        name_codes: tuple[str, ...],
        text_codes: tuple[str, ...],
    ) -> None:
        head = f" {self.paint(mark, *mark_codes)} ".join(self.paint(name, *name_codes) for name in names)
        length = len(f" {mark} ".join(names))
        column = len(margin) + 2 + _NAMES
        lead = max(length + 1 + (len(names) > 1), _NAMES)
        first, *rest = textwrap.wrap(
            text, self._width - column, initial_indent=" " * (lead - _NAMES), break_on_hyphens=False
        ) or [""]
        first = first[lead - _NAMES :]
        blanks = " " * (lead - length) if first else ""
        row = f"{self.paint(margin, DIM)}{self.paint(mark, *mark_codes)} {head}{blanks}{self.paint(first, *text_codes)}"
        self.line(row)
        for line in rest:
            self.line(f"{' ' * column}{self.paint(line, *text_codes)}")
