"""Put the boot processor where a plan says that it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.kvm._kvm import ffi
from vmm.kvm.calls import call_with

if TYPE_CHECKING:
    from vmm.hw.boot.plan import CpuStart, Segment
    from vmm.kvm._kvm import CData
    from vmm.kvm.vcpu_fd import VcpuFd


def set_start(vcpu: VcpuFd, start: CpuStart) -> None:
    """Set general, segment and control registers of `vcpu` to `start`; it must not be inside KVM_RUN.

    What `start` does not name keeps its value, so the vCPU is to be as KVM resets it.

    Raises:
        KvmCallFailed: KVM refused the registers.
    """
    context = f"vCPU {vcpu.index}"
    sregs = ffi.new("struct kvm_sregs *")
    call_with(vcpu.fd, "KVM_GET_SREGS", sregs, context=context)
    _fill(sregs.cs, start.code)
    for name in ("ds", "es", "fs", "gs", "ss"):
        _fill(getattr(sregs, name), start.data)
    if start.task is not None:
        _fill(sregs.tr, start.task)
    for register, table in ((sregs.gdt, start.gdt), (sregs.idt, start.idt)):
        register.base = table.start
        register.limit = max(len(table) - 1, 0)
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = start.cr0, start.cr3, start.cr4, start.efer
    call_with(vcpu.fd, "KVM_SET_SREGS", sregs, context=context)
    regs = ffi.new("struct kvm_regs *")
    regs.rip, regs.rsp, regs.rbx, regs.rsi = start.rip, start.rsp, start.rbx, start.rsi
    regs.rflags = start.rflags
    call_with(vcpu.fd, "KVM_SET_REGS", regs, context=context)


def _fill(register: CData, segment: Segment) -> None:
    register.selector, register.base, register.limit = segment.selector, segment.base, segment.limit
    register.type, register.s, register.db = segment.type, segment.s, segment.db
    register.l, register.g = segment.l, segment.g
    register.present, register.dpl, register.avl = 1, 0, 0
