"""A terminal, as far as it shows what is written to it: one row for each line, with what a program overwrites in it."""

from __future__ import annotations

import re
from typing import Final, final

_PIECES: Final = re.compile(r"\x1b\[([0-9;]*)([A-Za-z])|(\r|\n)|([^\x1b\r\n])")


@final
class Screen:
    """Understands carriage return, line feed, colours and "erase to the end of the line"; all else is an error."""

    def __init__(self, columns: int = 10_000) -> None:
        self._columns = columns
        self._rows: list[list[str]] = [[]]
        self._at = 0
        self.pictures: list[str] = []
        """What the present row has shown, each time that it was overwritten."""

    def feed(self, text: str) -> None:
        """Take what a program writes."""
        assert not re.sub(_PIECES, "", text), f"not understood: {re.sub(_PIECES, '', text)!r}"
        for _, final_letter, control, character in _PIECES.findall(text):
            row = self._rows[-1]
            if final_letter == "K":
                if row:
                    self.pictures.append("".join(row))
                del row[self._at :]
            elif final_letter:
                assert final_letter == "m", final_letter
            elif control == "\r":
                self._at = 0
            elif control:
                self._rows.append([])
                self._at = 0
            else:
                assert self._at < self._columns, f"it runs over the edge: {''.join(row)}"
                row[self._at : self._at + 1] = [character]
                self._at += 1

    @property
    def rows(self) -> list[str]:
        """What is to be seen, without what follows the last line feed if that is nothing."""
        return ["".join(row) for row in (self._rows if self._rows[-1] else self._rows[:-1])]
