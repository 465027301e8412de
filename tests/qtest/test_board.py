"""The board's devices, driven over qtest as a guest would drive them. No KVM."""

from __future__ import annotations

import socket
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

from tests.qtest.client import PATIENCE, Bench, QtestClient, machine, unix

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("no_leaks")

SECOND: Final = 1_000_000_000


async def event(bench: Bench, name: str) -> dict[str, Any]:
    """Wait for an event of the monitor and return its data."""
    with trio.fail_after(PATIENCE):
        found = await bench.qmp.wait_event(lambda event: event["event"] == name)
    data: dict[str, Any] = found.get("data", {})
    return data


# --- the serial ports ---

COM1: Final = 0x3F8
COM2: Final = 0x2F8
RBR, THR, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR = 0, 0, 1, 2, 2, 3, 4, 5, 6, 7


@asynccontextmanager
async def terminal(tmp_path: Path) -> AsyncGenerator[tuple[Bench, trio.SocketStream], None]:
    """A machine with COM1 behind a socket, a client of it, and interrupts intercepted."""
    path = tmp_path / "com1"
    async with machine(tmp_path, unix("com1", path), options={"serial": ["com1"]}) as bench:
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        await sock.connect(str(path))
        async with trio.SocketStream(sock) as stream:
            await bench.qtest.do("irq_intercept_in ioapic")
            yield bench, stream


async def receive(stream: trio.SocketStream, size: int) -> bytes:
    """Read `size` bytes from the back end."""
    data = b""
    with trio.fail_after(PATIENCE):
        while len(data) < size:
            data += await stream.receive_some(size - len(data))
    return data


async def settled(client: QtestClient, register: str, wanted: int) -> None:
    """Read a register until it has a value, which what comes from a back end decides."""
    with trio.fail_after(PATIENCE):
        while await client.value(register) != wanted:
            pass


async def connected(bench: Bench) -> None:
    """Wait until the chardev has taken its client: what is sent before that is dropped."""
    with trio.fail_after(PATIENCE):
        while not any(
            info["label"] == "com1" and not info["filename"].startswith("disconnected")
            for info in await bench.qmp.execute("query-chardev")
        ):
            pass


async def test_what_is_written_to_a_serial_port_comes_out_of_its_chardev(tmp_path: Path) -> None:
    async with terminal(tmp_path) as (bench, stream):
        await connected(bench)
        for byte in b"hello":
            assert await bench.qtest.value(f"inb {COM1 + LSR}") == 0x60
            await bench.qtest.do(f"outb {COM1 + THR} {byte}")
        assert await receive(stream, 5) == b"hello"


async def test_a_wide_store_to_a_serial_port_goes_to_its_registers_in_turn(tmp_path: Path) -> None:
    async with terminal(tmp_path) as (bench, _):
        await bench.qtest.do(f"outw {COM1 + SCR - 1} 0x5a00")  # MSR, which cannot be written, and SCR
        assert await bench.qtest.value(f"inb {COM1 + SCR}") == 0x5A
        assert await bench.qtest.value(f"inw {COM1 + MSR}") == 0x5AB0


async def test_a_byte_that_arrives_interrupts_until_it_is_read(tmp_path: Path) -> None:
    async with terminal(tmp_path) as (bench, stream):
        client = bench.qtest
        await client.do(f"outb {COM1 + MCR} 0x08")
        await client.do(f"outb {COM1 + IER} 0x01")
        assert await client.changes() == []
        await stream.send_all(b"x")
        assert await client.interrupt() == "raise 4"
        assert await client.value(f"inb {COM1 + IIR}") == 0x04
        assert await client.value(f"inb {COM1 + LSR}") == 0x61
        assert await client.value(f"inb {COM1 + RBR}") == ord("x")
        assert await client.value(f"inb {COM1 + IIR}") == 0x01
        assert await client.changes() == ["lower 4"]


async def test_an_empty_transmitter_interrupts_once_it_is_asked_to(tmp_path: Path) -> None:
    async with terminal(tmp_path) as (bench, _):
        client = bench.qtest
        await client.do(f"outb {COM1 + MCR} 0x08")
        await client.do(f"outb {COM1 + IER} 0x02")
        assert await client.changes() == ["raise 4"]
        assert await client.value(f"inb {COM1 + IIR}") == 0x02
        assert await client.changes() == ["lower 4"]


async def test_without_out2_nothing_interrupts(tmp_path: Path) -> None:
    async with terminal(tmp_path) as (bench, _):
        client = bench.qtest
        await client.do(f"outb {COM1 + IER} 0x02")
        assert await client.value(f"inb {COM1 + IIR}") == 0x02
        assert await client.changes() == []


async def test_fifos_hold_16_bytes_and_interrupt_at_their_trigger(tmp_path: Path) -> None:
    async with terminal(tmp_path) as (bench, stream):
        client = bench.qtest
        await client.do(f"outb {COM1 + FCR} 0x81")  # FIFOs, trigger at 8
        await client.do(f"outb {COM1 + IER} 0x01")
        await stream.send_all(bytes(range(20)))
        await settled(client, f"inb {COM1 + IIR}", 0xC4)
        got = [await client.value(f"inb {COM1 + RBR}") for _ in range(16)]
        await settled(client, f"inb {COM1 + LSR}", 0x61)  # the rest follows as there is room
        got += [await client.value(f"inb {COM1 + RBR}") for _ in range(4)]
        assert got == list(range(20))


async def test_loopback_sends_to_the_receiver(tmp_path: Path) -> None:
    async with terminal(tmp_path) as (bench, _):
        client = bench.qtest
        await client.do(f"outb {COM1 + MCR} 0x1e")
        await client.do(f"outb {COM1 + THR} 0x55")
        assert await client.value(f"inb {COM1 + RBR}") == 0x55
        assert await client.value(f"inb {COM1 + MSR}") & 0xF0 == 0xD0


async def test_a_port_without_a_chardev_is_not_there(tmp_path: Path) -> None:
    async with terminal(tmp_path) as (bench, _):
        assert await bench.qtest.value(f"inb {COM2 + LSR}") == 0xFF


async def test_the_output_of_a_serial_port_is_its_own(tmp_path: Path) -> None:
    chardevs = [unix("a", tmp_path / "a"), unix("b", tmp_path / "b")]
    async with machine(tmp_path, *chardevs, options={"serial": ["a", "b"]}) as bench:
        client = bench.qtest
        await client.do("irq_intercept_out uart1")
        for base in (COM1, COM2):
            await client.do(f"outb {base + MCR} 0x08")
            await client.do(f"outb {base + IER} 0x02")
        assert await client.changes() == ["raise 0"]


async def test_a_reset_lowers_the_line_of_a_serial_port(tmp_path: Path) -> None:
    async with terminal(tmp_path) as (bench, _):
        client = bench.qtest
        await bench.qmp.execute("finish-machine-init")
        await client.do(f"outb {COM1 + MCR} 0x08")
        await client.do(f"outb {COM1 + IER} 0x02")
        await bench.qmp.execute("system_reset")
        assert await client.changes() == ["raise 4", "lower 4"]
        assert await client.value(f"inb {COM1 + IER}") == 0


# --- the clock ---


class Clock:
    """The RTC's registers, behind its two ports."""

    def __init__(self, client: QtestClient) -> None:
        self._client = client

    async def read(self, index: int) -> int:
        await self._client.do(f"outb 0x70 {index}")
        return await self._client.value("inb 0x71")

    async def write(self, index: int, value: int) -> None:
        await self._client.do(f"outb 0x70 {index}")
        await self._client.do(f"outb 0x71 {value}")

    async def time(self) -> str:
        """Year to second, as they are in BCD."""
        return " ".join([f"{await self.read(index):02x}" for index in (0x32, 9, 8, 7, 4, 2, 0)])


async def test_the_clock_tells_a_time_that_stands_still(tmp_path: Path) -> None:
    before = int(time.time())
    async with machine(tmp_path) as bench:
        clock = Clock(bench.qtest)
        shown = await clock.time()
        after = int(time.time())
        assert await clock.time() == shown
        possible = {time.strftime("%y %m %d %H %M %S", time.gmtime(at)) for at in range(before, after + 1)}
        assert shown.split(" ", 1)[1] in possible
        assert shown.startswith("20 ")


async def test_the_clock_goes_by_the_virtual_clock(tmp_path: Path) -> None:
    async with machine(tmp_path) as bench:
        clock = Clock(bench.qtest)
        await clock.write(0x0B, 0x82)  # SET, 24 hours
        for index, value in ((0x32, 0x20), (9, 0x24), (8, 0x02), (7, 0x28), (4, 0x23), (2, 0x59), (0, 0x58)):
            await clock.write(index, value)
        await clock.write(0x0B, 0x02)
        assert await clock.time() == "20 24 02 28 23 59 58"
        await bench.qtest.do(f"clock_step {SECOND}")
        assert await clock.time() == "20 24 02 28 23 59 59"
        await bench.qtest.do(f"clock_step {SECOND}")
        assert await clock.time() == "20 24 02 29 00 00 00"
        assert await clock.read(6) == 5  # a Thursday


async def test_an_update_is_in_progress_just_before_the_second_changes(tmp_path: Path) -> None:
    async with machine(tmp_path) as bench:
        clock = Clock(bench.qtest)
        assert await clock.read(0x0A) == 0x26
        await bench.qtest.do(f"clock_step {SECOND - 1}")
        assert await clock.read(0x0A) == 0xA6
        await bench.qtest.do("clock_step 1")
        assert await clock.read(0x0A) == 0x26


async def test_the_clocks_memory_keeps_what_is_written(tmp_path: Path) -> None:
    async with machine(tmp_path) as bench:
        clock = Clock(bench.qtest)
        for index in (0x0E, 0x50, 0x7F):
            await clock.write(index, index ^ 0xFF)
        assert [await clock.read(index) for index in (0x0E, 0x50, 0x7F)] == [0xF1, 0xAF, 0x80]
        assert await clock.read(0x0D) == 0x80


# --- reset, power, and the end ---


async def test_the_keyboard_controllers_reset_line_resets_the_machine(tmp_path: Path) -> None:
    async with machine(tmp_path) as bench:
        await bench.qmp.execute("cont")
        await bench.qtest.do("outb 0x80 0x77")
        await bench.qtest.do("outb 0x64 0xfe")
        assert await event(bench, "RESET") == {"guest": True, "reason": "guest-reset"}
        assert (await bench.qmp.execute("query-status"))["running"]
        assert await bench.qtest.value("inb 0x80") != 0x77


async def test_the_keyboard_controller_answers_its_self_test(tmp_path: Path) -> None:
    async with machine(tmp_path) as bench:
        client = bench.qtest
        await client.do("outb 0x64 0xaa")
        assert await client.value("inb 0x64") & 1
        assert await client.value("inb 0x60") == 0x55
        assert not await client.value("inb 0x64") & 1


async def test_the_fast_reset_line_resets_the_machine(tmp_path: Path) -> None:
    async with machine(tmp_path) as bench:
        await bench.qmp.execute("cont")
        await bench.qtest.do("outb 0x92 0x03")
        assert await event(bench, "RESET") == {"guest": True, "reason": "guest-reset"}


async def test_with_no_reboot_a_reset_is_the_end(tmp_path: Path) -> None:
    async with machine(tmp_path, options={"reboot-action": "shutdown"}) as bench:
        await bench.qmp.execute("cont")
        await bench.qtest.do("outb 0x64 0xfe")
        assert await event(bench, "SHUTDOWN") == {"guest": True, "reason": "guest-reset"}


async def test_acpi_turns_the_machine_off(tmp_path: Path) -> None:
    async with machine(tmp_path) as bench:
        await bench.qmp.execute("cont")
        client = bench.qtest
        assert await client.value("inw 0x604") == 0x0001  # SCI_EN
        assert await client.value("inw 0x600") == 0
        await client.do("outw 0x602 0x0100")
        assert await client.value("inl 0x600") == 0x0100_0000
        await client.do("outw 0x604 0x1400")  # SLP_TYP 5, without SLP_EN
        assert await client.value("inw 0x604") == 0x1401
        await client.do("outw 0x604 0x3400")
        assert await event(bench, "SHUTDOWN") == {"guest": True, "reason": "guest-shutdown"}
        with trio.fail_after(PATIENCE):
            await bench.running.ended.wait()
        assert bench.running.status == 0


async def test_the_post_code_is_read_back(tmp_path: Path) -> None:
    async with machine(tmp_path) as bench:
        await bench.qtest.do("outb 0x80 0x5a")
        assert await bench.qtest.value("inb 0x80") == 0x5A


@pytest.mark.parametrize(("store", "status"), [("outb 0x501 0", 1), ("outw 0x501 0x15", 43), ("outl 0x501 3", 7)])
async def test_the_debug_exit_port_ends_the_process_with_a_status(tmp_path: Path, store: str, status: int) -> None:
    async with machine(tmp_path) as bench:
        await bench.qmp.execute("cont")
        await bench.qtest.do(store)
        with trio.fail_after(PATIENCE):
            await bench.running.ended.wait()
        assert bench.running.status == status


async def test_a_kernel_is_in_memory_before_anything_runs(tmp_path: Path) -> None:
    image = tmp_path / "flat"
    image.write_bytes(bytes(range(1, 129)))
    async with machine(tmp_path, options={"kernel": f"flat:{image}"}) as bench:
        await bench.qmp.execute("finish-machine-init")
        assert await bench.qtest.do("read 0x10000 16") == f"0x{bytes(range(1, 17)).hex()}"
        await bench.qtest.do("memset 0x10000 16 0xee")
        await bench.qmp.execute("system_reset")
        assert await bench.qtest.do("b64read 0x10000 4") == "AQIDBA=="
