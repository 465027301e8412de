"""The UART under guests that live by its interrupt, through the real interrupt controllers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from tests.hw.fakes import FakeSink
from tests.kvm.tiny import TinyMachine, first_pic
from vmm.hw.board import COM1_GSI, COM1_PORTS
from vmm.hw.bus import Bus
from vmm.hw.debug_exit import DebugExit
from vmm.hw.doorbell import Doorbell, open_doorbell
from vmm.hw.irq import GsiLine
from vmm.hw.uart import Uart
from vmm.kvm.vcpu import Vcpu, run_vcpu

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

pytestmark = pytest.mark.kvm

PATIENCE = 60  # s

READY = range(0x510, 0x511)
"""The port that a guest writes to once its UART is set up: what comes in before is cleared with the FIFOs."""

SET_UP = (
    first_pic(4)
    + """
 mov dx, 0x3fa
 mov al, 7
 out dx, al
 mov dx, 0x3fc
 mov al, 0x0b
 out dx, al
 mov dx, 0x3f9
 mov al, {ier}
 out dx, al
 mov dx, 0x510
 out dx, al
 sti
l: hlt
 jmp l
"""
)

ECHO = (
    SET_UP.format(ier=1)
    + """
isr: mov dx, 0x3fd
 in al, dx
 test al, 1
 jz done
 mov dx, 0x3f8
 in al, dx
 out dx, al
 cmp al, 'q'
 jne isr
 mov dx, 0x501
 out dx, al
done: mov al, 0x20
 out 0x20, al
 iret
"""
)
"""Echoes what it receives, and ends after a q."""

COUNT = (
    SET_UP.format(ier=2)
    + """
n: db 0
isr: mov dx, 0x3f8
 mov al, [n]
 out dx, al
 inc byte [n]
 cmp byte [n], 200
 jne done
 mov dx, 0x3f9
 mov al, 0
 out dx, al
 mov dx, 0x501
 out dx, al
done: mov al, 0x20
 out 0x20, al
 iret
"""
)
"""Sends a byte for each interrupt, without ever reading IIR or LSR, and ends after 200."""


async def run(source: str, sink: FakeSink, serve: Callable[[Uart, Doorbell], Awaitable[None]]) -> None:
    """Run a guest to its end. `serve` runs beside it once it is ready; its bell tells of room for input."""
    with TinyMachine() as m, open_doorbell() as bell:
        bus = Bus()
        vcpu = Vcpu(0, m.fds[0], bus, m.mmio)
        uart = Uart(
            name="com1",
            addresses=(COM1_PORTS,),
            irq=GsiLine(COM1_GSI, m.vm.set_irq),
            sink=sink,
            on_room=bell.ring,
        )
        bus.plug(uart)
        bus.plug(DebugExit(request_exit=lambda status: vcpu.kick()))
        bus.plug(DebugExit(name="ready", addresses=(READY,), request_exit=lambda status: bell.ring()))
        m.boot(source)
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:

                async def run_guest() -> None:
                    stop = await run_vcpu(vcpu, trio.CapacityLimiter(1))
                    assert stop.reason == "kicked"
                    nursery.cancel_scope.cancel()

                nursery.start_soon(run_guest)
                await bell.wait_rung()
                await serve(uart, bell)


async def test_every_byte_that_is_fed_by_room_is_echoed_in_order() -> None:
    text = bytes(value for value in range(256) if value != ord("q")) * 4 + b"q"
    sink = FakeSink()

    async def feed(uart: Uart, bell: Doorbell) -> None:
        left = text
        while left:
            room = uart.room()
            if not room:
                await bell.wait_rung()
            uart.receive(left[:room])
            left = left[room:]

    await run(ECHO, sink, feed)
    assert bytes(sink.data) == text


async def test_a_guest_that_only_writes_is_interrupted_for_each_byte() -> None:
    sink = FakeSink()

    async def leave_alone(uart: Uart, bell: Doorbell) -> None:
        await trio.lowlevel.checkpoint()

    await run(COUNT, sink, leave_alone)
    assert bytes(sink.data) == bytes(range(200))


async def test_a_sink_that_is_mostly_full_slows_the_guest_and_loses_nothing() -> None:
    sink = FakeSink(free=0)

    async def drain(uart: Uart, bell: Doorbell) -> None:
        while True:
            await trio.lowlevel.checkpoint()
            with uart.lock:
                sink.free = 3
            uart.drained()

    await run(COUNT, sink, drain)
    assert bytes(sink.data) == bytes(range(len(sink.data)))
    assert len(sink.data) >= 199  # the last may still wait in the transmitter
