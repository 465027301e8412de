"""The /dev/kvm descriptor: what this host's KVM offers, and the way to a VM."""

from __future__ import annotations

import os
from typing import Final, final

from vmm.errors import KvmUnavailable
from vmm.kvm._kvm import ffi, lib
from vmm.kvm.calls import call, call_with, checked
from vmm.kvm.cpuid import PROCESSOR_NAME, CpuidEntry
from vmm.kvm.vm import Vm

MTRR_DEFAULT_TYPE: Final = 0x2FF
MTRRS: Final = (*range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270), MTRR_DEFAULT_TYPE)
"""Eight ranges, the fixed ones below 1 MiB, and the type of all else. Source: Intel SDM volume 3, 12.11.2."""


@final
class Kvm:
    """An open /dev/kvm. Descriptors that it makes live on after `close`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def open(cls, path: str = "/dev/kvm") -> Kvm:
        """Open KVM, and install the process-wide handler of the kick signal (an empty one; SIGRTMIN + 1).

        Raises:
            KvmUnavailable: `path` is missing, not permitted, no KVM, or of another API version than 12.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise KvmUnavailable(
                path=path,
                reason="it does not exist",
                instead="load the module kvm_intel or kvm_amd, and enable virtualization in the firmware",
            ) from error
        except PermissionError as error:
            raise KvmUnavailable(
                path=path,
                reason=f"uid {os.geteuid()} may not open it for reading and writing",
                instead=f"add the user to the group that owns it ({_group_of(path)}) and log in again",
            ) from error
        except OSError as error:
            raise KvmUnavailable(
                path=path, reason=os.strerror(error.errno or 0), instead="it must be the character device of KVM"
            ) from error
        try:
            version = lib.tv_ioctl(fd, lib.KVM_GET_API_VERSION, 0)
            if version < 0:
                raise KvmUnavailable(
                    path=path, reason="it is not a KVM device", instead="it must be the character device of KVM"
                )
            if version != lib.KVM_API_VERSION:
                raise KvmUnavailable(
                    path=path,
                    reason=f"its API version is {version}",
                    instead=f"this program speaks version {lib.KVM_API_VERSION}, of Linux 2.6.22 and later",
                )
            checked(lib.tv_install_kick(), "sigaction")
        except BaseException:
            os.close(fd)
            raise
        return cls(fd)

    @property
    def fd(self) -> int:
        """The descriptor; -1 after `close`."""
        return self._fd

    def extension(self, name: str) -> int:
        """Ask for a KVM extension by its name in linux/kvm.h; 0 if this host has it not, else its value."""
        return call(self._fd, "KVM_CHECK_EXTENSION", getattr(lib, name), context=name)

    def supported_cpuid(self) -> tuple[CpuidEntry, ...]:
        """Return every CPUID leaf that KVM can give a guest on this host; and the processor's name, which KVM omits.

        Not the TSC-deadline bit: that is the extension KVM_CAP_TSC_DEADLINE_TIMER.
        """
        table = ffi.new("struct tv_cpuid *")
        table.count = lib.TV_CPUID_MAX
        call_with(self._fd, "KVM_GET_SUPPORTED_CPUID", table)
        entries = {
            (e.function, e.index): CpuidEntry(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx)
            for e in table.entries[0 : table.count]
        }
        registers = ffi.new("uint32_t[4]")
        for function in PROCESSOR_NAME:
            lib.tv_host_cpuid(function, registers)
            entries[function, 0] = CpuidEntry(function, 0, 0, *registers[0:4])
        return tuple(entries.values())

    def msr_indices(self) -> tuple[int, ...]:
        """Return the model-specific registers that may be state of a guest. A vCPU need not have each of them.

        KVM's own list leaves out the memory type range registers, which it keeps for guests nevertheless.
        """
        table = ffi.new("struct tv_msr_list *")
        table.count = lib.TV_MSRS_MAX
        call_with(self._fd, "KVM_GET_MSR_INDEX_LIST", table)
        return (*table.indices[0 : table.count], *MTRRS)

    def create_vm(self) -> Vm:
        """Make a VM without memory, chips or vCPUs.

        Raises:
            KvmCallFailed: the kernel refused.
        """
        fd = call(self._fd, "KVM_CREATE_VM")
        try:
            return Vm(fd, self.msr_indices(), call(self._fd, "KVM_GET_VCPU_MMAP_SIZE"))
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        """Close the descriptor. Closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _group_of(path: str) -> str:
    import grp  # only needed for an error text

    try:
        return f"{grp.getgrgid(os.stat(path).st_gid).gr_name}, usually kvm"
    except (KeyError, OSError):
        return "usually kvm"
