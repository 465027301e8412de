from __future__ import annotations

import attrs
import pytest

from tests.hw.fakes import Calls, FakeLine, FakeSink
from vmm.hw.board import COM1_PORTS
from vmm.hw.bus import Bus
from vmm.hw.uart import Uart, UartState

RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR = 3
MCR = 4
LSR = 5
MSR = 6
SCR = 7

NONE, MODEM, TX, RX, LINE, TIMEOUT = 0x01, 0x00, 0x02, 0x04, 0x06, 0x0C
READY, OVERRUN, IDLE = 0x01, 0x02, 0x60
OUT2 = 0x08
LOOP = 0x10


@attrs.define(eq=False)
class Com1:
    """A UART on a bus, with everything it is wired to."""

    line: FakeLine = attrs.Factory(FakeLine)
    sink: FakeSink = attrs.Factory(FakeSink)
    on_room: Calls = attrs.Factory(Calls)
    bus: Bus = attrs.Factory(Bus)
    uart: Uart = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.uart = Uart(name="com1", addresses=(COM1_PORTS,), irq=self.line, sink=self.sink, on_room=self.on_room)
        self.bus.plug(self.uart)

    def inb(self, register: int) -> int:
        return self.bus.read(COM1_PORTS.start + register, 1)

    def outb(self, register: int, value: int) -> None:
        self.bus.write(COM1_PORTS.start + register, 1, value)

    def set_up(self, *, ier: int = 0, fcr: int = 0x01, mcr: int = OUT2) -> None:
        self.outb(FCR, fcr)
        self.outb(MCR, mcr)
        self.outb(IER, ier)
        self.inb(MSR)

    def take(self) -> bytes:
        """Read what has arrived, as a driver does."""
        data = bytearray()
        while self.inb(LSR) & READY:
            data.append(self.inb(RBR))
        return bytes(data)


@pytest.fixture
def com1() -> Com1:
    return Com1()


# --- power-on and plain registers -----------------------------------------------------------------------------------


def test_registers_have_the_data_sheets_reset_values(com1: Com1) -> None:
    assert [com1.inb(register) for register in (IER, IIR, LCR, MCR, LSR)] == [0, NONE, 0, 0, IDLE]
    assert com1.inb(MSR) & 0x0F == 0


def test_the_divisor_is_behind_dlab(com1: Com1) -> None:
    com1.outb(LCR, 0x83)
    com1.outb(DLL, 0x34)
    com1.outb(DLM, 0x12)
    assert (com1.inb(DLL), com1.inb(DLM)) == (0x34, 0x12)
    com1.outb(LCR, 0x03)
    com1.outb(IER, 0x05)
    com1.outb(THR, ord("x"))
    assert com1.inb(IER) == 0x05
    com1.outb(LCR, 0x83)
    assert (com1.inb(DLL), com1.inb(DLM)) == (0x34, 0x12)
    assert com1.sink.data == b"x"


@pytest.mark.parametrize(("register", "kept"), [(IER, 0x0F), (LCR, 0xFF), (MCR, 0x1F), (SCR, 0xFF)])
def test_registers_keep_the_bits_that_they_have(com1: Com1, register: int, kept: int) -> None:
    com1.outb(register, 0xFF)
    assert com1.inb(register) == kept
    com1.outb(register, 0)
    assert com1.inb(register) == 0


def test_line_and_modem_status_cannot_be_written(com1: Com1) -> None:
    com1.outb(LSR, 0xFF)
    com1.outb(MSR, 0xFF)
    assert com1.inb(LSR) == IDLE
    assert com1.inb(MSR) == 0xB0


def test_a_wide_access_is_a_row_of_narrow_ones(com1: Com1) -> None:
    com1.bus.write(COM1_PORTS.start + LCR, 2, 0x0B03)
    assert (com1.inb(LCR), com1.inb(MCR)) == (0x03, 0x0B)
    assert com1.bus.read(COM1_PORTS.start + LCR, 2) == 0x0B03


# --- what Linux's driver does to find out what it has ---------------------------------------------------------------


def test_the_probe_of_a_driver_finds_a_16550a(com1: Com1) -> None:
    com1.outb(IER, 0x00)
    assert com1.inb(IER) & 0x0F == 0
    com1.outb(IER, 0x0F)
    assert com1.inb(IER) & 0x0F == 0x0F
    com1.outb(IER, 0x00)

    com1.outb(MCR, LOOP | 0x0A)  # RTS and OUT2 come back as CTS and DCD
    assert com1.inb(MSR) & 0xF0 == 0x90
    com1.outb(MCR, 0x08)

    com1.outb(LCR, 0xBF)  # where an extended UART has an EFR that reads as 0
    com1.outb(2, 0x00)
    com1.outb(LCR, 0x00)
    com1.outb(FCR, 0x01)
    assert com1.inb(IIR) >> 6 == 3  # working FIFOs: a 16550A or better

    com1.outb(LCR, 0x80)
    assert com1.inb(2) != 0  # no EFR: not a 16650
    com1.outb(LCR, 0xBF)
    assert com1.inb(2) != 0
    com1.outb(LCR, 0x80)
    com1.outb(FCR, 0x21)  # a 16750 would show bit 5
    assert com1.inb(IIR) >> 5 == 6
    com1.outb(LCR, 0x00)
    com1.outb(IER, 0x40)  # an XScale would keep bit 6
    assert not com1.inb(IER) & 0x40


def test_the_transmitter_interrupt_comes_again_each_time_it_is_enabled(com1: Com1) -> None:
    com1.set_up()
    for _ in range(3):
        com1.outb(IER, 0x02)
        assert com1.inb(IIR) & 0x0F == TX
        com1.outb(IER, 0x00)
        assert com1.inb(IIR) & 0x0F == NONE


# --- transmitting ---------------------------------------------------------------------------------------------------


def test_written_bytes_reach_the_sink_in_order(com1: Com1) -> None:
    for value in range(256):
        assert com1.inb(LSR) & 0x20
        com1.outb(THR, value)
    assert com1.sink.data == bytes(range(256))


def test_a_full_sink_is_seen_as_a_busy_transmitter(com1: Com1) -> None:
    com1.set_up()
    com1.sink.free = 1
    com1.outb(THR, ord("a"))
    assert com1.inb(LSR) == IDLE
    com1.outb(THR, ord("b"))
    assert com1.inb(LSR) == 0
    com1.sink.free = 10
    com1.uart.drained()
    assert com1.inb(LSR) == IDLE
    assert com1.sink.data == b"ab"


def test_sixteen_bytes_wait_in_the_fifo_and_more_are_lost(com1: Com1) -> None:
    com1.set_up()
    com1.sink.free = 0
    for value in range(20):
        com1.outb(THR, value)
    com1.sink.free = 100
    com1.uart.drained()
    assert com1.sink.data == bytes(range(16))


def test_one_byte_waits_without_fifos(com1: Com1) -> None:
    com1.set_up(fcr=0)
    com1.sink.free = 0
    com1.outb(THR, 1)
    com1.outb(THR, 2)
    com1.sink.free = 100
    com1.uart.drained()
    assert com1.sink.data == b"\1"


def test_what_waits_goes_before_what_is_written_later(com1: Com1) -> None:
    com1.set_up()
    com1.sink.free = 0
    com1.outb(THR, ord("a"))
    com1.outb(THR, ord("b"))
    com1.sink.free = 1
    com1.outb(THR, ord("c"))
    assert com1.sink.data == b"a"
    com1.sink.free = 100
    com1.outb(THR, ord("d"))
    assert com1.sink.data == b"abcd"
    assert com1.inb(LSR) == IDLE


def test_the_transmitter_interrupt_waits_for_the_sink(com1: Com1) -> None:
    com1.set_up(ier=0x02)
    assert com1.inb(IIR) & 0x0F == TX
    com1.sink.free = 2
    com1.outb(THR, 1)
    com1.inb(IIR)
    com1.outb(THR, 2)
    com1.inb(IIR)
    com1.outb(THR, 3)
    assert not com1.line.is_up()
    assert com1.inb(IIR) & 0x0F == NONE
    com1.uart.drained()
    assert not com1.line.is_up()  # called in vain
    com1.sink.free = 1
    com1.uart.drained()
    assert com1.line.is_up()
    assert com1.inb(IIR) & 0x0F == TX
    assert not com1.line.is_up()


def test_a_partly_drained_fifo_is_still_busy(com1: Com1) -> None:
    com1.set_up(ier=0x02)
    com1.inb(IIR)
    com1.sink.free = 0
    com1.outb(THR, 1)
    com1.outb(THR, 2)
    com1.sink.free = 1
    com1.uart.drained()
    assert com1.inb(LSR) == 0
    assert not com1.line.is_up()
    assert com1.sink.data == b"\1"


def test_each_written_byte_is_a_new_edge_even_if_nobody_reads_iir(com1: Com1) -> None:
    com1.set_up(ier=0x02)
    before = com1.line.edges
    com1.outb(THR, 1)
    com1.outb(THR, 2)
    assert com1.line.edges == before + 2


def test_a_polled_guest_moves_no_interrupt_line(com1: Com1) -> None:
    com1.set_up()
    com1.line.levels.clear()
    for value in b"hello":
        com1.inb(LSR)
        com1.outb(THR, value)
    assert com1.line.levels == []


def test_the_transmit_fifo_can_be_cleared(com1: Com1) -> None:
    com1.set_up()
    com1.sink.free = 0
    com1.outb(THR, 1)
    com1.outb(FCR, 0x05)
    assert com1.inb(LSR) == IDLE
    com1.sink.free = 100
    com1.uart.drained()
    assert com1.sink.data == b""


# --- receiving ------------------------------------------------------------------------------------------------------


def test_received_bytes_are_read_in_order(com1: Com1) -> None:
    com1.set_up()
    com1.uart.receive(b"hello")
    assert com1.inb(LSR) == IDLE | READY
    assert com1.take() == b"hello"
    assert com1.inb(LSR) == IDLE
    assert com1.inb(RBR) == 0


@pytest.mark.parametrize(("trigger", "level"), [(0x00, 1), (0x40, 4), (0x80, 8), (0xC0, 14)])
def test_below_the_trigger_level_the_character_timeout_is_over_at_once(com1: Com1, trigger: int, level: int) -> None:
    com1.set_up(ier=0x01, fcr=0x01 | trigger)
    for count in range(1, 17):
        com1.uart.receive(b"x")
        assert com1.inb(IIR) == 0xC0 | (RX if count >= level else TIMEOUT)
        assert com1.line.is_up()
    com1.take()
    assert com1.inb(IIR) == 0xC0 | NONE
    assert not com1.line.is_up()
    assert com1.line.edges == 1


def test_without_fifos_one_byte_is_held(com1: Com1) -> None:
    com1.set_up(ier=0x01, fcr=0)
    assert com1.uart.room() == 1
    com1.uart.receive(b"a")
    assert com1.uart.room() == 0
    assert com1.inb(IIR) == RX
    assert com1.take() == b"a"


def test_the_room_is_what_the_fifo_has_left(com1: Com1) -> None:
    com1.set_up()
    com1.uart.receive(b"abc")
    assert com1.uart.room() == 13
    com1.take()
    assert com1.uart.room() == 16


def test_the_sender_hears_of_room_once_after_it_found_none(com1: Com1) -> None:
    com1.set_up()
    com1.uart.receive(bytes(16))
    assert com1.uart.room() == 0
    com1.take()
    assert com1.on_room.count == 1
    com1.uart.receive(b"a")
    com1.take()
    assert com1.on_room.count == 1


def test_more_than_fits_overruns_and_keeps_the_oldest(com1: Com1) -> None:
    com1.set_up(ier=0x05)
    com1.uart.receive(bytes(range(18)))
    assert com1.inb(IIR) == 0xC0 | LINE
    assert com1.inb(LSR) == IDLE | READY | OVERRUN
    assert com1.inb(LSR) == IDLE | READY
    assert com1.inb(IIR) == 0xC0 | RX
    assert com1.take() == bytes(range(16))


def test_without_fifos_the_newest_byte_wins(com1: Com1) -> None:
    com1.set_up(fcr=0)
    com1.uart.receive(b"a")
    com1.uart.receive(b"b")
    assert com1.inb(LSR) == IDLE | READY | OVERRUN
    assert com1.inb(RBR) == ord("b")


@pytest.mark.parametrize("fcr", [0x03, 0x00])
def test_clearing_the_receive_fifo_or_leaving_fifo_mode_drops_what_is_in_it(com1: Com1, fcr: int) -> None:
    com1.set_up(ier=0x01)
    com1.uart.receive(bytes(16))
    assert com1.uart.room() == 0
    com1.outb(FCR, fcr)
    assert com1.inb(LSR) == IDLE
    assert not com1.line.is_up()
    assert com1.on_room.count == 1


def test_fcr_bits_need_the_enable_bit(com1: Com1) -> None:
    com1.outb(FCR, 0xC0)
    assert com1.inb(IIR) == NONE
    assert com1.uart.state.fcr == 0


# --- interrupts -----------------------------------------------------------------------------------------------------


def test_causes_are_told_in_the_order_of_their_priority(com1: Com1) -> None:
    com1.set_up(fcr=0x01, mcr=OUT2)
    com1.outb(MCR, OUT2 | LOOP)  # the modem lines change
    com1.outb(MCR, OUT2)
    com1.uart.receive(bytes(17))
    com1.outb(IER, 0x0F)
    assert com1.inb(IIR) & 0x0F == LINE
    com1.inb(LSR)
    assert com1.inb(IIR) & 0x0F == RX
    com1.take()
    assert com1.inb(IIR) & 0x0F == TX
    assert com1.inb(IIR) & 0x0F == MODEM
    assert com1.line.is_up()
    com1.inb(MSR)
    assert com1.inb(IIR) & 0x0F == NONE
    assert not com1.line.is_up()
    assert com1.line.levels == [True, False]


def test_reading_iir_resets_the_transmitter_interrupt_only_if_it_was_told(com1: Com1) -> None:
    com1.set_up()
    com1.uart.receive(b"a")
    com1.outb(IER, 0x03)
    assert com1.inb(IIR) & 0x0F == RX
    com1.take()
    assert com1.inb(IIR) & 0x0F == TX


def test_out2_gates_the_interrupt(com1: Com1) -> None:
    com1.set_up(ier=0x01, mcr=0)
    com1.uart.receive(b"a")
    assert com1.inb(IIR) & 0x0F == RX
    assert com1.line.levels == []
    com1.outb(MCR, OUT2)
    assert com1.line.is_up()
    com1.outb(MCR, 0)
    assert not com1.line.is_up()


def test_a_disabled_cause_lowers_the_line(com1: Com1) -> None:
    com1.set_up(ier=0x01)
    com1.uart.receive(b"a")
    com1.outb(IER, 0)
    assert not com1.line.is_up()


# --- modem and loopback ---------------------------------------------------------------------------------------------


def test_the_line_is_to_a_terminal_that_is_there(com1: Com1) -> None:
    assert com1.inb(MSR) == 0xB0


@pytest.mark.parametrize(("output", "line"), [(0x01, 0x20), (0x02, 0x10), (0x04, 0x40), (0x08, 0x80)])
def test_loopback_ties_the_outputs_to_the_inputs(com1: Com1, output: int, line: int) -> None:
    com1.outb(MCR, LOOP | output)
    assert com1.inb(MSR) & 0xF0 == line


def test_changes_of_the_modem_lines_are_told_once(com1: Com1) -> None:
    com1.outb(MCR, LOOP | 0x0B)
    com1.inb(MSR)
    com1.outb(MCR, LOOP | 0x0E)  # DTR off, OUT1 on
    assert com1.inb(MSR) == 0xD0 | 0x02  # RI's leading edge is no change
    com1.outb(MCR, LOOP | 0x0A)
    assert com1.inb(MSR) == 0x90 | 0x04
    assert com1.inb(MSR) == 0x90


def test_in_loopback_what_is_sent_is_received_and_goes_nowhere_else(com1: Com1) -> None:
    com1.set_up(ier=0x01, mcr=LOOP | OUT2)
    com1.outb(THR, ord("x"))
    assert com1.sink.data == b""
    assert com1.inb(IIR) & 0x0F == RX
    assert com1.line.levels == []  # the pin OUT2 is inactive
    assert com1.take() == b"x"


def test_in_loopback_the_line_is_cut_off_and_the_sender_waits(com1: Com1) -> None:
    com1.set_up(mcr=LOOP)
    assert com1.uart.room() == 0
    com1.uart.receive(b"lost")
    assert com1.take() == b""
    com1.outb(MCR, OUT2)
    assert com1.on_room.count == 1
    assert com1.uart.room() == 16


# --- reset and live update ------------------------------------------------------------------------------------------


def test_reset_lowers_the_line_and_tells_a_waiting_sender(com1: Com1) -> None:
    com1.set_up(ier=0x03)
    com1.uart.receive(bytes(16))
    com1.uart.room()
    com1.uart.reset()
    assert com1.uart.state == UartState()
    assert not com1.line.is_up()
    assert com1.on_room.count == 1


def test_reset_offers_what_waits_to_the_sink_once_more(com1: Com1) -> None:
    com1.set_up()
    com1.sink.free = 0
    com1.outb(THR, ord("!"))
    com1.sink.free = 1
    com1.uart.reset()
    assert com1.sink.data == b"!"


def test_loading_drives_the_line_and_sends_nothing(com1: Com1) -> None:
    com1.uart.state = UartState(ier=0x01, mcr=OUT2, fcr=0x01, rx_fifo=b"q", tx_fifo=b"waits")
    com1.uart.after_load()
    com1.uart.after_load()
    assert com1.line.levels == [True, True]
    assert com1.sink.data == b""
    com1.uart.drained()
    assert com1.sink.data == b"waits"
    assert com1.inb(RBR) == ord("q")
    assert not com1.line.is_up()


def test_loading_lowers_a_line_that_is_up(com1: Com1) -> None:
    com1.set_up(ier=0x01)
    com1.uart.receive(b"a")
    com1.uart.state = UartState()
    com1.uart.after_load()
    assert not com1.line.is_up()
