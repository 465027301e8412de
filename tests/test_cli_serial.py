"""The guest's serial port as its users have it: on a terminal, a pipe, a socket, a file, a pty."""

from __future__ import annotations

import os
import pty
import signal
import socket
import subprocess
import termios
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import attrs
import pytest
import trio

from tests.qmp.kit import ECHO, PATIENCE, TRIO_VMM, debug_exit, environment, flat_guest, machine, trio_vmm
from vmm.backends.chardev_stdio import HELP

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

pytestmark = pytest.mark.kvm

SMALL = ("-m", "2")


def printing(text: str) -> str:
    """Make the source of a guest that prints `text` on COM1 and exits with value 1."""
    return f"""
 mov si, text
next: mov al, [si]
 test al, al
 jz done
 mov dx, 0x3f8
 out dx, al
 inc si
 jmp next
done: {debug_exit(1)}
text: db `{text}`, 0
"""


PROMPT = "mov dx, 0x3f8\n mov al, '>'\n out dx, al\n"
"""Says that the terminal is the guest's by now; what is typed before is echoed by the terminal itself."""


async def expect(stream: trio.abc.ReceiveStream, wanted: bytes) -> None:
    """Read until the end of what was read is `wanted`, which must be all of it."""
    data = b""
    while len(data) < len(wanted):
        more = await stream.receive_some(len(wanted) - len(data))
        assert more, data
        data += more
    assert data == wanted


# --- a terminal -------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Terminal:
    """A terminal with a `trio-vmm` on it."""

    screen: trio.lowlevel.FdStream
    tty: int
    """The terminal as the program has it, to look at its settings."""
    before: object
    process: trio.Process

    def is_raw(self) -> bool:
        """Say whether keys go to the program one by one, unseen and unchanged."""
        return not termios.tcgetattr(self.tty)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)

    def is_as_before(self) -> bool:
        """Say whether the terminal has the settings that it had."""
        return termios.tcgetattr(self.tty) == self.before


@asynccontextmanager
async def terminal(*options: str) -> AsyncGenerator[Terminal, None]:
    """Run `trio-vmm run` with `options` on a terminal, in a session of its own that the terminal controls."""
    master, tty = pty.openpty()
    before = termios.tcgetattr(tty)
    process = await trio.lowlevel.open_process(
        ["setsid", "--ctty", "--wait", TRIO_VMM, "run", *options], stdin=tty, stdout=tty, stderr=tty, env=environment()
    )
    try:
        with trio.fail_after(PATIENCE):
            async with trio.lowlevel.FdStream(master) as screen:
                yield Terminal(screen, tty, before, process)
    finally:
        os.close(tty)
        if process.returncode is None:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


@pytest.mark.parametrize("options", [(), ("-serial", "stdio"), ("-serial", "mon:stdio"), ("-nographic",)])
async def test_on_a_terminal_every_key_goes_to_the_guest_and_ctrl_a_x_leaves(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    async with terminal("-kernel", flat_guest(tmp_path, PROMPT + ECHO), *SMALL, *options) as t:
        await expect(t.screen, b">")
        assert t.is_raw()
        # Ctrl-C, Ctrl-Z, Ctrl-\, Ctrl-D, Ctrl-S, carriage return, an arrow key.
        keys = b"\x03\x1a\x1c\x04\x13\r\x1b[A\xff"
        for at in range(len(keys)):
            await t.screen.send_all(keys[at : at + 1])
            await expect(t.screen, keys[at : at + 1])
        await t.screen.send_all(b"\x01\x01")
        await expect(t.screen, b"\x01")
        await t.screen.send_all(b"\x01h")
        await expect(t.screen, HELP.replace(b"\n", b"\r\n"))  # the terminal goes on to make lines
        await t.screen.send_all(b"\x01x")
        assert await t.process.wait() == 0
        assert t.is_as_before()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
async def test_a_signal_gives_the_terminal_back(tmp_path: Path, number: int) -> None:
    async with terminal("-kernel", flat_guest(tmp_path, PROMPT + ECHO), *SMALL, "-qmp", f"unix:{tmp_path}/q") as t:
        await expect(t.screen, b">")
        assert t.is_raw()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "q"))
            pid = int.from_bytes(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 4), "little")
        os.kill(pid, number)
        assert await t.process.wait() == 0
        assert t.is_as_before()
        assert "q" not in os.listdir(tmp_path)


async def test_a_machine_that_is_refused_never_touches_the_terminal(tmp_path: Path) -> None:
    async with terminal("-kernel", str(tmp_path / "none"), "-serial", "stdio") as t:
        assert await t.process.wait() == 1
        assert t.is_as_before()
        said = (await t.screen.receive_some(1024)).decode()
        assert said == (
            "trio-vmm: Recipe of the command line, command 2 (machine-set): "
            f"Cannot read {tmp_path}/none: No such file or directory\r\n"
        )


async def test_a_guest_that_exits_gives_the_terminal_back(tmp_path: Path) -> None:
    async with terminal("-kernel", flat_guest(tmp_path, printing("bye\\n")), *SMALL) as t:
        await expect(t.screen, b"bye\r\n")
        assert await t.process.wait() == 3
        assert t.is_as_before()


# --- pipes and files on stdio -----------------------------------------------------------------------------


async def test_what_the_guest_printed_before_it_exits_is_all_there(tmp_path: Path) -> None:
    done = await trio_vmm("run", "-kernel", flat_guest(tmp_path, printing("some words\\n" * 40)), *SMALL)
    assert (done.status, done.out, done.err) == (3, "some words\n" * 40, "")


async def test_from_a_pipe_ctrl_a_is_data(tmp_path: Path) -> None:
    process = await trio.lowlevel.open_process(
        [TRIO_VMM, "run", "-kernel", flat_guest(tmp_path, ECHO), *SMALL],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(),
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    with trio.fail_after(PATIENCE):
        await process.stdin.send_all(b"\x01x\x01h\0\xff")
        await expect(process.stdout, b"\x01x\x01h\0\xff")
        process.terminate()
        assert await process.wait() == 0
        await process.stdin.aclose()
        await process.stdout.aclose()


# --- the other back ends ----------------------------------------------------------------------------------


async def test_a_unix_socket_carries_both_ways_and_clients_may_come_again(tmp_path: Path) -> None:
    guest, path = flat_guest(tmp_path, ECHO), str(tmp_path / "serial")
    async with machine(tmp_path, "-kernel", guest, *SMALL, "-serial", f"unix:{path},server=on,wait=off") as m:
        await m.until_running()
        for word in (b"one", b"two"):
            async with await trio.open_unix_socket(path) as client:
                await client.send_all(word)
                await expect(client, word)
        await m.quit()
    assert "serial" not in os.listdir(tmp_path)


async def test_a_file_has_what_the_guest_printed(tmp_path: Path) -> None:
    guest = flat_guest(tmp_path, printing("to a file\\n"))
    done = await trio_vmm("run", "-kernel", guest, *SMALL, "-serial", f"file:{tmp_path}/log")
    assert (done.status, done.out, done.err) == (3, "", "")
    assert (tmp_path / "log").read_bytes() == b"to a file\n"


async def test_a_pty_carries_both_ways(tmp_path: Path) -> None:
    async with machine(tmp_path, "-kernel", flat_guest(tmp_path, ECHO), *SMALL, "-serial", "pty") as m:
        await m.until_running()
        (name,) = [info["filename"] for info in await m.qmp.execute("query-chardev") if info["label"] == "serial0"]
        assert name.startswith("pty:/dev/pts/")
        fd = os.open(name.removeprefix("pty:"), os.O_RDWR | os.O_NOCTTY)
        async with trio.lowlevel.FdStream(fd) as tty:
            await tty.send_all(b"key\r\x03")
            await expect(tty, b"key\r\x03")


async def test_null_takes_all_and_gives_nothing(tmp_path: Path) -> None:
    done = await trio_vmm("run", "-kernel", flat_guest(tmp_path, printing("lost")), *SMALL, "-serial", "null")
    assert (done.status, done.out, done.err) == (3, "", "")


async def test_two_ports_have_a_back_end_each(tmp_path: Path) -> None:
    second = printing("first").replace("done:", "done: mov dx, 0x2f8\n mov al, 50\n out dx, al\n")
    done = await trio_vmm(
        "run", "-kernel", flat_guest(tmp_path, second), *SMALL, "-serial", f"file:{tmp_path}/1", "-serial",
        f"file:{tmp_path}/2",
    )  # fmt: skip
    assert (done.status, done.out, done.err) == (3, "", "")
    assert ((tmp_path / "1").read_bytes(), (tmp_path / "2").read_bytes()) == (b"first", b"2")


async def test_without_defaults_no_port_has_a_back_end(tmp_path: Path) -> None:
    async with machine(tmp_path, "-kernel", flat_guest(tmp_path, ECHO), *SMALL, "-nodefaults") as m:
        await m.until_running()
        labels = [info["label"] for info in await m.qmp.execute("query-chardev")]
        assert labels == ["compat_monitor0"]
