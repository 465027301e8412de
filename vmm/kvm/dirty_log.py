"""Which pages of the guest's RAM were written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

from vmm.kvm._kvm import lib
from vmm.kvm._pages import ffi
from vmm.kvm.calls import checked
from vmm.kvm.memory import PAGE_SIZE

if TYPE_CHECKING:
    from vmm.kvm.memory import GuestMemory
    from vmm.kvm.page_map import PageMap
    from vmm.kvm.vm import Vm


@final
class DirtyLog:
    """KVM's log of what the guest writes. Off at first. For one thread at a time.

    Source: Linux Documentation/virt/kvm/api.rst, 4.8 KVM_GET_DIRTY_LOG.
    """

    def __init__(self, vm: Vm, memory: GuestMemory) -> None:
        self._vm: Final = vm
        self._memory: Final = memory
        self._on = False

    def start(self) -> None:
        """Begin: what is written from here on is collected. Raises `KvmCallFailed`."""
        self._log(on=True)

    def stop(self) -> None:
        """End. Without effect where it is off. Raises `KvmCallFailed`."""
        if self._on:
            self._log(on=False)

    def collect(self, into: PageMap) -> None:
        """Put every page into the set that was written since `start`, or since the last call.

        Raises:
            KvmCallFailed: naming the slot.
        """
        for slot, region in enumerate(self._memory.regions):
            pages = region.size // PAGE_SIZE
            bitmap = ffi.new("uint64_t[]", -(-pages // 64))
            checked(lib.tv_get_dirty_log(self._vm.fd, slot, bitmap), "KVM_GET_DIRTY_LOG", f"slot {slot}")
            into.merge_bitmap(region.offset // PAGE_SIZE, pages, bitmap)

    def protect(self, first: int, pages: int) -> None:
        """Note that these pages are about to be read: what is written to them from here on is collected next."""

    def _log(self, *, on: bool) -> None:
        for slot, region in enumerate(self._memory.regions):
            self._vm.set_memory_slot(slot, region.address, self._memory.hva(region.offset), region.size, log_dirty=on)
        self._on = on
