"""A chardev on standard input and output: pipes, files and terminals."""

from __future__ import annotations

import os
import termios
from typing import TYPE_CHECKING

import attrs
import pytest
import trio
import trio.testing

from tests.backends.chardev_kit import Complaints, Frontend, read_exactly, served
from vmm import hostio, terminals
from vmm.backends.chardev_state import BUFFER_LIMIT
from vmm.backends.chardev_stdio import HELP, EscapeKeys, StdioChardev

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@attrs.define
class Terminal:
    """A terminal as a user sees it, and the stdio of a process that runs on it."""

    screen: trio.lowlevel.FdStream
    stdio: int

    def settings(self) -> object:
        return termios.tcgetattr(self.stdio)


@pytest.fixture
async def terminal() -> AsyncIterator[Terminal]:
    master, slave = os.openpty()
    async with trio.lowlevel.FdStream(master) as screen:
        yield Terminal(screen, slave)
    os.close(slave)


@attrs.define
class Leaving:
    """Whether Ctrl-A X was typed."""

    event: trio.Event = attrs.Factory(trio.Event)

    def __call__(self) -> None:
        self.event.set()


@pytest.fixture
def leaving() -> Leaving:
    return Leaving()


def open_stdio(
    source: int, sink: int, complain: Complaints, leaving: Leaving, *, signals: bool = False
) -> StdioChardev:
    return StdioChardev(
        "serial0", terminals.open_private(source), terminals.open_private(sink), complain, leaving, signals=signals
    )


def on_terminal(terminal: Terminal, complain: Complaints, leaving: Leaving, *, signals: bool = False) -> StdioChardev:
    return open_stdio(terminal.stdio, terminal.stdio, complain, leaving, signals=signals)


# --- the keys ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "plain", "wishes"),
    [
        (b"root\n", b"root\n", []),
        (b"\x01x", b"", ["leave"]),
        (b"a\x01Xb", b"ab", ["leave"]),
        (b"\x01h\x01H\x01?", b"", ["help"] * 3),
        (b"a\x01\x01b", b"a\x01b", []),
        (b"\x01\x01\x01x", b"\x01", ["leave"]),
        (b"\x01qx", b"x", []),
        (b"\x03\x1a\x04", b"\x03\x1a\x04", []),
    ],
)
def test_what_follows_ctrl_a_is_ours(typed: bytes, plain: bytes, wishes: list[str]) -> None:
    assert EscapeKeys().split(typed) == (plain, wishes)
    keys = EscapeKeys()
    one_by_one = [keys.split(bytes([key])) for key in typed]
    assert b"".join(part for part, _ in one_by_one) == plain
    assert [wish for _, found in one_by_one for wish in found] == wishes


# --- a terminal -------------------------------------------------------------------------------------------


async def test_every_key_reaches_the_guest_at_once(
    terminal: Terminal, complain: Complaints, leaving: Leaving, frontend: Frontend
) -> None:
    before = terminal.settings()
    async with served(on_terminal(terminal, complain, leaving)) as chardev:
        chardev.attach(frontend)
        assert chardev.filename == "stdio"
        await terminal.screen.send_all(b"\x03\x1a\x04\r")
        assert await frontend.wait_received(4) == b"\x03\x1a\x04\r"
        chardev.put(b"hello")
        assert await read_exactly(terminal.screen, 5) == b"hello", "and no echo before it"
    assert terminal.settings() == before
    assert not leaving.event.is_set()


async def test_ctrl_a_x_leaves_even_if_the_guest_hangs(
    terminal: Terminal, complain: Complaints, leaving: Leaving, frontend: Frontend
) -> None:
    frontend.space = 0
    async with served(on_terminal(terminal, complain, leaving)) as chardev:
        chardev.attach(frontend)
        for _ in range(20):
            await terminal.screen.send_all(b"z" * 1000)
        await terminal.screen.send_all(b"\x01x")
        await leaving.event.wait()
        assert chardev.pending().input == b"z" * 4096, "as much as a terminal keeps"


async def test_ctrl_a_x_leaves_before_there_is_a_device(
    terminal: Terminal, complain: Complaints, leaving: Leaving, frontend: Frontend
) -> None:
    async with served(on_terminal(terminal, complain, leaving)) as chardev:
        await terminal.screen.send_all(b"early\x01x")
        await leaving.event.wait()
        chardev.attach(frontend)
        assert await frontend.wait_received(5) == b"early"


async def test_ctrl_a_h_prints_help(terminal: Terminal, complain: Complaints, leaving: Leaving) -> None:
    async with served(on_terminal(terminal, complain, leaving)):
        await terminal.screen.send_all(b"\x01h")
        expected = HELP.replace(b"\n", b"\r\n")  # the terminal's own translation is left on
        assert await read_exactly(terminal.screen, len(expected)) == expected


async def test_keys_typed_ahead_reach_a_slow_guest_in_order(
    terminal: Terminal, complain: Complaints, leaving: Leaving, frontend: Frontend
) -> None:
    frontend.space = 1
    async with served(on_terminal(terminal, complain, leaving)) as chardev:
        chardev.attach(frontend)
        await terminal.screen.send_all(b"0123456789")
        for count in range(1, 11):
            await frontend.wait_received(count)
            frontend.space = 1
            chardev.accept_input()
    assert bytes(frontend.received) == b"0123456789"


@pytest.mark.parametrize("signals", [False, True])
async def test_ctrl_c_is_the_guests_unless_signals_are_wanted(
    terminal: Terminal, complain: Complaints, leaving: Leaving, signals: bool
) -> None:
    async with served(on_terminal(terminal, complain, leaving, signals=signals)):
        assert bool(termios.tcgetattr(terminal.stdio)[3] & termios.ISIG) is signals


async def test_a_bug_in_a_device_still_restores_the_terminal(
    terminal: Terminal, complain: Complaints, leaving: Leaving
) -> None:
    class Broken(Frontend):
        def receive(self, data: bytes) -> None:
            raise ZeroDivisionError

    before = terminal.settings()
    with pytest.RaisesGroup(ZeroDivisionError):
        async with served(on_terminal(terminal, complain, leaving)) as chardev:
            chardev.attach(Broken())
            await terminal.screen.send_all(b"x")
            await trio.sleep_forever()
    assert terminal.settings() == before


async def test_a_terminal_that_is_hung_up_is_not_the_end(
    complain: Complaints, leaving: Leaving, frontend: Frontend
) -> None:
    master, slave = os.openpty()
    async with served(open_stdio(slave, slave, complain, leaving)) as chardev:
        chardev.attach(frontend)
        os.close(master)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(2):
            assert chardev.put(b"still alive") == 11
            await trio.testing.wait_all_tasks_blocked(0.01)
    os.close(slave)
    assert complain.texts == ["Chardev 'serial0' cannot write stdio: Input/output error; its output is dropped"]


async def test_a_terminal_never_served_is_left_alone(
    terminal: Terminal, complain: Complaints, leaving: Leaving
) -> None:
    before = terminal.settings()
    on_terminal(terminal, complain, leaving).close()
    assert terminal.settings() == before


# --- pipes and files --------------------------------------------------------------------------------------


@attrs.define
class Pipes:
    """Standard streams that are pipes, and their other ends."""

    source: int
    sink: int
    typing: trio.lowlevel.FdStream
    reading: trio.lowlevel.FdStream


@pytest.fixture
async def pipes() -> AsyncIterator[Pipes]:
    source, typing = os.pipe()
    reading, sink = os.pipe()
    async with trio.lowlevel.FdStream(typing) as input_end, trio.lowlevel.FdStream(reading) as output_end:
        yield Pipes(source, sink, input_end, output_end)
    os.close(source)
    os.close(sink)


async def test_a_pipe_carries_any_byte(
    pipes: Pipes, complain: Complaints, leaving: Leaving, frontend: Frontend
) -> None:
    async with served(open_stdio(pipes.source, pipes.sink, complain, leaving)) as chardev:
        chardev.attach(frontend)
        await pipes.typing.send_all(b"\x01x\x01h" + bytes(range(256)))
        assert await frontend.wait_received(260) == b"\x01x\x01h" + bytes(range(256))
        chardev.put(bytes(range(256)))
        assert await read_exactly(pipes.reading, 256) == bytes(range(256))
    assert not leaving.event.is_set()


async def test_a_pipe_is_read_no_faster_than_the_guest_takes_it(
    pipes: Pipes, complain: Complaints, leaving: Leaving, frontend: Frontend
) -> None:
    frontend.space = 3
    async with served(open_stdio(pipes.source, pipes.sink, complain, leaving)) as chardev:
        chardev.attach(frontend)
        await pipes.typing.send_all(b"abcdef")
        await frontend.wait_received(3)
        await trio.testing.wait_all_tasks_blocked()
        assert chardev.pending().input == b""
        frontend.space = 3
        await trio.to_thread.run_sync(chardev.accept_input)
        assert await frontend.wait_received(6) == b"abcdef"


async def test_the_end_of_input_is_not_the_end_of_output(
    pipes: Pipes, complain: Complaints, leaving: Leaving, frontend: Frontend
) -> None:
    async with served(open_stdio(pipes.source, pipes.sink, complain, leaving)) as chardev:
        chardev.attach(frontend)
        await pipes.typing.send_all(b"last words")
        await pipes.typing.aclose()
        assert await frontend.wait_received(10) == b"last words"
        await trio.testing.wait_all_tasks_blocked()
        chardev.put(b"goes on")
        assert await read_exactly(pipes.reading, 7) == b"goes on"


async def test_a_reader_that_is_gone_is_complained_of_once(
    pipes: Pipes, complain: Complaints, leaving: Leaving, frontend: Frontend
) -> None:
    async with served(open_stdio(pipes.source, pipes.sink, complain, leaving)) as chardev:
        chardev.attach(frontend)
        await pipes.reading.aclose()
        for _ in range(3):
            assert chardev.put(b"nobody reads this") == 17
            await trio.testing.wait_all_tasks_blocked(0.01)
        await chardev.quiesce()
        chardev.resume()
        assert chardev.put(bytes(2 * BUFFER_LIMIT)) == 2 * BUFFER_LIMIT
    assert complain.texts == ["Chardev 'serial0' cannot write stdio: Broken pipe; its output is dropped"]


async def test_a_pipe_that_may_block_does_not_block_the_loop(
    pipes: Pipes, complain: Complaints, leaving: Leaving, frontend: Frontend
) -> None:
    text = os.urandom(300_000)
    stdio = StdioChardev("serial0", hostio.dup(pipes.source), hostio.dup(pipes.sink), complain, leaving)
    async with served(stdio) as chardev:
        chardev.attach(frontend)
        os.set_blocking(pipes.source, True)
        os.set_blocking(pipes.sink, True)
        async with trio.open_nursery() as nursery:

            async def guest() -> None:
                left = text
                while left:
                    drained = frontend.times_drained
                    left = left[chardev.put(left) :]
                    if left:
                        await frontend.wait_drained(drained + 1)

            nursery.start_soon(guest)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert chardev.room() == 0
            assert await read_exactly(pipes.reading, len(text)) == text


async def test_files_serve_as_standard_streams(
    tmp_path: Path, complain: Complaints, leaving: Leaving, frontend: Frontend
) -> None:
    (tmp_path / "script").write_bytes(b"script" * 2000)
    frontend.space = 5000
    source = os.open(tmp_path / "script", os.O_RDONLY)
    sink = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    async with served(open_stdio(source, sink, complain, leaving)) as chardev:
        os.close(source)
        os.close(sink)
        chardev.attach(frontend)
        await frontend.wait_received(5000)
        frontend.space = 7000
        chardev.accept_input()
        assert await frontend.wait_received(12_000) == b"script" * 2000
        chardev.put(b"log")
    assert (tmp_path / "log").read_bytes() == b"log"


async def test_null_serves_as_standard_streams(complain: Complaints, leaving: Leaving, frontend: Frontend) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    async with served(open_stdio(null, null, complain, leaving)) as chardev:
        os.close(null)
        chardev.attach(frontend)
        while chardev.put(bytes(BUFFER_LIMIT)):
            pass
        await frontend.wait_drained()


async def test_the_end_flushes_what_can_be_written_without_waiting(
    pipes: Pipes, complain: Complaints, leaving: Leaving
) -> None:
    async with served(open_stdio(pipes.source, pipes.sink, complain, leaving)) as chardev:
        chardev.put(bytes(10_000))
    assert await read_exactly(pipes.reading, 10_000) == bytes(10_000)
