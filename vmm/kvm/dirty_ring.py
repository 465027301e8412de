"""Rings in which each vCPU says what it writes, instead of one log of all memory.

A vCPU puts a page into its ring when it writes to it for the first time since the entry was given back; giving entries
back protects their pages again. So it costs what is written, and not what memory there is; and it is known which vCPU
wrote. A vCPU whose ring is almost full does not go on: its own thread empties it (`tv_run`).

Source: Linux Documentation/virt/kvm/api.rst, 8.29 KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL.
"""

from __future__ import annotations

import errno
import threading
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, ClassVar, Final, final

from vmm import hostio
from vmm.errors import KvmCallFailed, Unsupported
from vmm.kvm._kvm import ffi, lib
from vmm.kvm.calls import checked
from vmm.kvm.memory import PAGE_SIZE, GuestMemory
from vmm.kvm.page_map import PageMap
from vmm.kvm.vcpu import Vcpu

if TYPE_CHECKING:
    from vmm.kvm.system import Kvm
    from vmm.kvm.vcpu_fd import VcpuFd


@final
class DirtyRings:
    """The rings of one VM's vCPUs. For one thread at a time, while others run the vCPUs."""

    ENTRY_SIZE: ClassVar[int] = 16

    def __init__(self, vm_fd: int, entries: int) -> None:
        self.entries: Final = entries
        self._rings: Final = ffi.new("struct tv_rings *")
        lib.tv_rings_prepare(self._rings, vm_fd)
        self._vcpus: Final[list[VcpuFd]] = []
        self._map: PageMap | None = None

    def add(self, vcpu: VcpuFd) -> None:
        """Map the ring of a vCPU that was just made. Raises `KvmCallFailed`."""
        checked(lib.tv_cpu_map_ring(vcpu.cpu, self._rings, self.entries), "mmap", f"dirty ring of vCPU {vcpu.index}")
        self._vcpus.append(vcpu)

    def begin(self, memory: GuestMemory) -> None:
        """Collect from here on, for slots that are numbered as the regions of `memory`."""
        self._rings.slots = len(memory.regions)
        for slot, region in enumerate(memory.regions):
            self._rings.first[slot] = region.offset // PAGE_SIZE
            self._rings.pages[slot] = region.size // PAGE_SIZE
        self._map = PageMap(memory.size // PAGE_SIZE)
        lib.tv_rings_use(self._rings, self._map.words)

    def end(self) -> None:
        """Collect no more."""
        self._empty(None)
        lib.tv_rings_use(self._rings, ffi.NULL)
        self._map = None

    def collect(self, into: PageMap) -> None:
        """Put every page into the set that was written since `begin`, or the last call.

        Raises:
            KvmCallFailed: likewise if a vCPU has gone on though its ring was full: then some are missing.
        """
        self._empty(into)

    def taken(self) -> list[int]:
        """Return for each vCPU how many pages it has put into its ring that were taken out, since it was made."""
        return [vcpu.cpu.ring.taken for vcpu in self._vcpus]

    def _empty(self, into: PageMap | None) -> None:
        cpus = ffi.new("struct tv_cpu *[]", [vcpu.cpu for vcpu in self._vcpus])
        words = ffi.NULL if into is None else ffi.cast("uint64_t *", into.address)
        count = 0 if into is None else -(-into.pages // 64)
        result = lib.tv_rings_collect(self._rings, cpus, len(self._vcpus), words, count)
        over = "a ring that was written over, so that not all that was written is known"
        checked(result, "KVM_RESET_DIRTY_RINGS", over if result == -errno.EOVERFLOW else "")


# --- whether they work here -------------------------------------------------------------------------------

_WRITES: Final = bytes.fromhex(
    "0f01162a100f20c00c010f22c0ea301008000000000000000000ffff0000009bcf00ffff00000093cf0017001210000066b8"
    "10008ed8bb00001000b9000c0000c6030181c3001000004975f4e699ebe6"
)
"""Real mode, from 0x1000 on: goes to flat 32-bit code; stores into 3072 pages from 1 MiB on, `out 0x99, al`, and again:

    lgdt [gdtr]; mov eax, cr0; or al, 1; mov cr0, eax; jmp 8:flat
    gdt: dq 0, 0x00cf9b000000ffff, 0x00cf93000000ffff; gdtr: dw 23; dd gdt
    flat: mov ax, 16; mov ds, ax
    again: mov ebx, 0x100000; mov ecx, 3072
    next: mov byte [ebx], 1; add ebx, 4096; dec ecx; jnz next; out 0x99, al; jmp again
"""
_AT: Final = 0x1000
_FIRST: Final = (1 << 20) // PAGE_SIZE
_RING: Final = 1024
_COUNT: Final = 3 * _RING
_SIZE: Final = (_FIRST + _COUNT) * PAGE_SIZE
_WITHIN: Final = 10.0
"""Seconds for some twenty thousand instructions, on a host however busy."""

_ROUNDS: Final = 16
"""Again and again, the entries given back between: where rings lose pages, they do not each time."""


def require_working_rings(kvm: Kvm) -> None:
    """Run a few instructions of a guest, and see whether its ring, which is too small for it, says what they write.

    There are hosts on which a vCPU whose ring is full goes on, and what it writes is forgotten.

    Raises:
        KvmExtensionMissing: this host has no such rings.
        Unsupported: it has, and they do not work.
    """
    if not _work(kvm):
        instead = "this host's KVM has dirty rings, but they do not say what a guest writes; leave it out"
        raise Unsupported(what="Accelerator property", name="dirty-ring-size", instead=instead)


def _work(kvm: Kvm) -> bool:
    with ExitStack() as stack:
        memory = stack.enter_context(
            closing(GuestMemory.from_memfd(hostio.create_ram(_SIZE, "dirty-ring-probe"), _SIZE))
        )
        vm = stack.enter_context(closing(kvm.create_vm()))
        vm.use_dirty_rings(_RING)
        assert vm.rings is not None
        vm.set_memory_slot(0, 0, memory.hva(0), _SIZE, log_dirty=True)
        fd = stack.enter_context(closing(vm.create_vcpu(0)))
        memory.write(_AT, _WRITES)
        fd.set_registers({"cs": 0, "ds": 0, "es": 0, "ss": 0, "rip": _AT, "rsp": 0xF00, "rflags": 2})
        ports = _Port()
        vcpu = Vcpu(0, fd, ports, ports)
        ports.vcpu = vcpu
        watchdog = threading.Timer(_WITHIN, vcpu.kick)
        stack.callback(watchdog.join)
        stack.callback(watchdog.cancel)
        vm.rings.begin(memory)
        watchdog.start()
        for _ in range(_ROUNDS):
            before = ports.writes
            vcpu.enter(lambda: None)
            found = PageMap(_SIZE // PAGE_SIZE)
            try:
                vm.rings.collect(found)
            except KvmCallFailed:
                return False
            if ports.writes == before or found.count(_FIRST) != _COUNT:
                return False
        return True


class _Port:
    """Where the probe's guest says that it is done."""

    vcpu: Vcpu

    def __init__(self) -> None:
        self.writes = 0

    def read(self, address: int, size: int) -> int:
        return 0

    def write(self, address: int, size: int, value: int) -> None:
        self.writes += 1
        self.vcpu.kick()
