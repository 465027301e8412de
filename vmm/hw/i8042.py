"""A PC/AT keyboard controller without a keyboard, for the sake of its reset line.

Source: IBM PC/AT Technical Reference, keyboard controller (commands, status, output port); IBM PS/2 Hardware Interface
Technical Reference, for the commands of a controller with an auxiliary port, which this one has not.

A driver that probes finds a controller whose self-tests pass. A byte sent to the keyboard is answered as by the real
controller when none is plugged in: 0xFE with the timeout bit. So a probe ends after a few accesses instead of waiting
out its time limits. Unknown commands do nothing. The A20 gate is a bit that can be read back: A20 is always on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import ClassVar, Final, final

import attrs

from vmm.hw.board import I8042_COMMAND, I8042_DATA, I8042_PORTS
from vmm.hw.irq import Interrupts
from vmm.hw.state import U8, Schema, host_only

_COMMAND: Final = I8042_COMMAND - I8042_DATA

_STATUS_FULL: Final = 0x01  # a byte for the guest to read; bit 1, a byte for the controller to read, is never seen set
_STATUS_SYSTEM: Final = 0x04
_STATUS_COMMAND: Final = 0x08
_STATUS_UNLOCKED: Final = 0x10
_STATUS_TIMEOUT: Final = 0x40

_CONFIG_INTERRUPT: Final = 0x01
_CONFIG_SYSTEM: Final = 0x04
_CONFIG_DISABLE: Final = 0x10

_OUTPUT_RESET: Final = 0x01  # active low
_OUTPUT_A20: Final = 0x02
_OUTPUT_FULL: Final = 0x10

_READ_CONFIG: Final = 0x20
_WRITE_CONFIG: Final = 0x60
_TEST_AUX: Final = 0xA9
_SELF_TEST: Final = 0xAA
_TEST_KEYBOARD: Final = 0xAB
_DISABLE: Final = 0xAD
_ENABLE: Final = 0xAE
_READ_INPUT_PORT: Final = 0xC0
_READ_OUTPUT_PORT: Final = 0xD0
_WRITE_OUTPUT_PORT: Final = 0xD1
_ECHO: Final = 0xD2
_ECHO_AUX: Final = 0xD3
_SEND_AUX: Final = 0xD4
_PULSE: Final = 0xF0
_WITH_DATA: Final = frozenset({_WRITE_CONFIG, _WRITE_OUTPUT_PORT, _ECHO, _ECHO_AUX, _SEND_AUX})

_PASSED: Final = 0x55
_KEYBOARD_FINE: Final = 0x00
_CLOCK_STUCK_LOW: Final = 0x01
_INPUT_PORT: Final = 0x80  # keyboard not inhibited
_NO_ANSWER: Final = 0xFE


@attrs.define(kw_only=True)
class I8042State:
    """Everything that the guest can observe of the controller. The power-on values are those a BIOS would leave."""

    SCHEMA: ClassVar[Schema] = Schema("i8042", version=1, accepts=1)

    config: U8 = _CONFIG_SYSTEM | _CONFIG_INTERRUPT
    command: U8 = 0  # the command whose data byte is awaited, or 0
    command_last: bool = False  # the last write was to the command port
    output: U8 = 0
    output_full: bool = False
    timeout: bool = False  # `output` says that the keyboard did not answer
    output_port: U8 = _OUTPUT_RESET | _OUTPUT_A20


@final
@attrs.define(eq=False, repr=False, kw_only=True)
class I8042(Interrupts):
    """The keyboard controller. `request_reset` is called on a vCPU thread under `lock`: it rings, and never blocks."""

    request_reset: Callable[[], object] = attrs.field(metadata=host_only("the machine's reset, in this process"))
    name: str = attrs.field(metadata=host_only("configuration: of the board"), default="i8042")
    addresses: tuple[range, ...] = attrs.field(metadata=host_only("configuration: of the board"), default=I8042_PORTS)
    widest: int = attrs.field(metadata=host_only("configuration: an 8-bit ISA device"), default=1, init=False)
    lock: threading.Lock = attrs.field(
        metadata=host_only("orders this process's threads"), factory=threading.Lock, init=False
    )
    state: I8042State = attrs.Factory(I8042State)

    def read(self, offset: int, size: int) -> int:
        """Read the status, or the byte in the output buffer; when that is empty, the last one again."""
        state = self.state
        if offset == _COMMAND:
            status = _STATUS_UNLOCKED
            if state.output_full:
                status |= _STATUS_FULL
            if state.config & _CONFIG_SYSTEM:
                status |= _STATUS_SYSTEM
            if state.command_last:
                status |= _STATUS_COMMAND
            if state.timeout:
                status |= _STATUS_TIMEOUT
            return status
        state.output_full = state.timeout = False
        self._update_irq()
        return state.output

    def write(self, offset: int, size: int, value: int) -> None:
        """Carry out a command, or take the data byte of one, or send a byte to the keyboard."""
        state = self.state
        state.command_last = offset == _COMMAND
        if offset == _COMMAND:
            state.command = value if value in _WITH_DATA else 0
            self._carry_out(value)
        else:
            command, state.command = state.command, 0
            self._take_data(command, value)
        self._update_irq()

    def reset(self) -> None:
        """Go to the power-on state."""
        with self.lock:
            self.state = I8042State()
            self._drive_irq(False)

    def after_load(self) -> None:
        """Drive the interrupt line as the loaded state has it."""
        with self.lock:
            self._drive_irq(self._is_pending())

    def _carry_out(self, command: int) -> None:
        state = self.state
        if command >= _PULSE:
            if not command & _OUTPUT_RESET:  # a 0 pulses the line low
                self.request_reset()
        elif command == _READ_CONFIG:
            self._answer(state.config)
        elif command == _SELF_TEST:
            state.config |= _CONFIG_SYSTEM
            self._answer(_PASSED)
        elif command == _TEST_KEYBOARD:
            self._answer(_KEYBOARD_FINE)
        elif command == _TEST_AUX:
            # An AT controller does not know this one. A PS/2 one says so of a port that is not wired, at once.
            self._answer(_CLOCK_STUCK_LOW)
        elif command == _DISABLE:
            state.config |= _CONFIG_DISABLE
        elif command == _ENABLE:
            state.config &= ~_CONFIG_DISABLE
        elif command == _READ_INPUT_PORT:
            self._answer(_INPUT_PORT)
        elif command == _READ_OUTPUT_PORT:
            self._answer(state.output_port | (_OUTPUT_FULL if state.output_full else 0))

    def _take_data(self, command: int, value: int) -> None:
        state = self.state
        if command == _WRITE_CONFIG:
            state.config = value
        elif command == _WRITE_OUTPUT_PORT:
            state.output_port = value & ~_OUTPUT_FULL | _OUTPUT_RESET
            if not value & _OUTPUT_RESET:
                self.request_reset()
        elif command in (_ECHO, _ECHO_AUX):
            # Without the status bit that says "from the auxiliary port": so a driver knows that there is none.
            self._answer(value)
        elif command != _SEND_AUX:
            self._answer(_NO_ANSWER)
            state.timeout = True

    def _answer(self, value: int) -> None:
        self.state.output, self.state.output_full, self.state.timeout = value, True, False

    def _is_pending(self) -> bool:
        return self.state.output_full and bool(self.state.config & _CONFIG_INTERRUPT)
