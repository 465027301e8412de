"""Tiny machines: a few KiB of guest code on the real /dev/kvm, assembled as the test runs."""

from __future__ import annotations

import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Self, final

import attrs

from vmm.hostio import create_ram
from vmm.kvm.cpuid import guest_cpuid
from vmm.kvm.memory import GuestMemory
from vmm.kvm.system import Kvm
from vmm.kvm.vcpu import Vcpu

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from vmm.kvm.exits import Stop
    from vmm.kvm.vcpu_fd import VcpuFd
    from vmm.kvm.vm import Vm

RAM_SIZE = 512 << 10
MMIO = 0xA0000
"""No RAM there: what a guest stores at or loads from it, the test sees."""
ENTRY = 0x1000
KICK_PORT = 0x99
"""A guest that writes here is out of the guest before its next instruction."""

PROTECTED_MODE = """
 lgdt [gdtr]
 mov eax, cr0
 or al, 1
 mov cr0, eax
 jmp 8:flat
gdt: dq 0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00af9b000000ffff
gdtr: dw 31
 dd gdt
bits 32
flat: mov ax, 16
 mov ds, ax
 mov es, ax
 mov ss, ax
 mov esp, 0xf00
"""
"""Goes on in flat 32-bit code, without paging. Selector 24 is 64-bit code."""

LONG_MODE = (
    PROTECTED_MODE
    + """
 mov dword [0x10000], 0x11003
 mov dword [0x11000], 0x12003
 mov dword [0x11018], 0x13003
 mov dword [0x12000], 0x83
 mov dword [0x13fb8], 0xfee0009b
 mov eax, cr4
 or eax, 0x20
 mov cr4, eax
 mov eax, 0x10000
 mov cr3, eax
 mov ecx, 0xc0000080
 rdmsr
 or eax, 0x100
 wrmsr
 mov eax, cr0
 or eax, 0x80000000
 mov cr0, eax
 jmp 24:in_long_mode
bits 64
in_long_mode:
"""
)
"""Goes on in 64-bit code. The first 2 MiB are mapped, and the 2 MiB of the LAPIC, uncached."""


def first_pic(line: int) -> str:
    """Code that has interrupts of `line`, 0 to 7, and of no other, go to `isr`; they are off still."""
    vector, mask = 8 + line, 0xFF ^ 1 << line
    return f"""
 cli
 mov word [{vector}*4], isr
 mov word [{vector}*4+2], 0
 mov al, 0x11
 out 0x20, al
 mov al, 8
 out 0x21, al
 mov al, 4
 out 0x21, al
 mov al, 1
 out 0x21, al
 mov al, {mask}
 out 0x21, al
"""


PIT_AT_100_HZ = (
    first_pic(0)
    + """
 mov al, 0x34
 out 0x43, al
 mov ax, 11932
 out 0x40, al
 mov al, ah
 out 0x40, al
 sti
l: hlt
 inc dword [0x8000]
 mov eax, [0x8000]
 out 0x80, eax
 jmp l
isr: push ax
 mov al, 0x20
 out 0x20, al
 pop ax
 iret
"""
)
"""Counts ticks at 0x8000, and writes the count to port 0x80 after each."""

INTERRUPT_ON_GSI_4 = (
    first_pic(4)
    + """
 sti
 out 0x99, al
l: hlt
 jmp l
isr: mov al, 0x20
 out 0x20, al
 out 0x99, al
 iret
"""
)
"""Leaves the guest when it is ready for interrupts, and with each one of line 4."""


def assemble(source: str, origin: int = ENTRY) -> bytes:
    """Assemble 16-bit code (unless `source` says otherwise) for guest address `origin`."""
    with tempfile.TemporaryDirectory() as directory:
        path, out = Path(directory) / "guest.asm", Path(directory) / "guest.bin"
        path.write_text(f"bits 16\norg {origin:#x}\n{source}\n")
        subprocess.run(["nasm", "-f", "bin", "-o", out, path], check=True)
        return out.read_bytes()


@final
@attrs.define
class Recorder:
    """An `IoSpace` that keeps what the guest wrote, and answers reads with `answer`."""

    written: list[tuple[int, int, int]] = attrs.Factory(list)
    reads: list[tuple[int, int]] = attrs.Factory(list)
    answer: Callable[[int, int], int] = lambda address, size: 0
    on_write: Callable[[int, int], object] = lambda address, value: None

    def read(self, address: int, size: int) -> int:
        self.reads.append((address, size))
        return self.answer(address, size)

    def write(self, address: int, size: int, value: int) -> None:
        self.written.append((address, size, value))
        self.on_write(address, value)


@final
class TinyMachine:
    """A VM with `count` vCPUs over a RAM memfd, all of it closed at the end of the `with` block."""

    kvm: Kvm
    vm: Vm
    memory: GuestMemory
    fds: list[VcpuFd]
    vcpus: list[Vcpu]

    def __init__(
        self, count: int = 1, *, ram: int | None = None, chips: bool = True, size: int = RAM_SIZE, rings: int = 0
    ) -> None:
        """`ram` is a memfd to take over (made anew otherwise); without `chips` there are no interrupt controllers.

        `rings`: entries of the ring in which each vCPU says what it writes; 0 for none.
        """
        self._rings = rings
        self._ram = ram
        self._count = count
        self._chips = chips
        self._size = size
        self._stack = ExitStack()
        self.ports = Recorder(on_write=self._kick_on_demand)
        self.mmio = Recorder()

    def _kick_on_demand(self, address: int, value: int) -> None:
        if address == KICK_PORT:
            for vcpu in self.vcpus:
                vcpu.kick()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.kvm = Kvm.open()
            stack.callback(self.kvm.close)
            fd = create_ram(self._size, "tiny") if self._ram is None else self._ram
            self.memory = GuestMemory.from_memfd(fd, self._size)
            stack.callback(self.memory.close)
            self.vm = self.kvm.create_vm()
            stack.callback(self.vm.close)
            if self._rings:
                self.vm.use_dirty_rings(self._rings)
            for slot, region in enumerate(self.memory.regions):
                self.vm.set_memory_slot(slot, region.address, self.memory.hva(region.offset), region.size)
            if self._chips:
                self.vm.create_irqchip()
                self.vm.create_pit()
            self.fds = []
            self.vcpus = []
            deadline = bool(self.kvm.extension("KVM_CAP_TSC_DEADLINE_TIMER"))
            for index in range(self._count):
                vcpu = self.vm.create_vcpu(index)
                stack.callback(vcpu.close)
                vcpu.set_cpuid(guest_cpuid(self.kvm.supported_cpuid(), index, self._count, deadline))
                self.fds.append(vcpu)
                self.vcpus.append(Vcpu(index, vcpu, self.ports, self.mmio))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def boot(self, source: str) -> None:
        """Put real-mode code at ENTRY, and vCPU 0 at its first byte with interrupts off and a stack below it."""
        self.memory.write(ENTRY, assemble(source))
        self.fds[0].set_registers({"cs": 0, "ds": 0, "es": 0, "ss": 0, "rip": ENTRY, "rsp": 0xF00, "rflags": 2})

    def run(self, index: int = 0) -> Stop:
        """Run one vCPU on this thread until it stops."""
        return self.vcpus[index].enter(lambda: None)

    def word(self, address: int) -> int:
        """The 32-bit word at a guest address."""
        return int.from_bytes(self.memory.read(address, 4), "little")

    def outs(self, port: int) -> list[int]:
        """The values that the guest wrote to a port."""
        return [value for address, _, value in self.ports.written if address == port]
