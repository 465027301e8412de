"""A built-in guest on the real /dev/kvm, with a serial port that is just good enough for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.hw.boot.image import plan_boot
from vmm.hw.boot.plan import BinarySource, BootPlan, Data, Zeros
from vmm.hw.boot.start import set_start

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.kvm.tiny import TinyMachine

RAM_SIZE = 16 << 20
COM1 = 0x3F8
LSR = COM1 + 5
LCR = COM1 + 3
DEBUG_EXIT = 0x501


def carry_out(plan: BootPlan, machine: TinyMachine) -> None:
    """Write what `plan` says into the machine's RAM, and set its first vCPU."""
    for write in plan.writes:
        match write:
            case Data():
                machine.memory.write(write.address, write.data)
            case Zeros():
                machine.memory.write(write.address, bytes(write.size))
            case _:
                raise AssertionError("these tests use bytes")
    set_start(machine.fds[0], plan.start)


def boot(machine: TinyMachine, image: Path, cmdline: str = "", size: int = RAM_SIZE) -> Lines:
    """Load `image` and return its console. The guest then runs by `machine.run()`, until it is kicked or it exits."""
    plan = plan_boot(BinarySource.from_bytes(image.name, image.read_bytes()), None, cmdline, size, 1)
    carry_out(plan, machine)
    return Lines(machine)


class Lines:
    """What the guest prints. `until` kicks it out when a line says so; so does a value on the debug exit port."""

    def __init__(self, machine: TinyMachine) -> None:
        self.text = ""
        self.exit_value: int | None = None
        self.until: Callable[[str], bool] = lambda line: False
        self._machine = machine
        self._latch = False
        machine.ports.answer = lambda address, size: 0x60 if address == LSR else 0
        machine.ports.on_write = self._write

    @property
    def whole(self) -> list[str]:
        """The lines that are complete."""
        return self.text.split("\r\n")[:-1]

    def _write(self, address: int, value: int) -> None:
        if address == LCR:
            self._latch = bool(value & 0x80)
        elif address == COM1 and not self._latch:
            self.text += chr(value)
            if value == 10 and self.until(self.whole[-1]):
                self._machine.vcpus[0].kick()
        elif address == DEBUG_EXIT:
            self.exit_value = value
            self._machine.vcpus[0].kick()
