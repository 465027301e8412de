"""The descriptors: /dev/kvm, VMs, vCPUs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.kvm.tiny import INTERRUPT_ON_GSI_4, TinyMachine
from vmm.errors import KvmCallFailed, KvmUnavailable
from vmm.kvm._kvm import ffi, lib
from vmm.kvm.cpuid import CpuidEntry
from vmm.kvm.system import Kvm
from vmm.kvm.vm import MsiRoute


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_missing_device_says_what_would_help(tmp_path: Path) -> None:
    with pytest.raises(KvmUnavailable) as caught:
        Kvm.open(f"{tmp_path}/kvm")
    assert str(caught.value) == (
        f"Cannot use {tmp_path}/kvm: it does not exist; "
        "load the module kvm_intel or kvm_amd, and enable virtualization in the firmware"
    )


def test_a_device_without_permission_names_user_and_group() -> None:
    program = (
        "import grp, os, sys; from vmm.kvm.system import Kvm; from vmm.errors import KvmUnavailable\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: Kvm.open(sys.argv[1])\n"
        "except KvmUnavailable as e: print(e)\n"
    )
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    # Not in tmp_path, above which pytest lets nobody else in.
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        device = Path(directory) / "kvm"
        device.touch(0o600)
        done = subprocess.run([sys.executable, "-c", program, device], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (
        f"Cannot use {device}: uid 65534 may not open it for reading and writing; "
        "add the user to the group that owns it (root, usually kvm) and log in again"
    )


def test_a_file_that_is_no_kvm_is_refused_and_closed() -> None:
    before = open_descriptors()
    with pytest.raises(KvmUnavailable) as caught:
        Kvm.open("/dev/null")
    assert str(caught.value) == ("Cannot use /dev/null: it is not a KVM device; it must be the character device of KVM")
    assert open_descriptors() == before


def test_the_binding_is_used_without_the_machinery_that_built_it() -> None:
    program = (
        "import vmm.kvm.machine_state, vmm.kvm.system, vmm.kvm.vcpu, sys\n"
        "print([m for m in ('cffi', 'pycparser', 'setuptools') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.kvm
def test_a_machine_leaves_no_descriptor_behind() -> None:
    before = open_descriptors()
    with TinyMachine(2) as m:
        m.boot("out 0x99, al")
        m.run()
        assert open_descriptors() == before + 5  # kvm, VM, memfd, two vCPUs
    assert open_descriptors() == before


@pytest.mark.kvm
def test_closing_twice_closes_nothing_else() -> None:
    with TinyMachine() as m:
        for thing in (m.fds[0], m.vm, m.kvm):
            thing.close()
        others = [os.dup(0) for _ in range(4)]
        for thing in (m.fds[0], m.vm, m.kvm):
            thing.close()
        for fd in others:
            os.fstat(fd)
            os.close(fd)


@pytest.mark.kvm
def test_a_vcpu_that_cannot_be_made_is_named_and_leaves_nothing() -> None:
    with TinyMachine() as m:
        before = open_descriptors()
        with pytest.raises(KvmCallFailed) as caught:
            m.vm.create_vcpu(0)
        assert str(caught.value) == "KVM_CREATE_VCPU failed for vCPU 0: File exists (errno 17)"
        assert open_descriptors() == before


@pytest.mark.kvm
def test_a_vcpu_that_cannot_be_finished_is_closed() -> None:
    with TinyMachine() as m:
        before = open_descriptors()
        m.vm._run_size = 0  # what mmap refuses
        with pytest.raises(KvmCallFailed, match=r"^mmap failed for vCPU 1: "):
            m.vm.create_vcpu(1)
        assert open_descriptors() == before


@pytest.mark.kvm
def test_overlapping_memory_slots_are_an_error_with_the_slot() -> None:
    with TinyMachine() as m:
        with pytest.raises(KvmCallFailed) as caught:
            m.vm.set_memory_slot(7, 0x1000, m.memory.hva(0), 4096)
        assert str(caught.value) == "KVM_SET_USER_MEMORY_REGION failed for slot 7: File exists (errno 17)"


@pytest.mark.kvm
def test_cpuid_cannot_change_once_the_guest_has_run() -> None:
    with TinyMachine() as m:
        m.boot("out 0x99, al")
        m.run()
        with pytest.raises(KvmCallFailed, match=r"^KVM_SET_CPUID2 failed for vCPU 0: "):
            m.fds[0].set_cpuid([CpuidEntry(0, 0, 0, 1, 2, 3, 4)])


@pytest.mark.kvm
def test_extensions_are_asked_for_by_name() -> None:
    kvm = Kvm.open()
    try:
        assert kvm.extension("KVM_CAP_USER_MEMORY") == 1
        assert 0x10 in kvm.msr_indices()
        assert {entry.function for entry in kvm.supported_cpuid()} >= {0, 1, 0x8000_0000}
    finally:
        kvm.close()


@pytest.mark.kvm
def test_a_store_to_an_ioeventfd_rings_it_and_does_not_exit() -> None:
    bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        with TinyMachine() as m:
            m.vm.assign_ioeventfd(bell, 0xA0000, 2, value=7)
            m.vm.assign_ioeventfd(bell, 0x510, 1, port=True)
            m.boot("mov ax, 0xa000\n mov ds, ax\n mov word [0], 7\n mov dx, 0x510\n out dx, al\n mov word [0], 8\n"
                   " out 0x99, al")  # fmt: skip
            m.run()
            assert os.eventfd_read(bell) == 2
            assert m.mmio.written == [(0xA0000, 2, 8)]
            m.vm.deassign_ioeventfd(bell, 0x510, 1, port=True)
            with pytest.raises(KvmCallFailed, match=r"^KVM_IOEVENTFD failed for address 0x510: "):
                m.vm.deassign_ioeventfd(bell, 0x510, 1, port=True)
    finally:
        os.close(bell)


@pytest.mark.kvm
def test_a_line_and_an_irqfd_both_wake_the_guest() -> None:
    bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        with TinyMachine() as m:
            m.boot(INTERRUPT_ON_GSI_4)
            m.run()  # until it is ready for interrupts
            m.vm.set_irq(4, True)
            m.vm.set_irq(4, False)
            assert m.run().reason == "kicked"
            m.vm.assign_irqfd(bell, 4)
            os.eventfd_write(bell, 1)
            assert m.run().reason == "kicked"
            m.vm.deassign_irqfd(bell, 4)
        assert len(m.outs(0x99)) == 3
    finally:
        os.close(bell)


@pytest.mark.kvm
def test_message_routes_are_set_beside_the_lines() -> None:
    with TinyMachine() as m:
        m.vm.set_msi_routes([MsiRoute(24, 0xFEE00000, 0x41), MsiRoute(25, 0xFEE00000, 0x42)])
        m.vm.set_irq(4, True)
        m.vm.set_irq(24, True)
        m.vm.set_msi_routes([])


def test_a_cell_is_swapped_only_from_the_expected_value() -> None:
    cell = ffi.new("uint32_t *", 5)
    assert lib.cell_compare_and_swap(cell, 4, 9) == 5
    assert lib.cell_load(cell) == 5
    assert lib.cell_compare_and_swap(cell, 5, 9) == 5
    assert lib.cell_load(cell) == 9
