from __future__ import annotations

import attrs
import pytest

from tests.hw.fakes import Calls, FakeLine
from vmm.hw.bus import Bus
from vmm.hw.i8042 import I8042

FULL, INPUT_FULL, AUX, TIMEOUT = 0x01, 0x02, 0x20, 0x40


@attrs.define(eq=False)
class Keyboard:
    """The controller on a bus."""

    line: FakeLine = attrs.Factory(FakeLine)
    resets: Calls = attrs.Factory(Calls)
    bus: Bus = attrs.Factory(Bus)
    device: I8042 = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.device = I8042(irq=self.line, request_reset=self.resets)
        self.bus.plug(self.device)

    @property
    def status(self) -> int:
        return self.bus.read(0x64, 1)

    def data(self) -> int:
        assert self.status & FULL
        return self.bus.read(0x60, 1)

    def command(self, command: int, *data: int) -> None:
        for port, value in ((0x64, command), *((0x60, value) for value in data)):
            assert not self.status & INPUT_FULL
            self.bus.write(port, 1, value)


@pytest.fixture
def keyboard() -> Keyboard:
    return Keyboard()


@pytest.mark.parametrize("command", [0xFE, 0xF0, 0xFC])
def test_pulsing_the_reset_line_asks_for_a_reset(keyboard: Keyboard, command: int) -> None:
    keyboard.command(command)
    assert keyboard.resets.count == 1


@pytest.mark.parametrize("command", [0xFF, 0xFD, 0xF1])
def test_pulsing_other_lines_does_not(keyboard: Keyboard, command: int) -> None:
    keyboard.command(command)
    assert keyboard.resets.count == 0


def test_writing_0_to_the_output_ports_reset_bit_asks_for_a_reset(keyboard: Keyboard) -> None:
    keyboard.command(0xD1, 0xDF)
    assert keyboard.resets.count == 0
    keyboard.command(0xD1, 0xDE)
    assert keyboard.resets.count == 1


def test_a_reset_finds_the_controller_ready_without_a_wait(keyboard: Keyboard) -> None:
    assert not keyboard.status & (INPUT_FULL | FULL)


def test_the_probe_of_a_driver_ends_at_once_with_no_device(keyboard: Keyboard) -> None:
    """The steps of Linux's driver: each has an answer, so that no time limit runs out, and none is worth a message."""
    assert not keyboard.status & FULL  # nothing to flush: a controller is there
    keyboard.command(0x20)
    config = keyboard.data()
    assert keyboard.status & 0x10  # the key lock is open
    keyboard.command(0x60, config | 0x10 & ~0x01)
    keyboard.command(0x20)
    assert keyboard.data() == config | 0x10 & ~0x01

    keyboard.command(0xD3, 0x5A)  # does an auxiliary port loop back?
    assert keyboard.status & (FULL | AUX) == FULL  # a byte, and not from there
    keyboard.command(0xA9)
    assert keyboard.data() == 0x01  # no auxiliary port

    keyboard.command(0x60, 0x01)
    keyboard.bus.write(0x60, 1, 0xF2)  # keyboard, who are you?
    assert keyboard.line.is_up()
    assert keyboard.status & (FULL | TIMEOUT) == FULL | TIMEOUT
    assert keyboard.data() == 0xFE
    assert not keyboard.line.is_up()
    assert not keyboard.status & (FULL | TIMEOUT)


def test_the_self_tests_pass(keyboard: Keyboard) -> None:
    keyboard.command(0xAA)
    assert keyboard.data() == 0x55
    keyboard.command(0xAB)
    assert keyboard.data() == 0x00


def test_the_keyboard_can_be_disabled_and_enabled(keyboard: Keyboard) -> None:
    keyboard.command(0xAD)
    assert keyboard.device.state.config & 0x10
    keyboard.command(0xAE)
    assert not keyboard.device.state.config & 0x10


def test_the_ports_of_the_controller_read_back(keyboard: Keyboard) -> None:
    keyboard.command(0xC0)
    assert keyboard.data() == 0x80
    keyboard.command(0xD1, 0xDF)
    keyboard.command(0xD0)
    assert keyboard.data() == 0xCF
    keyboard.command(0xD2, 0x42)
    assert keyboard.data() == 0x42


def test_the_status_tells_commands_from_data(keyboard: Keyboard) -> None:
    keyboard.command(0xAE)
    assert keyboard.status & 0x08
    keyboard.bus.write(0x60, 1, 0)
    assert not keyboard.status & 0x08


def test_a_byte_for_the_port_that_is_not_there_has_no_answer(keyboard: Keyboard) -> None:
    keyboard.command(0xD4, 0xFF)
    assert not keyboard.status & FULL


def test_the_interrupt_follows_the_configuration(keyboard: Keyboard) -> None:
    keyboard.command(0x60, 0x00)
    keyboard.command(0xD2, 0x42)
    assert not keyboard.line.is_up()
    keyboard.command(0x60, 0x01)
    assert keyboard.line.is_up()


def test_an_unknown_command_has_no_answer(keyboard: Keyboard) -> None:
    keyboard.command(0x99)
    assert not keyboard.status & FULL


def test_an_empty_buffer_reads_as_the_last_byte(keyboard: Keyboard) -> None:
    keyboard.command(0xAA)
    assert [keyboard.bus.read(0x60, 1) for _ in range(2)] == [0x55, 0x55]
