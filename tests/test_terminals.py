"""Terminals and ptys of the host: real ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import termios
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vmm import host_fds, hostio, terminals
from vmm.errors import HostFileRefused

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("no_leaks")


def test_a_pty_is_raw_and_polls_as_hung_up_until_it_is_opened() -> None:
    master, name = terminals.open_pty()
    assert host_fds.pty_slave_name(master) == name
    assert not os.get_blocking(master)
    with pytest.raises(OSError, match="Input/output error"):
        os.read(master, 1)
    slave = os.open(name, os.O_RDWR | os.O_NOCTTY)
    assert not termios.tcgetattr(slave)[3] & (termios.ECHO | termios.ICANON | termios.ISIG)
    os.write(master, b"\n")
    assert os.read(slave, 10) == b"\n"
    os.close(slave)
    os.close(master)


@pytest.fixture
def terminal() -> Iterator[int]:
    """A terminal in the state in which a shell leaves it."""
    master, slave = os.openpty()
    yield slave
    os.close(slave)
    os.close(master)


@pytest.mark.parametrize("signals", [False, True])
def test_a_raw_terminal_is_put_back_as_it_was(terminal: int, signals: bool) -> None:
    before = termios.tcgetattr(terminal)
    with terminals.raw_terminal(terminal, signals=signals) as raw:
        now = termios.tcgetattr(terminal)
        assert not now[3] & (termios.ECHO | termios.ICANON)
        assert bool(now[3] & termios.ISIG) is signals
        assert now[1] & termios.OPOST, "messages of others keep their line ends"
        assert len(raw.original) == terminals.TERMINAL_SETTINGS_SIZE
    assert termios.tcgetattr(terminal) == before


def test_a_successor_puts_a_terminal_back(terminal: int) -> None:
    before = termios.tcgetattr(terminal)
    ours = terminals.raw_terminal(terminal)
    ours.leave()
    ours.restore()
    assert termios.tcgetattr(terminal) != before
    terminals.RawTerminal(terminal, ours.original).restore()
    assert termios.tcgetattr(terminal) == before


def test_a_terminal_that_is_gone_is_none_to_restore() -> None:
    master, slave = os.openpty()
    raw = terminals.raw_terminal(slave)
    os.close(master)
    raw.restore()
    os.close(slave)


def test_what_is_no_terminal_is_not_made_raw() -> None:
    source, sink = os.pipe()
    with pytest.raises(HostFileRefused) as caught:
        terminals.raw_terminal(source)
    assert str(caught.value) == (f"Cannot use as a terminal descriptor {source}: Inappropriate ioctl for device")
    os.close(source)
    os.close(sink)


def test_settings_that_are_none_are_refused(terminal: int) -> None:
    with pytest.raises(ValueError, match="3 bytes are no terminal settings, which have 56"):
        terminals.RawTerminal(terminal, b"abc")


def test_a_terminal_is_restored_when_the_interpreter_exits(terminal: int) -> None:
    before = termios.tcgetattr(terminal)
    script = "import os\nfrom vmm import terminals\nraw = terminals.raw_terminal(0)\nprint('raw')"
    child = subprocess.run(
        [sys.executable, "-c", script],
        stdin=terminal,
        stdout=subprocess.PIPE,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    assert child.stdout == b"raw\n"
    assert termios.tcgetattr(terminal) == before


def test_restoring_a_terminal_leaves_the_signal_mask_alone(terminal: int) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    terminals.raw_terminal(terminal).restore()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_a_private_terminal_does_not_make_the_shared_one_nonblocking(terminal: int) -> None:
    private = terminals.open_private(terminal)
    assert not os.get_blocking(private)
    assert os.get_blocking(terminal)
    assert not os.get_inheritable(private)
    os.close(private)


def test_a_private_pipe_does_not_make_the_shared_one_nonblocking() -> None:
    source, sink = os.pipe()
    private = terminals.open_private(sink)
    assert not os.get_blocking(private)
    assert os.get_blocking(sink)
    os.write(private, b"hello")
    assert os.read(source, 10) == b"hello"
    os.close(source)
    for fd in (private, terminals.open_private(sink)):  # the second: nobody reads, so it can't be opened again
        os.close(fd)
    os.close(sink)


def test_a_private_file_keeps_the_position(tmp_path: Path) -> None:
    shared = hostio.open_output_file(f"{tmp_path}/log", append=False)
    os.write(shared, b"one")
    private = terminals.open_private(shared)
    os.write(private, b"two")
    assert (tmp_path / "log").read_bytes() == b"onetwo"
    os.close(private)
    os.close(shared)
