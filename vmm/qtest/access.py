"""A machine's `OutsideAccess`.

An access takes the way that a vCPU's takes: RAM is read and written, all other addresses and all ports go to the bus.
A store that an ioeventfd hears rings it instead. Time moves only where the accelerator's clock is moved by hand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol, final

from vmm.errors import DeviceNotFound, InvalidState, OptionInvalid
from vmm.hw.irq import GsiLine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vmm.hw.bus import Bus
    from vmm.hw.device import Device
    from vmm.hw.irq import IrqLines
    from vmm.kvm.memory import GuestMemory
    from vmm.qtest.clock import VirtualClock

PINS: Final = 24
"""Inputs of the IOAPIC. Source: Intel 82093AA data sheet, 2.2."""

IOAPIC: Final = "ioapic"
INPUTS: Final = "unnamed-gpio-in"
OUTPUTS: Final = "sysbus-irq"
"""What QEMU calls the lines of a chip or device that have no name of their own."""

NOT_RAM_LIMIT: Final = 4096
"""Bytes of a long access that may lie outside of RAM, each of which costs an access of its own."""


class Ground(Protocol):
    """What an accelerator has for accesses from outside."""

    @property
    def lines(self) -> IrqLines:
        """The interrupt lines."""

    @property
    def clock(self) -> VirtualClock | None:
        """The clock that is moved by hand; None where time passes by itself."""

    def ring(self, address: int, size: int, value: int, *, port: bool) -> bool:
        """Write the ioeventfds that hear this store; say whether there was one: then the store is done."""


@final
class MachineAccess:
    """Access to one machine. On the loop."""

    def __init__(self, ports: Bus, mmio: Bus, memory: GuestMemory, ground: Ground, devices: Sequence[Device]) -> None:
        """`devices` is looked into at each use: it may grow."""
        self._ports: Final = ports
        self._mmio: Final = mmio
        self._memory: Final = memory
        self._ground: Final = ground
        self._devices: Final = devices

    # --- ports and memory ---

    def read_port(self, port: int, size: int) -> int:
        """Read from a port; one that nobody claims has all ones."""
        return self._ports.read(port, size)

    def write_port(self, port: int, size: int, value: int) -> None:
        """Write to a port."""
        if not self._ground.ring(port, size, value, port=True):
            self._ports.write(port, size, value)

    def load(self, address: int, size: int) -> int:
        """Load from RAM or a device; an address that nobody claims has all ones."""
        if self._is_all_outside(address, size):
            return self._mmio.read(address, size)
        return int.from_bytes(self.read(address, size), "little")

    def store(self, address: int, size: int, value: int) -> None:
        """Store to RAM or a device."""
        if self._is_all_outside(address, size):
            self._store_outside(address, size, value)
        else:
            self.write(address, value.to_bytes(size, "little"))

    def read(self, address: int, size: int) -> bytes:
        """Read bytes; those outside of RAM by aligned loads of 8, 4, 2 or 1."""
        self._check_length("read", address, size)
        data = bytearray()
        for at, count, is_ram in self._parts(address, size):
            if is_ram:
                data += self._memory.read(at, count)
            else:
                for place, width in _accesses(at, count):
                    data += self._mmio.read(place, width).to_bytes(width, "little")
        return bytes(data)

    def write(self, address: int, data: bytes) -> None:
        """Write bytes; those outside of RAM by aligned stores of 8, 4, 2 or 1."""
        self._check_length("write", address, len(data))
        for at, count, is_ram in self._parts(address, len(data)):
            part = data[at - address : at - address + count]
            if is_ram:
                self._memory.write(at, part)
            else:
                for place, width in _accesses(at, count):
                    value = int.from_bytes(part[place - at : place - at + width], "little")
                    self._store_outside(place, width, value)

    def _store_outside(self, address: int, size: int, value: int) -> None:
        if not self._ground.ring(address, size, value, port=False):
            self._mmio.write(address, size, value)

    def _is_all_outside(self, address: int, size: int) -> bool:
        return not any(is_ram for _, _, is_ram in self._parts(address, size))

    def _parts(self, address: int, size: int) -> Iterator[tuple[int, int, bool]]:
        """Cut an access where RAM begins and ends: address, size, and whether it is RAM."""
        end = address + size
        while address < end:
            inside = next((r for r in self._memory.regions if 0 <= address - r.address < r.size), None)
            if inside is not None:
                stop = min(end, inside.address + inside.size)
            else:
                stop = min([end, *(r.address for r in self._memory.regions if r.address > address)])
            yield address, stop - address, inside is not None
            address = stop

    def _check_length(self, what: str, address: int, size: int) -> None:
        outside = sum(count for _, count, is_ram in self._parts(address, size) if not is_ram)
        if outside > NOT_RAM_LIMIT:
            wanted = f"a number of bytes outside of RAM that one {what} can have, which is up to {NOT_RAM_LIMIT}"
            raise OptionInvalid(option=what, value=outside, wanted=wanted)

    # --- interrupt lines ---

    def drive(self, path: str, name: str, number: int, level: bool) -> None:
        """Drive an input of the IOAPIC, the one thing here that has inputs."""
        if _name(path) != IOAPIC:
            raise self._unknown(path, inputs=True)
        if name != INPUTS:
            raise DeviceNotFound(what="Input", name=name, known=f" at {IOAPIC}; there is {INPUTS}")
        if number >= PINS:
            raise OptionInvalid(option="set_irq_in", value=number, wanted=f"an input of the IOAPIC, 0 to {PINS - 1}")
        self._ground.lines.set(number, level)

    def watch(
        self, path: str, name: str | None, *, inputs: bool, tell: Callable[[int, bool], object]
    ) -> Callable[[], None]:
        """Watch the inputs of the IOAPIC by number, or the one output of a device, which is number 0.

        Lines that the kernel drives by itself (with KVM: irqfds and the PIT) are not seen.
        """
        lines = self._ground.lines
        only: int | None = None
        if not inputs:
            only = self._output(path, name)
        elif _name(path) != IOAPIC:
            raise self._unknown(path, inputs=True)
        if lines.observer is not None:
            raise InvalidState(
                what="A second interception of interrupts", state="while another client has one", instead="end that"
            )

        def observe(gsi: int, level: bool) -> None:
            if only is None:
                tell(gsi, level)
            elif gsi == only:
                tell(0, level)

        def stop() -> None:
            if lines.observer is observe:
                lines.observer = None

        lines.observer = observe
        return stop

    def _output(self, path: str, name: str | None) -> int:
        line = self._outputs().get(_name(path))
        if line is None:
            raise self._unknown(path, inputs=False)
        if name not in (None, OUTPUTS):
            raise DeviceNotFound(what="Output", name=str(name), known=f" at {_name(path)}; there is {OUTPUTS}")
        return line

    def _outputs(self) -> dict[str, int]:
        """Return the line of each device that has one, by the device's name."""
        wired = ((device.name, getattr(device, "irq", None)) for device in self._devices)
        return {name: line.gsi for name, line in wired if isinstance(line, GsiLine)}

    def _unknown(self, path: str, *, inputs: bool) -> DeviceNotFound:
        there = [IOAPIC] if inputs else sorted(self._outputs())
        what = "inputs" if inputs else "an output"
        return DeviceNotFound(
            what=f"A device with {what}", name=path, known=f"; there are: {', '.join(there) or 'none'}"
        )

    # --- the clock ---

    def step_clock(self, ns: int | None) -> int:
        """Let time pass."""
        clock = self._clock("clock_step")
        if ns is None:
            raise InvalidState(
                what="clock_step to the next timer", state="while no timer runs", instead="say how many nanoseconds"
            )
        return clock.step(ns)

    def set_clock(self, ns: int) -> int:
        """Let time pass until `ns`."""
        return self._clock("clock_set").set(ns)

    def _clock(self, what: str) -> VirtualClock:
        clock = self._ground.clock
        if clock is None:
            raise InvalidState(
                what=what, state="with accelerator kvm, whose time passes by itself", instead="use accelerator qtest"
            )
        return clock


def _name(path: str) -> str:
    """Return the name at the end of a path: QEMU's clients say either."""
    return path.removeprefix("/machine/").removeprefix("unattached/")


def _accesses(address: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut `size` bytes into aligned accesses, as wide as can be: address and size."""
    end = address + size
    while address < end:
        width = next(width for width in (8, 4, 2, 1) if address % width == 0 and width <= end - address)
        yield address, width
        address += width
