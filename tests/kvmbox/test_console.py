from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import MemoryReceiveStream, memory_stream_pair

from tests.kvmbox.console import ConsoleSilent, ConsoleSocket, SerialConsole

if TYPE_CHECKING:
    from pathlib import Path


async def test_lines_come_whole_however_they_were_sent() -> None:
    guest, ours = memory_stream_pair()
    console = SerialConsole(ours)
    await guest.send_all(b"one\r\ntw")
    assert await console.line(within=1) == "one"
    await guest.send_all(b"o\nthree\n")
    assert [await console.line(within=1), await console.line(within=1)] == ["two", "three"]


async def test_expect_takes_lines_up_to_the_one_that_matches() -> None:
    guest, ours = memory_stream_pair()
    console = SerialConsole(ours)
    await guest.send_all(b"noise\ncount 12\nlater\n")
    found = await console.expect(r"^count (\d+)$", within=1)
    assert found[1] == "12"
    assert console.transcript == ["noise", "count 12"]
    assert await console.line(within=1) == "later"


async def test_a_guest_that_says_nothing_of_it_in_time_is_quoted(autojump_clock: trio.testing.MockClock) -> None:
    guest, ours = memory_stream_pair()
    await guest.send_all(b"booting\nhalf a li")
    with pytest.raises(ConsoleSilent) as caught:
        await SerialConsole(ours).expect("ready", within=5)
    assert str(caught.value) == (
        "the guest did not print 'ready' within 5 s; its last lines:\n  | booting\n  | half a li"
    )


async def test_a_port_that_closes_ends_the_wait() -> None:
    guest, ours = memory_stream_pair()
    await guest.aclose()
    with pytest.raises(ConsoleSilent) as caught:
        await SerialConsole(ours).expect("ready", within=5)
    assert str(caught.value) == "the guest did not print 'ready' before the port was closed; its last lines: none"


async def test_what_is_sent_reaches_the_guest() -> None:
    guest, ours = memory_stream_pair()
    await SerialConsole(ours).send("reboot\n")
    assert isinstance(guest.receive_stream, MemoryReceiveStream)
    assert await guest.receive_some() == b"reboot\n"


@pytest.mark.usefixtures("no_leaks")
async def test_a_vmm_connects_to_a_socket_that_listens_already(tmp_path: Path) -> None:
    path = tmp_path / "console"
    async with (
        ConsoleSocket.listening(path) as socket,
        await trio.open_unix_socket(str(path)) as vmm,
        socket.accepted(within=1) as console,
    ):
        await vmm.send_all(b"hello\n")
        assert await console.line(within=1) == "hello"


async def test_a_vmm_that_never_connects_is_an_error(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    path = tmp_path / "console"
    async with ConsoleSocket.listening(path) as socket:
        with pytest.raises(ConsoleSilent) as caught:
            async with socket.accepted(within=60):
                pass
    assert str(caught.value) == f"no VMM connected its serial port to {path} within 60 s"
