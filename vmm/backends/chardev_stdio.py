"""A chardev on the VMM's standard input and output.

On a terminal it is raw, so that every key reaches the guest, and Ctrl-A is the way to reach us; keys are read even
while the guest takes none, or a guest that hangs could not be left. From a pipe or a file bytes are data: none has a
meaning here, and none is read before the guest wants it.
"""

from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING, ClassVar, Final, Literal, final

import attrs

from vmm import terminals
from vmm.backends.chardev import READ_LIMIT, Chardev
from vmm.backends.chardev_watch import poll

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.backends.chardev import Complain
    from vmm.backends.chardev_options import ChardevKind
    from vmm.backends.chardev_state import ChardevState

HELP: Final = (
    b"\r\nCtrl-A X       end the machine and leave\r\n"
    b"Ctrl-A H       print this\r\n"
    b"Ctrl-A Ctrl-A  send Ctrl-A to the guest\r\n"
)

_ESCAPE: Final = 0x01
_TYPE_AHEAD: Final = 4096
"""Bytes typed that the guest has not taken; further ones are lost, as on any terminal (Linux N_TTY_BUF_SIZE)."""
_WRITE_LIMIT: Final = 4096
"""Bytes written at once: a pipe that polls as writable has room for these, even if it blocks (pipe(7), PIPE_BUF)."""


@final
@attrs.define
class EscapeKeys:
    """Finds Ctrl-A and what follows it among keys typed."""

    pending: bool = False
    """Ctrl-A was the last key."""

    def split(self, keys: bytes) -> tuple[bytes, list[Literal["leave", "help"]]]:
        """Return the guest's share of `keys`, and what the rest asks for. Ctrl-A and an unknown key ask for nothing."""
        if not self.pending and _ESCAPE not in keys:
            return keys, []
        plain = bytearray()
        wishes: list[Literal["leave", "help"]] = []
        for key in keys:
            if not self.pending:
                if key == _ESCAPE:
                    self.pending = True
                else:
                    plain.append(key)
                continue
            self.pending = False
            if key == _ESCAPE:
                plain.append(key)
            elif key in b"xX":
                wishes.append("leave")
            elif key in b"hH?":
                wishes.append("help")
        return bytes(plain), wishes


@final
class StdioChardev(Chardev):
    """Standard input and output. The end of input, or of who reads the output, is not the end of the machine."""

    kind: ClassVar[ChardevKind] = "stdio"

    def __init__(
        self,
        label: str,
        source: int,
        sink: int,
        complain: Complain,
        on_escape: Callable[[], None],
        *,
        signals: bool = False,
        inherited: bool = False,
    ) -> None:
        """Own `source` and `sink`, made by `terminals.open_private`. Ctrl-A X calls `on_escape`, on the loop."""
        super().__init__(label, complain, inherited=inherited)
        self._source = source
        self._sink = sink
        self._on_escape = on_escape
        self._signals = signals
        self._keys = EscapeKeys()
        self._terminal: terminals.RawTerminal | None = None
        self._original = b""
        """Settings of the terminal, if it is one, before it was made raw; by whom does not matter."""
        self._input_is_over = False
        self._reader_is_gone = False
        self._watch.add(source)
        self._watch.add(sink, reads=False)

    @property
    def filename(self) -> str:
        return "stdio"

    def descriptors(self) -> dict[str, int]:
        return {} if self.surrendered else {"input": self._source, "output": self._sink}

    def surrender_streams(self) -> tuple[int, int]:
        """Give input and output away: the descriptors are the caller's from here on. At rest, and only once.

        A terminal is put back as it was: whoever types lines wants to see and to edit them.
        """
        assert self._quiesced
        assert not self.surrendered
        self.surrendered = True
        if self._terminal is not None:
            self._terminal.restore()
            self._terminal, self._original = None, b""
        for fd in (self._source, self._sink):
            self._watch.remove(fd)
        return self._source, self._sink

    def pending(self) -> ChardevState:
        return attrs.evolve(super().pending(), escape=self._keys.pending, terminal=self._original)

    def _load(self, pending: ChardevState) -> None:
        self._keys.pending = pending.escape
        self._original = pending.terminal

    def _begin(self) -> None:
        if os.isatty(self._source):
            self._terminal = terminals.raw_terminal(self._source, signals=self._signals)
            self._original = self._terminal.original

    def _own_terminal(self) -> None:
        # Not before it is ours: whoever holds a RawTerminal restores it at the latest when the interpreter exits.
        if self._original and self._terminal is None:
            self._terminal = terminals.RawTerminal(self._source, self._original)

    def _open_output(self) -> None:
        self._own_terminal()
        if self._reader_is_gone:
            self._output.drop()
        else:
            self._output.keep()

    def _step(self) -> bool:
        read = self._read_some()
        return self._write_some() or read

    def _read_some(self) -> bool:
        fed = self._feed()
        if self._input_is_over:
            return fed
        if self._original:
            limit = READ_LIMIT
        elif self._input:
            return fed
        else:
            limit = min(self._room(), READ_LIMIT)
        data = self._read(limit) if limit > 0 else None
        if data is None:
            return fed
        if not data:
            self._input_is_over = True
            self._watch.remove(self._source)
        if self._original:
            data, wishes = self._keys.split(data)
            for wish in wishes:
                if wish == "leave":
                    self._on_escape()
                else:
                    self._output.put(HELP)
        self._input += data[: max(0, _TYPE_AHEAD - len(self._input))]
        self._feed()
        return True

    def _read(self, limit: int) -> bytes | None:
        """Return what there is, empty at the end; None if there is nothing yet."""
        if os.get_blocking(self._source) and not poll(self._source) & (select.POLLIN | select.POLLHUP | select.POLLERR):
            return None
        try:
            return os.read(self._source, limit)
        except BlockingIOError:
            return None
        except OSError:  # EIO: the terminal was hung up
            return b""

    def _write_some(self) -> bool:
        if not self._output.held:
            return False
        if os.get_blocking(self._sink) and not poll(self._sink) & (select.POLLOUT | select.POLLHUP | select.POLLERR):
            self._watch.wants_room(self._sink, True)
            return False
        return self._write_to(self._sink, _WRITE_LIMIT)

    def _write_failed(self, error: OSError) -> None:
        super()._write_failed(error)
        if isinstance(error, BrokenPipeError):
            self._reader_is_gone = True
            self._output.drop()

    def _release(self, *, owner: bool) -> None:
        if self.surrendered:
            return
        if owner:
            self._own_terminal()
        if self._terminal is not None:
            if owner:
                self._terminal.restore()
            else:
                self._terminal.leave()
        for fd in (self._source, self._sink):
            self._watch.remove(fd)
            os.close(fd)
