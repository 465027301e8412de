"""Saving and loading all that KVM knows of a machine, in the order that keeps interrupts and time whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.errors import StateRejected
from vmm.kvm._kvm import ffi, lib
from vmm.kvm.clock import Moment, moved_tsc_offset

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.kvm.state import ChipState, VcpuState
    from vmm.kvm.vcpu_fd import VcpuFd
    from vmm.kvm.vm import Vm


def save_machine(vm: Vm, vcpus: Sequence[VcpuFd]) -> tuple[list[VcpuState], ChipState]:
    """Read the state of all vCPUs and chips. Every vCPU must be out of `Vcpu.enter`; nothing is changed.

    Takes about 0.1 ms and 0.1 ms more per vCPU. The order is part of what is right: MP_STATE first, of all vCPUs, since
    reading it makes KVM act on pending INIT and start-up interrupts, which changes registers; then the chips before the
    LAPICs, since interrupts travel that way (the PIT ticks on while it is being read).

    Raises:
        KvmCallFailed: naming the ioctl, the vCPU, and the MSR if it was that.
    """
    for vcpu in vcpus:
        vcpu.save_mp_state()
    chips = vm.save_chips()
    return [vcpu.save_rest() for vcpu in vcpus], chips


def check_machine(vm: Vm, vcpus: Sequence[VcpuFd], states: Sequence[VcpuState], chips: ChipState) -> None:
    """Find out, without changing anything, whether the states have this machine's number and this host's sizes.

    Raises:
        StateRejected: naming what does not fit.
    """
    if len(states) != len(vcpus):
        raise StateRejected(section="vCPUs", faults=(f"{len(states)} states for {len(vcpus)} vCPUs",))
    vm.check_chips(chips)
    for vcpu, state in zip(vcpus, states, strict=True):
        vcpu.check(state)


def load_machine(
    vm: Vm, vcpus: Sequence[VcpuFd], states: Sequence[VcpuState], chips: ChipState, *, stood_still: bool = False
) -> None:
    """Write the state of all vCPUs and chips. CPUID and the memory slots must be set; no vCPU may have been entered.

    Guest memory is neither read nor written, so this may run while another process still owns the guest. What KVM keeps
    there (kvmclock, steal time) it brings up to date when a vCPU is entered.

    The guest's clocks go on as if they had never stopped: TSC and kvmclock have counted the time since `save_machine`.
    Within one boot of the host nothing is estimated for that; elsewhere the two hosts' CLOCK_REALTIME is trusted. With
    `stood_still` both stand where they were, as suits a snapshot of yesterday. (Under KVM-PVM, which gives guests the
    TSC of the host, it leaps to that instead.)

    Raises:
        StateRejected: see `check_machine`; then nothing was changed.
        KvmCallFailed: naming the ioctl, the vCPU, and the MSR if it was that; then the VM is of no more use.
        KvmExtensionMissing: this host cannot give the guest's TSC its rate, or not without a step back; likewise.
    """
    check_machine(vm, vcpus, states, chips)
    then = Moment.from_bytes(chips.moment)
    if then.boot_id == vm.boot_id and not stood_still:
        time = lib.TV_TIME_SAME_BOOT
        targets = [(state.tsc_offset, lib.tv_read_tsc() - then.host_tsc) for state in states]
    else:
        time = lib.TV_TIME_STOOD_STILL if stood_still else lib.TV_TIME_ELSEWHERE
        targets = _moved_offsets(vcpus, states, then, stood_still)
    for vcpu, state, (offset, passed) in zip(vcpus, states, targets, strict=True):
        vcpu.load_first(state, offset, passed_ticks=passed)
    vm.load_chips(chips, time)
    for vcpu in vcpus:
        vcpu.load_last()


def _moved_offsets(
    vcpus: Sequence[VcpuFd], states: Sequence[VcpuState], then: Moment, stood_still: bool
) -> list[tuple[bytes, int]]:
    """Where each TSC shall be, as an offset, and how many of its ticks have passed."""
    # One reading for all, so that TSCs that agreed on the source agree here: KVM gives up the master clock otherwise.
    now = ffi.new("struct tv_moment *")
    lib.tv_moment_now(now)
    elapsed = 0 if stood_still else max(0, now.realtime_ns - then.realtime_ns)
    targets = []
    for vcpu, state in zip(vcpus, states, strict=True):
        guest_khz = int.from_bytes(state.tsc_khz[:4], "little")
        offset = moved_tsc_offset(
            int.from_bytes(state.tsc_offset, "little"),
            guest_khz=guest_khz,
            then_tsc=then.host_tsc,
            then_khz=int.from_bytes(state.tsc_khz[4:], "little"),
            now_tsc=now.host_tsc,
            now_khz=vcpu.host_tsc_khz,
            elapsed_ns=elapsed,
        )
        targets.append((offset.to_bytes(8, "little"), elapsed * guest_khz // 1_000_000))
    return targets
