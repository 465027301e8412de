"""A stream of bytes, cut into lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

from vmm.errors import MalformedRequest

if TYPE_CHECKING:
    from collections.abc import Iterator


@final
class LineReader:
    """Holds at most `limit` bytes of a line whose end has not come."""

    def __init__(self, limit: int, *, overlong: bool = False) -> None:
        """With `overlong`, begin in the middle of a line that is too long already."""
        self._limit: Final = limit
        self._begun = bytearray()
        self._overlong = overlong

    @property
    def begun(self) -> bytes:
        """What has come of a line whose end has not; nothing of one that is too long."""
        return bytes(self._begun)

    @property
    def overlong(self) -> bool:
        """Whether the line whose end has not come is too long."""
        return self._overlong

    def feed(self, data: bytes) -> Iterator[bytes | MalformedRequest]:
        """Yield each line that `data` ends, without its end; for one that is too long, an error in its place."""
        *whole, rest = data.split(b"\n")
        for part in whole:
            self._begin(part)
            line, self._begun = bytes(self._begun), bytearray()
            overlong, self._overlong = self._overlong, False
            yield self._error() if overlong else line.removesuffix(b"\r")
        self._begin(rest)

    def _begin(self, part: bytes) -> None:
        if self._overlong or len(self._begun) + len(part) > self._limit:
            self._overlong = True
            self._begun.clear()
        else:
            self._begun += part

    def _error(self) -> MalformedRequest:
        return MalformedRequest(reason=f"A line is longer than {self._limit} bytes, which is the most it may have")
