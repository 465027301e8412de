"""A vCPU descriptor: registers, CPUID, state."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, final

from vmm.errors import KvmCallFailed, KvmExtensionMissing
from vmm.kvm._kvm import ffi, lib
from vmm.kvm.calls import call, call_with, checked
from vmm.kvm.clock import clock_distance
from vmm.kvm.state_buffers import VcpuBuffers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vmm.kvm.cpuid import CpuidEntry
    from vmm.kvm.state import VcpuState

GENERAL_REGISTERS = (
    "rip",
    "rsp",
    "rax",
    "rbx",
    "rcx",
    "rdx",
    "rsi",
    "rdi",
    "rbp",
    "r8",
    "r9",
    "r10",
    "r11",
    "r12",
    "r13",
    "r14",
    "r15",
    "rflags",
)  # in the order of a report
CONTROL_REGISTERS = ("cr0", "cr2", "cr3", "cr4", "efer")
SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss")

# struct kvm_vcpu_events: parts of the structure that a flag calls valid, and the extension that knows the flag.
EVENT_FLAGS_OF_ALL_HOSTS = 0x0F
EVENT_FLAG_OF_EXTENSION = (("KVM_CAP_EXCEPTION_PAYLOAD", 0x10), ("KVM_CAP_X86_TRIPLE_FAULT_EVENT", 0x20))


@final
class VcpuFd:
    """One vCPU of the kernel's, with its mapped struct kvm_run (`cpu`, as binding.h declares it).

    While a thread is inside KVM_RUN, every other method waits until it leaves; so use them when it is out.
    """

    def __init__(
        self, fd: int, index: int, vm: int, run_size: int, msr_indices: Sequence[int], *, has_lapic: bool
    ) -> None:
        self._fd = fd
        self.index = index
        self._context = f"vCPU {index}"
        self._msr_indices = msr_indices
        self._has_lapic = has_lapic
        self._to_take_up = False
        self.cpu = ffi.new("struct tv_cpu *")

        def offers(name: str) -> int:
            return call(vm, "KVM_CHECK_EXTENSION", getattr(lib, name), context=name)

        attribute = ffi.new("struct kvm_device_attr *")
        attribute.group = lib.KVM_VCPU_TSC_CTRL
        attribute.attr = lib.KVM_VCPU_TSC_OFFSET
        if lib.tv_ioctl_ptr(fd, lib.KVM_HAS_DEVICE_ATTR, attribute) < 0:
            raise KvmExtensionMissing(name="KVM_VCPU_TSC_OFFSET (Linux 5.16)", user="handing over a running guest")
        events = EVENT_FLAGS_OF_ALL_HOSTS
        for name, flag in EVENT_FLAG_OF_EXTENSION:
            if offers(name):
                events |= flag
        self._buffers = VcpuBuffers(
            self._context,
            # 0 means that only the 4096 bytes of KVM_GET_XSAVE are known here.
            max(offers("KVM_CAP_XSAVE2"), 4096),
            bool(offers("KVM_CAP_SREGS2")),
            bool(offers("KVM_CAP_XCRS")),
            events,
        )
        # As the vCPU is made, its TSC counts at the host's rate.
        self.host_tsc_khz = call(fd, "KVM_GET_TSC_KHZ", context=self._context)
        self._note_tsc_khz()
        self._prepare()
        checked(lib.tv_cpu_map(self.cpu, fd, run_size), "mmap", self._context)

    @property
    def fd(self) -> int:
        """The descriptor; -1 after `close`."""
        return self._fd

    @property
    def tsc_khz(self) -> int:
        """How fast the guest's TSC counts; `host_tsc_khz` is how fast the host's does."""
        return int.from_bytes(self._buffers.tsc_khz[:4], "little")

    def set_cpuid(self, entries: Sequence[CpuidEntry]) -> None:
        """Say what the guest's CPUID answers. Before the first entry, and before any state is loaded.

        Raises:
            KvmCallFailed: KVM does not take it, or the vCPU has run already.
        """
        table = ffi.new("struct tv_cpuid *")
        table.count = len(entries)
        for to, entry in zip(table.entries[0 : len(entries)], entries, strict=True):
            to.function, to.index, to.flags = entry.function, entry.index, entry.flags
            to.eax, to.ebx, to.ecx, to.edx = entry.eax, entry.ebx, entry.ecx, entry.edx
        call_with(self._fd, "KVM_SET_CPUID2", table, context=self._context)
        self._prepare()

    def set_registers(self, values: Mapping[str, int]) -> None:
        """Change general, control and segment registers by name; those not named keep their values.

        A segment is set as real mode has it: "cs": 0x1000 also makes its base 0x10000.
        """
        regs = ffi.new("struct kvm_regs *")
        sregs = ffi.new("struct kvm_sregs *")
        call_with(self._fd, "KVM_GET_REGS", regs, context=self._context)
        call_with(self._fd, "KVM_GET_SREGS", sregs, context=self._context)
        for name, value in values.items():
            if name in SEGMENTS:
                segment = getattr(sregs, name)
                segment.selector = value
                segment.base = value << 4
            else:
                setattr(regs if name in GENERAL_REGISTERS else sregs, name, value)
        call_with(self._fd, "KVM_SET_SREGS", sregs, context=self._context)
        call_with(self._fd, "KVM_SET_REGS", regs, context=self._context)

    def set_msr(self, index: int, value: int) -> None:
        """Write a model-specific register.

        Raises:
            KvmCallFailed: this vCPU has it not, or it does not take the value.
        """
        if not lib.tv_one_msr(self._fd, lib.KVM_SET_MSRS, index, ffi.new("uint64_t *", value)):
            raise KvmCallFailed(ioctl="KVM_SET_MSRS", errno=errno.EINVAL, context=f"MSR {index:#x} of {self._context}")

    def registers(self) -> dict[str, int]:
        """Return general registers, rflags, cs and cs_base, cr0 to cr4 and efer, by name."""
        regs = ffi.new("struct kvm_regs *")
        sregs = ffi.new("struct kvm_sregs *")
        call_with(self._fd, "KVM_GET_REGS", regs, context=self._context)
        call_with(self._fd, "KVM_GET_SREGS", sregs, context=self._context)
        values = {name: getattr(regs, name) for name in GENERAL_REGISTERS}
        values["cs"] = sregs.cs.selector
        values["cs_base"] = sregs.cs.base
        values.update((name, getattr(sregs, name)) for name in CONTROL_REGISTERS)
        return values

    def save_mp_state(self) -> None:
        """First half of `save`; for all vCPUs, before the second half of any."""
        self._buffers.save_mp_state(self._fd)

    def save_rest(self) -> VcpuState:
        """Second half of `save`."""
        self.take_up()
        return self._buffers.save(self._fd)

    def save(self) -> VcpuState:
        """Read the vCPU's whole state. It must be out of `Vcpu.enter`. A machine wants `save_machine` instead.

        Raises:
            KvmCallFailed: naming the ioctl, and the MSR if it was that.
        """
        self.save_mp_state()
        return self.save_rest()

    def check(self, state: VcpuState) -> None:
        """Find out, without changing anything, whether `state` has the sizes of this host.

        Raises:
            StateRejected: naming every member that does not fit.
        """
        self._buffers.check(state)

    def load_first(self, state: VcpuState, tsc_offset: bytes, *, passed_ticks: int = 0) -> None:
        """Load what comes before the VM's chips. `state` must have passed `check`.

        `passed_ticks` of the guest's TSC have passed since the state was saved, for all that `tsc_offset` says: by as
        much it may fall short without being seen to step back.
        """
        khz = int.from_bytes(state.tsc_khz[:4], "little")
        if khz != self.tsc_khz:
            self._set_tsc_khz(khz)
        self._buffers.fill(state, tsc_offset)
        taken = self._buffers.load_first(self._fd)
        # KVM-PVM gives guests the TSC of the host, whatever the offset. A leap ahead they can live with.
        if clock_distance(taken, int.from_bytes(tsc_offset, "little")) < -passed_ticks:
            raise KvmExtensionMissing(
                name="a TSC offset that takes effect", user="a guest whose TSC is ahead of the host's"
            )

    def load_last(self) -> None:
        """Load what comes after the VM's chips, of the state that `load_first` was given."""
        self._buffers.load_last(self._fd)
        self._to_take_up = True

    def take_up(self) -> None:
        """Finish a load: let KVM have the guest's clock page. `Vcpu.enter` and `save` do it, at no cost otherwise.

        Only the owner of the guest may: it writes to guest memory, which loading did not.

        Raises:
            KvmCallFailed: naming the MSR.
        """
        if self._to_take_up:
            self._buffers.take_up(self._fd)
            self._to_take_up = False

    def load(self, state: VcpuState) -> None:
        """Write a vCPU's whole state, in the same boot of the same host. A machine wants `load_machine` instead.

        Raises:
            StateRejected: a member has not the size that this host's KVM wants.
            KvmCallFailed: naming the ioctl, and the MSR if it was that.
            KvmExtensionMissing: the guest's TSC counts at a rate that this host cannot give.
        """
        self.check(state)
        self.load_first(state, state.tsc_offset)
        self.load_last()

    def note_pause(self) -> None:
        """Tell a guest with kvmclock that it was stopped, so that its watchdogs forgive the gap. Others need not know.

        For a pause and a resume in this process; `load_machine` does it by itself. Touches no guest memory before the
        next entry.
        """
        lib.tv_ioctl(self._fd, lib.KVM_KVMCLOCK_CTRL, 0)  # EINVAL: the guest has no kvmclock

    def close(self) -> None:
        """Unmap, and close the descriptor. No thread may be inside. Closing twice is harmless."""
        if self._fd >= 0:
            lib.tv_cpu_unmap(self.cpu)
            os.close(self._fd)
            self._fd = -1

    def _prepare(self) -> None:
        self._buffers.prepare(self._fd, self._msr_indices)
        # The LAPIC's registers want one to be there: not so in a VM without chips, whose state nobody asks for.
        if self._has_lapic:
            self.save()  # touches every page of the buffers now, instead of inside the first pause

    def _note_tsc_khz(self) -> None:
        guest = call(self._fd, "KVM_GET_TSC_KHZ", context=self._context)
        self._buffers.tsc_khz = guest.to_bytes(4, "little") + self.host_tsc_khz.to_bytes(4, "little")

    def _set_tsc_khz(self, khz: int) -> None:
        if lib.tv_ioctl(self._fd, lib.KVM_SET_TSC_KHZ, khz) < 0:
            raise KvmExtensionMissing(name="KVM_CAP_TSC_CONTROL", user=f"a guest whose TSC counts at {khz} kHz")
        self._note_tsc_khz()
