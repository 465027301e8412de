"""The same lines to QEMU and to this VMM: the same answers, but for the words of errors.

Debian's QEMU is built without accelerator qtest. Its qtest works with another one all the same, whose vCPUs stand
still; only the clock is then not compared. Empty lines are not either: QEMU 7.2 ends at one with a failed assertion.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import pytest
import trio

from tests.qtest.client import PATIENCE, QtestClient, machine
from vmm.recipe import Step

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

QEMU: Final = shutil.which("qemu-system-x86_64") or ""

pytestmark = [
    pytest.mark.usefixtures("no_leaks"),
    pytest.mark.skipif(not QEMU, reason="there is no qemu-system-x86_64 to compare with"),
]

NULL: Final = Step("chardev-add", {"id": "s", "backend": {"type": "null", "data": {}}})

COM1_INTERRUPT: Final = (
    "irq_intercept_in ioapic",
    "irq_intercept_in ioapic",
    "outb 0x3fc 0x08",  # OUT2
    "outb 0x3f9 0x02",  # the transmitter's interrupt, which is pending at once
    "inb 0x3fa",
    "inb 0x3fa",
)

LINES: Final = (
    "endianness",
    # The serial port: scratch register, line status, divisor, loopback.
    "outb 0x3ff 0x5a",
    "inb 0x3ff",
    "inb 0x3fd",
    "inw 0x3fd",
    "outb 0x3fb 0x83",
    "outb 0x3f8 0x34",
    "outb 0x3f9 0x12",
    "inb 0x3f8",
    "inb 0x3f9",
    "outb 0x3fb 0x03",
    "inb 0x3fb",
    *COM1_INTERRUPT,
    "outb 0x3f9 0x00",  # In loopback a PC's serial port does not interrupt; QEMU's does.
    "outb 0x3fc 0x1e",
    "outb 0x3f8 0x41",
    "inb 0x3f8",
    # The clock: what it has beside the time.
    "outb 0x70 0x0d",
    "inb 0x71",
    "outb 0x70 0x0c",
    "inb 0x71",
    "outb 0x70 0x0b",
    "inb 0x71",
    "outb 0x70 0x50",
    "outb 0x71 0x99",
    "inb 0x71",
    # Memory.
    "writeb 0x1000 0x12",
    "writew 0x1002 0x3456",
    "writel 0x1004 0x789abcde",
    "writeq 0x1008 0x1122334455667788",
    "readb 0x1000",
    "readw 0x1002",
    "readl 0x1004",
    "readq 0x1008",
    "readl 0x1001",
    "read 0x1000 0x10",
    "read 4096 1",
    "read 010000 1",
    "write 0x2000 4 0xaabbccdd",
    "readl 0x2000",
    "write 0x2000 4 0xee",
    "read 0x2000 6",
    "write 0x2000 1 0x",
    "memset 0x3000 8 0x77",
    "memset 0x3000 0 0x11",
    "read 0x3000 9",
    "b64write 0x4000 3 AQID",
    "b64read 0x4000 3",
    # Ports that nobody has.
    "inb 0x1234",
    "inw 0x1234",
    "inl 0x1234",
    "outl 0x1234 0",
    # What fails.
    "nonsense",
    "irq_intercept_in nothing",
    "irq_intercept_out nothing",
    "write 0x2000 4 0",
)

CLOCK: Final = ("clock_step 1000", "clock_step 1", "clock_set 5000", "clock_set 5000", "clock_step 0")


@asynccontextmanager
async def qemu(directory: Path, accelerator: str) -> AsyncGenerator[QtestClient, None]:
    """Run QEMU with a qtest that connects here."""
    with socket.socket(socket.AF_UNIX) as listener:
        path = str(directory / "qemu")
        listener.bind(path)
        listener.listen()
        command = [
            QEMU, "-M", "microvm,isa-serial=on,rtc=on", "-accel", accelerator, "-S", "-m", "64", "-nodefaults",
            "-display", "none", "-chardev", "null,id=s", "-serial", "chardev:s", "-qtest", f"unix:{path}",
            "-qtest-log", "none",
        ]  # fmt: skip
        process = await trio.lowlevel.open_process(command, stdin=subprocess.DEVNULL)
        try:
            with trio.fail_after(PATIENCE):
                await trio.lowlevel.wait_readable(listener)
            sock, _ = listener.accept()
            async with QtestClient(trio.SocketStream(trio.socket.from_stdlib_socket(sock))) as client:
                yield client
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


async def accelerator() -> str:
    """Return the accelerator with which QEMU executes nothing: qtest, where it is built with it."""
    offered = await trio.run_process([QEMU, "-accel", "help"], capture_stdout=True)
    return "qtest" if b"qtest" in offered.stdout.split() else "tcg"


async def conversation(client: QtestClient, lines: tuple[str, ...]) -> list[tuple[str, list[str], str]]:
    """Send `lines`; return each with the interrupts that were told, and the answer, of an error its first word."""
    told = []
    for line in lines:
        answer = await client.ask(line)
        told.append((line, client.interrupts[:], answer if answer.startswith("OK") else answer.split(" ")[0]))
        client.interrupts.clear()
    return told


async def test_the_same_lines_have_the_same_answers(tmp_path: Path) -> None:
    kind = await accelerator()
    lines = (*LINES, *CLOCK) if kind == "qtest" else LINES
    async with qemu(tmp_path, kind) as theirs:
        expected = await conversation(theirs, lines)
    async with machine(tmp_path, NULL, options={"serial": ["s"]}) as bench:
        found = await conversation(bench.qtest, lines)
    assert found == expected


async def test_time_goes_as_clients_of_qemu_expect(tmp_path: Path) -> None:
    """For where QEMU's own clock can't be asked."""
    async with machine(tmp_path) as bench:
        answers = [await bench.qtest.ask(line) for line in CLOCK]
    assert answers == ["OK 1000", "OK 1001", "OK 5000", "OK 5000", "OK 5000"]
