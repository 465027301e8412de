#!/usr/bin/env python3
"""Records `trio-vmm demo` as docs/demo.svg: runs it in a pseudo-terminal and draws what the terminal shows, as it came.

    .venv/bin/python scripts/record_demo.py [OUTPUT.svg]

The picture is one file without scripts, fonts or links. Where animations are not wanted, or not understood, it shows
the end. Understood here are the control sequences that the demo uses, and no others.
"""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios
import time
from html import escape
from pathlib import Path
from typing import Final

import attrs

ROOT: Final = Path(__file__).resolve().parent.parent
COLUMNS: Final = 80
ROWS: Final = 41
"""Rows that the picture shows; as on a terminal, the last ones."""

CELL: Final = 8.4
LINE: Final = 18.0
MARGIN: Final = 18.0
HOLD: Final = 9.0
"""Seconds that the end stays before it begins anew."""

TICK: Final = 0.04
"""Seconds; what comes closer together is shown together."""

BACKGROUND: Final = "#10151c"
COLOURS: Final = {
    "": "#d5dbe3", "31": "#ff7b72", "32": "#6bd66f", "33": "#e3b341", "36": "#6cb6ff", "2": "#7d8794", "1": "#ffffff",
}  # fmt: skip
_PIECES: Final = re.compile(r"\x1b\[([0-9;]*)([A-Za-z])|(\r\n|\r|\n)|([^\x1b\r\n]+)")

Span = tuple[str, str]
"""Text, and its codes."""


@attrs.define
class Row:
    """One row of the terminal, and what stood in it from when to when."""

    spans: list[Span] = attrs.Factory(list)
    since: float = 0.0
    past: list[tuple[float, float, list[Span]]] = attrs.Factory(list)

    def shows(self, spans: list[Span], now: float) -> None:
        """Note what the row shows from `now` on."""
        if spans != self.spans:
            if self.spans:
                self.past.append((self.since, now, self.spans))
            self.spans, self.since = spans, now


class Terminal:
    """As much of a terminal as the demo needs: lines that grow at their end, and one that is replaced."""

    def __init__(self) -> None:
        self.rows = [Row()]
        self._spans: list[Span] = []
        self._codes = ""
        self._rest = ""

    def feed(self, text: str, now: float) -> None:
        """Take output that came at `now`, in seconds since the beginning."""
        text = self._rest + text
        end = text.rfind("\x1b")
        whole = end < 0 or re.match(r"\x1b\[[0-9;]*[A-Za-z]", text[end:])
        text, self._rest = (text, "") if whole else (text[:end], text[end:])
        for codes, final, control, plain in _PIECES.findall(text):
            if final == "m":
                self._codes = "" if codes in ("", "0") else codes
            elif final == "K" or control == "\r":
                self._spans = []
            elif final:
                raise SystemExit(f"record_demo: control sequence ESC [ {codes} {final} is not known here")
            elif control:
                self.rows[-1].shows(self._spans, now)
                self.rows.append(Row(since=now))
                self._spans = []
            else:
                self._spans = [*self._spans, (plain, self._codes)]
        if self._spans:
            self.rows[-1].shows(self._spans, now)


def record() -> tuple[Terminal, float]:
    """Run the demo and return what it showed, and how long it took."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (ROWS, COLUMNS))
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONUTF8": "1"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "vmm", "demo"], stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=environment
    )
    os.close(theirs)
    terminal = Terminal()
    began = time.monotonic()
    decoded = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # EIO: nobody has the other end any more
            break
        decoded += data
        try:
            text, decoded = decoded.decode(), b""
        except UnicodeDecodeError:  # in the middle of a character
            continue
        now = time.monotonic() - began
        terminal.feed(text, round(now / TICK) * TICK)
    os.close(ours)
    if process.wait() != 0:
        raise SystemExit(f"record_demo: the demo ended with status {process.returncode}, and is not recorded")
    while terminal.rows and not terminal.rows[-1].spans:
        terminal.rows.pop()
    return terminal, time.monotonic() - began


def draw(terminal: Terminal, lasted: float) -> str:
    """Return the picture."""
    period = lasted + HOLD
    style: list[str] = []
    names: dict[tuple[float, float | None], str] = {}

    def percent(at: float) -> str:
        return f"{100 * at / period:.2f}%"

    def animation(since: float, until: float | None) -> str:
        """Return the class of what is there from `since` to `until`, or to the end."""
        if (since, until) not in names:
            name = names[since, until] = f"t{len(names)}"
            gone = f"{percent(until)},100%{{opacity:0}}" if until is not None else ""
            style.append(f"@keyframes {name}{{0%{{opacity:0}}{percent(since)}{{opacity:1}}{gone}}}")
            style.append(f".{name}{{animation-name:{name}}}")
        return names[since, until]

    body: list[str] = []
    for number, row in enumerate(terminal.rows):
        versions = [*((since, until, spans) for since, until, spans in row.past), (row.since, None, row.spans)]
        for since, until, spans in versions:
            if spans:
                kind = "r" if until is None else "r p"
                body.append(
                    f'<g class="{kind} {animation(since, until)}">{_spans(spans, MARGIN + (number + 0.75) * LINE)}</g>'
                )
    scroll = max(len(terminal.rows) - ROWS, 0)
    steps = [(0.0, 0)] + [(row.since, n) for n, row in enumerate(terminal.rows[ROWS - 1 :]) if n]
    moves = "".join(f"{percent(at)}{{transform:translateY({-n * LINE:g}px)}}" for at, n in steps)
    style.append(f"@keyframes s{{{moves}}}.s{{animation-name:s}}")
    width, height = COLUMNS * CELL + 2 * MARGIN, ROWS * LINE + 2 * MARGIN
    rules = "".join(f".c{codes.replace(';', '_')}{{fill:{COLOURS[codes]}}}" for codes in COLOURS if codes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="Recording of trio-vmm demo">\n'
        "<style>text{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;white-space:pre;"
        f"fill:{COLOURS['']}}}.b{{font-weight:bold}}{rules}.p{{opacity:0}}"
        f".s{{transform:translateY({-scroll * LINE:g}px)}}\n"
        f"@media (prefers-reduced-motion:no-preference){{.r,.s{{animation:{period:.2f}s step-end infinite}}\n"
        + "\n".join(style)
        + "}</style>\n"
        f'<rect width="{width:g}" height="{height:g}" rx="8" fill="{BACKGROUND}"/>\n'
        f'<svg x="0" y="{MARGIN:g}" width="{width:g}" height="{ROWS * LINE:g}" '
        f'viewBox="0 {MARGIN:g} {width:g} {ROWS * LINE:g}"><g class="s">\n' + "\n".join(body) + "\n</g></svg>\n</svg>\n"
    )


def _spans(spans: list[Span], y: float) -> str:
    """Draw one row. Each piece says how long it is, so that columns stay columns in whatever font there is."""
    drawn: list[str] = []
    column = 0
    for text, codes in spans:
        for piece in re.finditer(r"\S+(?: \S+)*", text):
            x = MARGIN + (column + piece.start()) * CELL
            kinds = codes.split(";") if codes else []
            classes = " ".join([*("b" for kind in kinds[:1] if kind == "1"), *(f"c{kind}" for kind in kinds[-1:])])
            attribute = f' class="{classes}"' if classes else ""
            length = len(piece.group()) * CELL
            drawn.append(
                f'<text x="{x:.1f}" y="{y:.1f}" textLength="{length:.1f}"{attribute}>{escape(piece.group())}</text>'
            )
        column += len(text)
    return "".join(drawn)


def main() -> None:
    """Record, and write the picture."""
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "demo.svg"
    output.write_text(draw(*record()))
    print(f"record_demo: wrote {output}")


if __name__ == "__main__":
    main()
