"""A source of bytes that a test feeds: a pty, whose slave is a character device with a path."""

from __future__ import annotations

import os
import pty
import tty
from contextlib import contextmanager
from typing import TYPE_CHECKING, final

import attrs

if TYPE_CHECKING:
    from collections.abc import Generator


@final
@attrs.frozen
class PseudoSource:
    """What is written to `feed` can be read at `path`; nothing else can."""

    master: int
    path: str

    def feed(self, data: bytes) -> None:
        """Let `data` be read."""
        assert os.write(self.master, data) == len(data)


@contextmanager
def pseudo_source() -> Generator[PseudoSource, None, None]:
    """Make one."""
    master, slave = pty.openpty()
    try:
        tty.setraw(slave)
        yield PseudoSource(master, os.ttyname(slave))
    finally:
        os.close(slave)
        os.close(master)
