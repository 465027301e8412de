"""Terminals and ptys of the host: opened, made raw, and put back as they were."""

from __future__ import annotations

import atexit
import fcntl
import os
import signal
import stat
import struct
import termios
from contextlib import suppress
from typing import TYPE_CHECKING, Final, final

from vmm.errors import HostFileRefused
from vmm.hostio import dup, refused

if TYPE_CHECKING:
    from types import TracebackType

_TERMIOS: Final = struct.Struct("<6I32s")

TERMINAL_SETTINGS_SIZE: Final = _TERMIOS.size
"""Bytes of a terminal's settings, packed: flags for input, output, control and local, two speeds, 32 characters."""


def open_pty() -> tuple[int, str]:
    """Make a pty in raw mode. Returns its master, which does not block, and the path of its slave, which is closed.

    Raises:
        HostFileRefused: the host has no pty left.
    """
    try:
        master, slave = os.openpty()
    except OSError as error:
        raise refused("create", "a pty", error) from error
    try:
        # Settings stay with a pty as long as its master is open. With its echo on, what the guest says would come back
        # to the guest as input.
        termios.tcsetattr(slave, termios.TCSANOW, _raw(termios.tcgetattr(slave), signals=False, translate=False))
        os.set_blocking(master, False)
        return master, os.ttyname(slave)
    except (OSError, termios.error) as error:
        os.close(master)
        reason = os.strerror(error.args[0])
        raise HostFileRefused(action="set up", path="a pty", reason=reason) from error
    finally:
        # Once it has been open and closed, the master polls as hung up; before that it does not (Linux, pty_close).
        os.close(slave)


def open_private(fd: int) -> int:
    """Open once more what our standard stream `fd` is, so that it can be made not to block.

    Whether a file blocks is shared by all who inherited it, and a shell, or our own stderr, would not expect it. Where
    the host does not let a terminal or pipe be opened again, and for all other kinds of file, the result is a duplicate
    that may block.

    Raises:
        HostFileRefused: `fd` is not open.
    """
    copy = dup(fd)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISFIFO(mode) and not os.isatty(fd):
        return copy
    access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    try:
        private = os.open(f"/proc/self/fd/{fd}", access | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return copy
    os.close(copy)
    return private


@final
class RawTerminal:
    """A terminal in raw mode, and how to undo it. A context manager that does."""

    def __init__(self, fd: int, original: bytes) -> None:
        """Take charge of terminal `fd`, which is raw or about to be.

        `original` has the settings to restore, as the former holder's `original` said. `ValueError` if it does not.
        """
        self._fd = fd
        self.original: Final = original
        """The settings to restore, packed in `TERMINAL_SETTINGS_SIZE` bytes."""
        self._settings: Final = _unpack(original)
        self._raw = True
        atexit.register(self.restore)

    def restore(self) -> None:
        """Put the settings back. Only the first call does anything. A terminal that is gone is none to restore."""
        if self._raw:
            self.leave()
            # In the background we would be stopped for it, and leave the terminal as it is.
            old = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])
            try:
                with suppress(termios.error):
                    termios.tcsetattr(self._fd, termios.TCSANOW, self._settings)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, old)

    def leave(self) -> None:
        """Leave the terminal raw: from now on it is a successor's to restore."""
        self._raw = False
        atexit.unregister(self.restore)

    def __enter__(self) -> RawTerminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def raw_terminal(fd: int, *, signals: bool = False) -> RawTerminal:
    """Put terminal `fd` into raw mode: every key arrives at once and as it is, Ctrl-C too unless `signals`.

    What is written still gets its line ends translated, for the sake of messages by others on the same terminal.
    It is restored at the interpreter's exit, if not before. `fd` must stay open until then.

    Raises:
        HostFileRefused: `fd` is not a terminal.
    """
    try:
        settings = termios.tcgetattr(fd)
    except termios.error as error:
        reason = os.strerror(error.args[0])
        raise HostFileRefused(action="use as a terminal", path=f"descriptor {fd}", reason=reason) from error
    handle = RawTerminal(fd, _pack(settings))
    with suppress(termios.error):  # it was one just now; if it has been hung up since, its reader will notice
        termios.tcsetattr(fd, termios.TCSANOW, _raw(settings, signals=signals, translate=True))
    return handle


_Settings = list[int | list[bytes | int]]
"""What termios calls attributes: iflag, oflag, cflag, lflag, ispeed, ospeed, control characters."""


def _raw(settings: _Settings, *, signals: bool, translate: bool) -> _Settings:
    iflag, oflag, cflag, lflag, ispeed, ospeed, controls = settings
    assert isinstance(iflag, int)
    assert isinstance(oflag, int)
    assert isinstance(cflag, int)
    assert isinstance(lflag, int)
    assert isinstance(controls, list)
    iflag &= ~(
        termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP
        | termios.INLCR | termios.IGNCR | termios.ICRNL | termios.IXON
    )  # fmt: skip
    oflag = oflag | termios.OPOST if translate else oflag & ~termios.OPOST
    cflag = cflag & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    lflag &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN)
    if not signals:
        lflag &= ~termios.ISIG
    controls = list(controls)
    controls[termios.VMIN], controls[termios.VTIME] = 1, 0
    return [iflag, oflag, cflag, lflag, ispeed, ospeed, controls]


def _pack(settings: _Settings) -> bytes:
    *words, controls = settings
    assert isinstance(controls, list)
    characters = b"".join(bytes([item]) if isinstance(item, int) else item for item in controls)
    return _TERMIOS.pack(*words, characters)


def _unpack(packed: bytes) -> _Settings:
    """Undo `_pack`. Raises `ValueError` if `packed` is not of its making."""
    if len(packed) != _TERMIOS.size:
        raise ValueError(f"{len(packed)} bytes are no terminal settings, which have {_TERMIOS.size}")
    *words, characters = _TERMIOS.unpack(packed)
    return [*words, [characters[i : i + 1] for i in range(len(characters))]]
