"""A VM descriptor: memory slots, interrupt chips, vCPUs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, final

import attrs

from vmm.errors import KvmExtensionMissing
from vmm.kvm._kvm import ffi, lib
from vmm.kvm.calls import call, call_with, checked
from vmm.kvm.state_buffers import ChipBuffers
from vmm.kvm.vcpu_fd import VcpuFd

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.kvm._kvm import CData
    from vmm.kvm.dirty_ring import DirtyRings
    from vmm.kvm.state import ChipState

TSS_ADDRESS = 0xFEFFD000
IDENTITY_MAP_ADDRESS = 0xFEFFC000
"""Four pages that KVM on Intel needs for itself: in the gap below 4 GiB, under firmware of up to 16 MiB."""


@final
@attrs.frozen
class MsiRoute:
    """A GSI, 24 or above, that stands for a message of a PCI device: `data` written to `address`."""

    gsi: int
    address: int
    data: int


@final
class Vm:
    """A virtual machine of the kernel's. Every method may be called from any thread."""

    def __init__(self, fd: int, msr_indices: Sequence[int], run_size: int) -> None:
        self._fd = fd
        self._msr_indices = msr_indices
        self._run_size = run_size
        self._chips = ChipBuffers()
        self._has_irqchip = False
        self._irqfds: Final[dict[int, tuple[int, int | None]]] = {}
        self._irqfds_held = False
        self.rings: DirtyRings | None = None
        """Where vCPUs say what they write, if they have rings for it."""
        identity_map = ffi.new("uint64_t *", IDENTITY_MAP_ADDRESS)
        call_with(fd, "KVM_SET_IDENTITY_MAP_ADDR", identity_map)
        call(fd, "KVM_SET_TSS_ADDR", TSS_ADDRESS)
        # Without these two VCPU_EVENTS folds a pending exception into CR2 or DR6 early, and forgets a triple fault.
        self._enable("KVM_CAP_EXCEPTION_PAYLOAD")
        self._enable("KVM_CAP_X86_TRIPLE_FAULT_EVENT")

    @property
    def fd(self) -> int:
        """The descriptor; -1 after `close`."""
        return self._fd

    def extension(self, name: str) -> int:
        """Ask for a KVM extension, as this VM has it."""
        return call(self._fd, "KVM_CHECK_EXTENSION", getattr(lib, name), context=name)

    def set_memory_slot(self, slot: int, address: int, hva: int, size: int, *, log_dirty: bool = False) -> None:
        """Put `size` bytes at host virtual `hva` at guest-physical `address`, or change `log_dirty` of a slot.

        Size 0 deletes the slot. All three must be multiples of 4096.

        Raises:
            KvmCallFailed: overlapping slots (EEXIST), misaligned or out of range (EINVAL).
        """
        region = ffi.new("struct kvm_userspace_memory_region *")
        region.slot = slot
        region.flags = lib.KVM_MEM_LOG_DIRTY_PAGES if log_dirty else 0
        region.guest_phys_addr = address
        region.memory_size = size
        region.userspace_addr = hva
        call_with(self._fd, "KVM_SET_USER_MEMORY_REGION", region, context=f"slot {slot}")

    def protect_by_hand(self) -> int:
        """Have the dirty log keep what it says until it is told otherwise (`clear_dirty_log`), where this host can.

        Returns:
            KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE and _INITIALLY_SET, as far as there are: with the latter a log begins
            with every page in it.
        """
        offered = self.extension("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")
        wanted: int = offered & (lib.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | lib.KVM_DIRTY_LOG_INITIALLY_SET)
        if wanted:
            self._enable("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", wanted)
        return wanted

    def read_dirty_log(self, slot: int, bitmap: CData) -> None:
        """Put a bit for each page of `slot` that was written into `bitmap`, little-endian words, enough for all.

        Without `protect_by_hand` they are taken out of the log.

        Raises:
            KvmCallFailed: the slot has no log.
        """
        checked(lib.tv_get_dirty_log(self._fd, slot, bitmap), "KVM_GET_DIRTY_LOG", f"slot {slot}")

    def clear_dirty_log(self, slot: int, first: int, pages: int, bitmap: CData) -> None:
        """Take pages of `slot` out of the log, and see when they are written again: those with a bit in `bitmap`.

        Bit 0 is page `first`, a multiple of 64; so must be `pages`, except at the slot's end.

        Raises:
            KvmCallFailed: the slot has no log, or is not protected by hand.
        """
        result = lib.tv_clear_dirty_log(self._fd, slot, first, pages, bitmap)
        checked(result, "KVM_CLEAR_DIRTY_LOG", f"slot {slot}")

    def create_irqchip(self) -> None:
        """Make the two PICs, the IOAPIC, and a LAPIC for each later vCPU. GSI n is pin n of both."""
        call(self._fd, "KVM_CREATE_IRQCHIP")
        self._has_irqchip = True

    def create_pit(self) -> None:
        """Make the interval timer, on GSI 0, and the port of its gate (0x61). After `create_irqchip`."""
        config = ffi.new("struct kvm_pit_config *")
        # Without it port 0x61 is left to us, who cannot see the counters: Linux measures the TSC by channel 2.
        config.flags = lib.KVM_PIT_SPEAKER_DUMMY
        call_with(self._fd, "KVM_CREATE_PIT2", config)
        self.save_chips()  # touches every page of the buffers now, instead of inside the first pause

    def create_vcpu(self, index: int) -> VcpuFd:
        """Make vCPU `index`, whose APIC id it is. 0 is the boot processor; others wait for INIT and SIPI.

        Raises:
            KvmCallFailed: naming the vCPU.
            KvmExtensionMissing: the host's KVM cannot save and load a vCPU.
        """
        fd = call(self._fd, "KVM_CREATE_VCPU", index, context=f"vCPU {index}")
        try:
            vcpu = VcpuFd(fd, index, self._fd, self._run_size, self._msr_indices, has_lapic=self._has_irqchip)
        except BaseException:
            os.close(fd)
            raise
        if self.rings is not None:
            try:
                self.rings.add(vcpu)
            except BaseException:
                vcpu.close()
                raise
        return vcpu

    def use_dirty_rings(self, entries: int) -> None:
        """Have each vCPU made from here on say in a ring of so many entries, a power of two, what it writes.

        Raises:
            KvmExtensionMissing: this host has no such rings, or only smaller ones.
            KvmCallFailed: there are vCPUs already.
        """
        from vmm.kvm.dirty_ring import DirtyRings  # Few machines have them.

        name = "KVM_CAP_DIRTY_LOG_RING_ACQ_REL"
        if not self.extension(name):
            name = "KVM_CAP_DIRTY_LOG_RING"
        size = entries * DirtyRings.ENTRY_SIZE
        if self.extension(name) < size:
            raise KvmExtensionMissing(name="KVM_CAP_DIRTY_LOG_RING", user=f"dirty rings of {entries} entries")
        self._enable(name, size)
        self.rings = DirtyRings(self._fd, entries)

    def set_irq(self, gsi: int, level: bool) -> None:
        """Drive an interrupt line. An edge-triggered one wants True and then False."""
        result = lib.tv_irq_line(self._fd, gsi, level)
        if result < 0:
            checked(result, "KVM_IRQ_LINE", f"GSI {gsi}")

    def signal_msi(self, address: int, data: int) -> None:
        """Deliver a message-signalled interrupt now."""
        message = ffi.new("struct kvm_msi *")
        message.address_lo = address & 0xFFFFFFFF
        message.address_hi = address >> 32
        message.data = data
        call_with(self._fd, "KVM_SIGNAL_MSI", message)

    def set_msi_routes(self, routes: Sequence[MsiRoute]) -> None:
        """Replace all message routes. The 24 lines of PICs and IOAPIC stay as `create_irqchip` made them."""
        gsis = ffi.new("uint32_t[]", [route.gsi for route in routes])
        addresses = ffi.new("uint64_t[]", [route.address for route in routes])
        data = ffi.new("uint32_t[]", [route.data for route in routes])
        checked(lib.tv_route_gsis(self._fd, len(routes), gsis, addresses, data), "KVM_SET_GSI_ROUTING")

    def assign_irqfd(self, fd: int, gsi: int, *, resample_fd: int | None = None) -> None:
        """From now on the kernel raises `gsi` when eventfd `fd` is written. With `resample_fd` it is a level.

        The kernel keeps its own reference to both; closing them does not end it, `deassign_irqfd` does.
        """
        self._assign_irqfd(fd, gsi, resample_fd)
        self._irqfds[fd] = (gsi, resample_fd)

    def deassign_irqfd(self, fd: int, gsi: int) -> None:
        """Undo `assign_irqfd`."""
        del self._irqfds[fd]
        if not self._irqfds_held:
            self._irqfd(fd, gsi, lib.KVM_IRQFD_FLAG_DEASSIGN, None)

    def hold_irqfds(self) -> None:
        """Have every interrupt raised whose eventfd was written, and from now on none. What is written then waits.

        KVM raises most of them in a worker of its own, some time after the write: a state that is saved before that
        would lack them. To take an irqfd away waits for the worker (Linux, irqfd_shutdown). It lowers a line that is a
        level: whoever drives that raises it again where the guest goes on, as after a load.
        """
        if not self._irqfds_held:
            self._irqfds_held = True
            for fd, (gsi, _) in self._irqfds.items():
                self._irqfd(fd, gsi, lib.KVM_IRQFD_FLAG_DEASSIGN, None)

    def release_irqfds(self) -> None:
        """Undo `hold_irqfds`: raise what was written meanwhile. Without effect where they are not held."""
        if self._irqfds_held:
            self._irqfds_held = False
            for fd, (gsi, resample_fd) in self._irqfds.items():
                self._assign_irqfd(fd, gsi, resample_fd)

    def _assign_irqfd(self, fd: int, gsi: int, resample_fd: int | None) -> None:
        self._irqfd(fd, gsi, 0 if resample_fd is None else lib.KVM_IRQFD_FLAG_RESAMPLE, resample_fd)

    def assign_ioeventfd(
        self, fd: int, address: int, size: int, *, port: bool = False, value: int | None = None
    ) -> None:
        """From now on a guest's store of `size` bytes at `address` writes eventfd `fd`, and does not exit.

        `size` 0 means any size (then `value` must be None); `port` says that `address` is an I/O port; with `value`
        only a store of that value counts, others exit.
        """
        self._ioeventfd(fd, address, size, 0, port, value)

    def deassign_ioeventfd(
        self, fd: int, address: int, size: int, *, port: bool = False, value: int | None = None
    ) -> None:
        """Undo `assign_ioeventfd`, which must have had the same arguments."""
        self._ioeventfd(fd, address, size, lib.KVM_IOEVENTFD_FLAG_DEASSIGN, port, value)

    def save_chips(self) -> ChipState:
        """Read PICs, IOAPIC, PIT and clock. No vCPU may be running. Alone rarely right: see `save_machine`."""
        return self._chips.save(self._fd)

    @property
    def boot_id(self) -> bytes:
        """The 16 bytes that name this boot of this host: its clocks mean something only within it."""
        return self._chips.boot_id

    def check_chips(self, state: ChipState) -> None:
        """Find out, without changing anything, whether `state` has the sizes of this host.

        Raises:
            StateRejected: naming every member that does not fit.
        """
        self._chips.check(state)

    def load_chips(self, state: ChipState, time: int = lib.TV_TIME_SAME_BOOT) -> None:
        """Write what `save_chips` read, between the two parts of the vCPUs' states: see `load_machine`.

        Raises:
            StateRejected: a member has not the size that this host's KVM wants.
            KvmCallFailed: naming the ioctl.
        """
        self._chips.load(self._fd, state, time)

    def close(self) -> None:
        """Close the descriptor. The VM ends when its vCPUs' descriptors are closed too. Twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _enable(self, name: str, value: int = 1) -> None:
        if self.extension(name):
            request = ffi.new("struct kvm_enable_cap *")
            request.cap = getattr(lib, name)
            request.args[0] = value
            call_with(self._fd, "KVM_ENABLE_CAP", request, context=name)

    def _irqfd(self, fd: int, gsi: int, flags: int, resample_fd: int | None) -> None:
        request = ffi.new("struct kvm_irqfd *")
        request.fd = fd
        request.gsi = gsi
        request.flags = flags
        request.resamplefd = 0 if resample_fd is None else resample_fd
        call_with(self._fd, "KVM_IRQFD", request, context=f"GSI {gsi}")

    def _ioeventfd(self, fd: int, address: int, size: int, flags: int, port: bool, value: int | None) -> None:
        request = ffi.new("struct kvm_ioeventfd *")
        request.fd = fd
        request.addr = address
        request.len = size
        request.flags = flags
        if port:
            request.flags |= lib.KVM_IOEVENTFD_FLAG_PIO
        if value is not None:
            request.flags |= lib.KVM_IOEVENTFD_FLAG_DATAMATCH
            request.datamatch = value
        call_with(self._fd, "KVM_IOEVENTFD", request, context=f"address {address:#x}")
