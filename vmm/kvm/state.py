"""The state of vCPUs and of the in-kernel chips: KVM's structures, as bytes.

Inside a pause they are only copied. Who stores or sends them may look into them before or after.
"""

from __future__ import annotations

from typing import final

import attrs


@final
@attrs.frozen(kw_only=True)
class VcpuState:
    """One vCPU. Members are named after the ioctl that reads them, and stand in the order of loading.

    `sregs` is always struct kvm_sregs2. `msrs` is an array of struct kvm_msr_entry, without IA32_TSC,
    IA32_TSC_DEADLINE, IA32_APICBASE and the wall clock. `tsc_offset` and `tsc_deadline` are 64-bit words, `tsc_khz`
    two of 32 bits, the rate of the guest's TSC and of its host's; all little-endian.

    Source: Linux Documentation/virt/kvm/api.rst.
    """

    regs: bytes
    xsave: bytes
    xcrs: bytes
    sregs: bytes
    lapic: bytes
    msrs: bytes
    tsc_offset: bytes
    debugregs: bytes
    events: bytes
    tsc_deadline: bytes
    mp_state: bytes
    tsc_khz: bytes


@final
@attrs.frozen(kw_only=True)
class ChipState:
    """The chips and the clock of a VM.

    `pic0`, `pic1` and `ioapic` are struct kvm_irqchip, `pit` struct kvm_pit_state2, `clock` struct kvm_clock_data.
    `moment` says when it was read, by the host's clocks and TSC, and in which boot of which host: struct tv_moment.
    """

    pic0: bytes
    pic1: bytes
    ioapic: bytes
    pit: bytes
    clock: bytes
    moment: bytes
