"""A PC's serial port: a 16550A UART on eight I/O ports.

Source: Texas Instruments PC16550D data sheet (SNLS378C), section 8, whose names are used; IBM PC/AT Technical
Reference, serial adapter (OUT2 gates the interrupt).

Bytes go through at the pace of the two ends; the divisor is kept and means nothing. So what needs time has passed
at once: what is written has been sent as soon as the back end takes it, and the character timeout is over as soon as
a byte waits below the trigger level. A back end that takes no more is seen as a slow line: THRE and TEMT stay 0.

The line is one to a terminal that is always there: CTS, DSR and DCD are asserted. Framing and parity errors and breaks
do not occur, nor does RI outside loopback; LCR's word length and its break bit are kept and have no effect. FCR's DMA
mode drives two pins that no PC connects.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Annotated, ClassVar, Final, Protocol, final

import attrs

from vmm.hw.irq import Interrupts
from vmm.hw.state import U8, U16, Integer, Octets, Schema, derived, host_only

# Offsets. RBR, THR, IER: while DLAB is 0; DLL, DLM: while it is 1.
_RBR: Final = 0
_THR: Final = 0
_DLL: Final = 0
_IER: Final = 1
_DLM: Final = 1
_IIR: Final = 2
_FCR: Final = 2
_LCR: Final = 3
_MCR: Final = 4
_LSR: Final = 5
_MSR: Final = 6
_SCR: Final = 7

_IER_RX: Final = 0x01  # ERBFI: received data available, character timeout
_IER_TX: Final = 0x02  # ETBEI: transmitter holding register empty
_IER_LINE: Final = 0x04  # ELSI
_IER_MODEM: Final = 0x08  # EDSSI

_IIR_NONE: Final = 0x01
_IIR_MODEM: Final = 0x00
_IIR_TX: Final = 0x02
_IIR_RX: Final = 0x04
_IIR_LINE: Final = 0x06
_IIR_TIMEOUT: Final = 0x0C
_IIR_FIFOS: Final = 0xC0

_FCR_ENABLE: Final = 0x01
_FCR_CLEAR_RX: Final = 0x02
_FCR_CLEAR_TX: Final = 0x04
_FCR_KEPT: Final = 0xC9  # enable, DMA mode, trigger level
_TRIGGER_LEVELS: Final = (1, 4, 8, 14)
_FIFO_DEPTH: Final = 16

_LCR_DLAB: Final = 0x80

_MCR_OUT2: Final = 0x08
_MCR_LOOP: Final = 0x10
_MCR_KEPT: Final = 0x1F

_LSR_RX_READY: Final = 0x01
_LSR_OVERRUN: Final = 0x02
_LSR_TX_IDLE: Final = 0x60  # THRE and TEMT

_MSR_TERMINAL: Final = 0xB0  # DCD, DSR, CTS
_MSR_RI: Final = 0x40

_OCTETS: Final = tuple(bytes((value,)) for value in range(256))


class ByteSink(Protocol):
    """Where the transmitted bytes go."""

    def put(self, data: bytes) -> int:
        """Take a prefix of `data` and return its length. Any thread, with the device's lock held: must not block.

        So whatever lock this takes must not be held by who calls the device.
        """


@attrs.define(kw_only=True)
class UartState:
    """Everything that the guest can observe of the UART; the reset values are the data sheet's (table 3)."""

    SCHEMA: ClassVar[Schema] = Schema("uart16550", version=1, accepts=1)

    divisor: U16 = 0
    ier: Annotated[int, Integer(0, 0x0F)] = 0
    fcr: U8 = 0  # as written, without the bits that clear a FIFO
    lcr: U8 = 0
    mcr: Annotated[int, Integer(0, _MCR_KEPT)] = 0
    scr: U8 = 0
    overrun: bool = False  # LSR bit 1
    msr_deltas: Annotated[int, Integer(0, 0x0F)] = 0  # MSR bits 0 to 3
    tx_interrupt: bool = False  # the transmitter became empty, and the guest has neither written nor read IIR since
    rx_fifo: Annotated[bytes, Octets(_FIFO_DEPTH)] = b""  # oldest byte first; at most one without FIFOs
    tx_fifo: Annotated[bytes, Octets(_FIFO_DEPTH)] = b""  # what the back end has no room for


@final
@attrs.define(eq=False, repr=False, kw_only=True)
class Uart(Interrupts):
    """A 16550A.

    Register accesses come from vCPU threads under `lock`, by the bus. `room`, `receive` and `drained` are for the
    back end, on the loop; they take `lock` for as long as an access lasts.
    """

    name: str = attrs.field(metadata=host_only("configuration: in the recipe"))
    addresses: tuple[range, ...] = attrs.field(metadata=host_only("configuration: of the board"))
    sink: ByteSink = attrs.field(metadata=host_only("a back end of this host"))
    on_room: Callable[[], object] = attrs.field(
        metadata=host_only("a back end of this host; rung on any thread when `room` was 0 and no longer is"),
        default=lambda: None,
    )
    widest: int = attrs.field(metadata=host_only("configuration: an 8-bit ISA device"), default=1, init=False)
    lock: threading.Lock = attrs.field(
        metadata=host_only("orders this process's threads"), factory=threading.Lock, init=False
    )
    state: UartState = attrs.Factory(UartState)
    _sender_waits: bool = attrs.field(metadata=derived("the back end asks for room anew"), default=False, init=False)

    # --- the guest's side -------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Read a register."""
        state = self.state
        if offset == _LSR:  # first: a guest that prints polls it before each byte
            lsr = 0 if state.tx_fifo else _LSR_TX_IDLE
            if state.rx_fifo:
                lsr |= _LSR_RX_READY
            if state.overrun:
                lsr |= _LSR_OVERRUN
                state.overrun = False
                self._update_irq()
            return lsr
        if offset == _RBR:
            return state.divisor & 0xFF if state.lcr & _LCR_DLAB else self._take_received()
        if offset == _IER:
            return state.divisor >> 8 if state.lcr & _LCR_DLAB else state.ier
        if offset == _IIR:
            cause = self._cause()
            if cause == _IIR_TX:
                state.tx_interrupt = False
                self._update_irq()
            return cause | (_IIR_FIFOS if state.fcr & _FCR_ENABLE else 0)
        if offset == _MSR:
            msr = self._modem_lines() | state.msr_deltas
            state.msr_deltas = 0
            self._update_irq()
            return msr
        if offset == _LCR:
            return state.lcr
        if offset == _MCR:
            return state.mcr
        return state.scr

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register."""
        state = self.state
        if offset == _THR and not state.lcr & _LCR_DLAB:  # first: this is the guest printing
            if state.ier & _IER_TX and state.tx_interrupt:
                # Writing resets the interrupt and sending it raises it again: an edge, which a guest that answers the
                # interrupt without reading IIR depends on.
                state.tx_interrupt = False
                self._update_irq()
            if state.mcr & _MCR_LOOP:
                self._take_in(_OCTETS[value])
                state.tx_interrupt = True
            elif (not state.tx_fifo or self._flush()) and self.sink.put(_OCTETS[value]):
                state.tx_interrupt = True
            else:
                self._queue(value)
            if state.ier & _IER_TX:
                self._update_irq()
        elif offset == _DLL and state.lcr & _LCR_DLAB:
            state.divisor = state.divisor & 0xFF00 | value
        elif offset == _IER:
            self._write_ier(value)
        elif offset == _FCR:
            self._write_fcr(value)
        elif offset == _LCR:
            state.lcr = value
        elif offset == _MCR:
            self._write_mcr(value & _MCR_KEPT)
        elif offset == _SCR:
            state.scr = value
        # LSR and MSR: writes are for the factory's tests (data sheet, 8.4); no effect.

    # --- the back end's side ----------------------------------------------------------------------------------------

    def room(self) -> int:
        """Return how many bytes `receive` can take now. After 0, `on_room` is called once there is room. Any thread."""
        with self.lock:
            room = self._room()
            self._sender_waits = not room
            return room

    def receive(self, data: bytes) -> None:
        """Let bytes arrive. More than `room` overruns the FIFO, as on a line without flow control. On the loop."""
        with self.lock:
            if not self.state.mcr & _MCR_LOOP:  # in loopback the receiver is cut off from the line
                self._take_in(data)

    def drained(self) -> None:
        """Take notice that the sink has room, and send what waits for it. On the loop.

        The back end calls this each time it has room again, and once when it takes up service: after a live update
        bytes may wait here with nothing else to get them going.
        """
        with self.lock:
            if self.state.tx_fifo and self._flush():
                self._update_irq()

    # --- the loop's side, while no vCPU runs ------------------------------------------------------------------------

    def reset(self) -> None:
        """Go to the power-on state. What waits to be sent is offered to the sink once more, then dropped."""
        with self.lock:
            self._flush()
            self.state = UartState()
            self._drive_irq(self._is_pending())
            self._tell_room()

    def after_load(self) -> None:
        """Drive the interrupt line as the loaded state has it. Sends nothing: see `drained`."""
        with self.lock:
            self._drive_irq(self._is_pending())

    # --- receiver ---------------------------------------------------------------------------------------------------

    def _room(self) -> int:
        state = self.state
        if state.mcr & _MCR_LOOP:
            return 0
        return max(0, self._depth() - len(state.rx_fifo))

    def _depth(self) -> int:
        return _FIFO_DEPTH if self.state.fcr & _FCR_ENABLE else 1

    def _take_in(self, data: bytes) -> None:
        state = self.state
        depth = self._depth()
        if len(state.rx_fifo) + len(data) <= depth:
            state.rx_fifo += data
        else:
            state.overrun = True
            if depth > 1:
                state.rx_fifo = (state.rx_fifo + data)[:depth]  # the shift register is overwritten, the FIFO is not
            else:
                state.rx_fifo = data[-1:]  # the 16450 overwrites what was not read (data sheet, 8.4, OE)
        self._update_irq()

    def _take_received(self) -> int:
        state = self.state
        fifo = state.rx_fifo
        if not fifo:
            return 0
        state.rx_fifo = fifo[1:]
        if len(fifo) == 1:
            self._update_irq()
            self._tell_room()
        return fifo[0]

    def _tell_room(self) -> None:
        # When the guest has taken all, not at the first free place: a burst then costs one wake-up.
        if self._sender_waits and self._room():
            self._sender_waits = False
            self.on_room()

    # --- transmitter ------------------------------------------------------------------------------------------------

    def _queue(self, value: int) -> None:
        """Keep a byte that the sink has no room for. One written although THRE is 0 and the FIFO full is lost."""
        state = self.state
        state.tx_interrupt = False
        if len(state.tx_fifo) < self._depth():
            state.tx_fifo += _OCTETS[value]

    def _flush(self) -> bool:
        """Offer the sink what waits for it; tell whether nothing waits any longer."""
        state = self.state
        if state.tx_fifo:
            state.tx_fifo = state.tx_fifo[self.sink.put(state.tx_fifo) :]
            if state.tx_fifo:
                return False
            state.tx_interrupt = True
        return True

    # --- registers --------------------------------------------------------------------------------------------------

    def _write_ier(self, value: int) -> None:
        state = self.state
        if state.lcr & _LCR_DLAB:
            state.divisor = state.divisor & 0x00FF | value << 8
            return
        if value & ~state.ier & _IER_TX and not state.tx_fifo:
            state.tx_interrupt = True  # enabled while THRE is 1: interrupts at once; drivers test for it
        state.ier = value & 0x0F
        self._update_irq()

    def _write_fcr(self, value: int) -> None:
        state = self.state
        toggled = (value ^ state.fcr) & _FCR_ENABLE
        if not value & _FCR_ENABLE:
            value = 0  # the other bits are programmed only together with the enable bit
        state.fcr = value & _FCR_KEPT
        if toggled or value & _FCR_CLEAR_RX:
            state.rx_fifo = b""
            self._tell_room()
        if (toggled or value & _FCR_CLEAR_TX) and state.tx_fifo:
            state.tx_fifo = b""
            state.tx_interrupt = True
        self._update_irq()

    def _write_mcr(self, value: int) -> None:
        state = self.state
        before = self._modem_lines()
        state.mcr = value
        after = self._modem_lines()
        changed = before ^ after
        # DCTS, DDSR and DDCD: changed at all. TERI: only the trailing edge of RI.
        state.msr_deltas |= (changed & ~_MSR_RI | before & ~after & _MSR_RI) >> 4
        self._update_irq()
        self._tell_room()

    def _modem_lines(self) -> int:
        """Return MSR bits 4 to 7."""
        mcr = self.state.mcr
        if not mcr & _MCR_LOOP:
            return _MSR_TERMINAL
        # CTS is RTS, DSR is DTR, RI is OUT1, DCD is OUT2.
        return (mcr & 0x02) << 3 | (mcr & 0x01) << 5 | (mcr & 0x04) << 4 | (mcr & 0x08) << 4

    # --- interrupt --------------------------------------------------------------------------------------------------

    def _cause(self) -> int:
        """Return IIR bits 0 to 3: the enabled interrupt of the highest priority."""
        state = self.state
        ier = state.ier
        if ier & _IER_LINE and state.overrun:
            return _IIR_LINE
        if ier & _IER_RX and state.rx_fifo:
            if not state.fcr & _FCR_ENABLE or len(state.rx_fifo) >= _TRIGGER_LEVELS[state.fcr >> 6]:
                return _IIR_RX
            return _IIR_TIMEOUT
        if ier & _IER_TX and state.tx_interrupt:
            return _IIR_TX
        if ier & _IER_MODEM and state.msr_deltas:
            return _IIR_MODEM
        return _IIR_NONE

    def _is_pending(self) -> bool:
        # In loopback the pin OUT2 is inactive whatever MCR says.
        return self.state.mcr & (_MCR_OUT2 | _MCR_LOOP) == _MCR_OUT2 and self._cause() != _IIR_NONE
