"""The devices that the conformance suite walks over: how to make each, and how to get it busy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from tests.hw.fakes import Calls, FakeClock, FakeLine, FakeSink
from tests.hw.virtio.driver import Driver, FakeRam
from vmm.hw.acpi_pm import AcpiPm
from vmm.hw.board import COM1_PORTS, virtio_addresses
from vmm.hw.debug_exit import DebugExit
from vmm.hw.i8042 import I8042
from vmm.hw.legacy import PostCode, SystemControlA
from vmm.hw.rtc import Rtc
from vmm.hw.uart import Uart
from vmm.hw.virtio.mmio import VirtioMmio
from vmm.hw.virtio.rng import VirtioRng

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

    from vmm.hw.device import Device


@attrs.define(eq=False)
class Bench:
    """What a device is wired to."""

    line: FakeLine = attrs.Factory(FakeLine)
    sink: FakeSink = attrs.Factory(lambda: FakeSink(free=5))
    clock: FakeClock = attrs.Factory(FakeClock)
    callback: Calls = attrs.Factory(Calls)
    ram: FakeRam = attrs.Factory(FakeRam)


@attrs.frozen
class Case:
    """One device."""

    name: str
    make: Callable[[Bench], Device]
    keep_busy: Callable[[Device], None]
    """Brings a new device into the middle of some activity, with an interrupt pending if it has one."""
    survives_reset: frozenset[str] = frozenset()
    """State that a power-on finds as it was left: a battery feeds it."""

    def __str__(self) -> str:
        return self.name


def uart(bench: Bench) -> Uart:
    return Uart(name="com1", addresses=(COM1_PORTS,), irq=bench.line, sink=bench.sink, on_room=bench.callback)


def busy_uart(device: Device) -> None:
    """Both FIFOs hold bytes, one was lost, and the modem lines have changed."""
    assert isinstance(device, Uart)
    for offset, value in (
        (3, 0x83),
        (0, 0x01),
        (1, 0x02),
        (3, 0x03),
        (2, 0x81),
        (4, 0x1C),
        (4, 0x0B),
        (1, 0x0F),
        (7, 0x5A),
    ):
        device.write(offset, 1, value)
    for value in b"0123456789":  # more than the sink takes
        device.write(0, 1, value)
    device.receive(b"abcdefghijklmnopqr")


def busy_i8042(device: Device) -> None:
    """A byte waits to be read, and the data of a command is awaited."""
    device.write(0, 1, 0xF2)
    device.write(4, 1, 0x60)


def busy_rtc(device: Device) -> None:
    """The time is being set."""
    for address, value in ((0x0A, 0x2F), (0x40, 0x12), (0x04, 0x01), (0x0B, 0xF6), (0x08, 0x02), (0x07, 0x1F)):
        device.write(0, 1, address)
        device.write(1, 1, value)


def busy_acpi_pm(device: Device) -> None:
    """A sleep type is chosen, and events are enabled."""
    device.write(2, 2, 0x0321)
    device.write(4, 2, 0x1402)


def busy_port(device: Device) -> None:
    """Hold a value."""
    device.write(0, 1, 0x01)


def virtio_rng(bench: Bench) -> VirtioMmio:
    return VirtioMmio(
        name="virtio-mmio-bus.0",
        addresses=(virtio_addresses(0),),
        irq=bench.line,
        ram=bench.ram,
        function=VirtioRng(),
        kick=bench.callback,
        held=False,
    )


def busy_virtio(device: Device) -> None:
    """One of two requests is answered, and the guest has not acknowledged the interrupt."""
    assert isinstance(device, VirtioMmio)
    ram = device.ram
    assert isinstance(ram, FakeRam)
    driver = Driver(device, ram)
    driver.start()
    driver.request(0)
    driver.request(1)
    device.answer(0, b"0123456789abcdef")
    driver.write(0x14, 1)


CASES: Final = (
    Case("uart", uart, busy_uart),
    Case("i8042", lambda bench: I8042(irq=bench.line, request_reset=bench.callback), busy_i8042),
    Case("rtc", lambda bench: Rtc(now_ns=bench.clock), busy_rtc, frozenset({"offset", "a", "b", "memory"})),
    Case("debug-exit", lambda bench: DebugExit(request_exit=bench.callback), busy_port),
    Case("post-code", lambda bench: PostCode(), busy_port),
    Case("acpi-pm", lambda bench: AcpiPm(request_power_off=bench.callback), busy_acpi_pm),
    Case("virtio-rng", virtio_rng, busy_virtio),
    Case("system-control-a", lambda bench: SystemControlA(request_reset=bench.callback), busy_port),
)
