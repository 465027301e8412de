"""Which pages of the guest's RAM were written: by the guest, and by this process on its behalf.

What the guest writes KVM sees by write-protecting pages, which costs the guest a fault for each page that it writes
then. Where this host can, pages are protected by hand: the log keeps what it says when it is read, and is cleared for a
part of RAM just before that part is copied. So a page that is written twice before its turn comes is copied once, and
the guest is not held up by a sweep over all of its memory. A log that begins with every page in it spares the first
sweep too.

Where the vCPUs have rings (`vmm.kvm.dirty_ring`) there is no log: each of them says what it writes, page by page.

Source: Linux Documentation/virt/kvm/api.rst, 4.8 KVM_GET_DIRTY_LOG, 4.118 KVM_CLEAR_DIRTY_LOG, 7.16
KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol, final

from vmm.kvm._kvm import lib
from vmm.kvm._pages import ffi
from vmm.kvm.memory import PAGE_SIZE
from vmm.kvm.page_map import PageMap

if TYPE_CHECKING:
    from vmm.kvm._kvm import CData
    from vmm.kvm.dirty_ring import DirtyRings
    from vmm.kvm.memory import GuestMemory

CHUNK: Final = 1 << 14
"""Pages that are protected at once: 64 MiB. A multiple of 64; no region of RAM begins within one."""


class LoggingVm(Protocol):
    """What is asked of a virtual machine; `vmm.kvm.vm.Vm` says what each does."""

    @property
    def rings(self) -> DirtyRings | None:
        """Where its vCPUs say what they write, if they have rings for it."""

    def set_memory_slot(self, slot: int, address: int, hva: int, size: int, *, log_dirty: bool = False) -> None:
        """Put RAM at `address`, or switch the log of a slot on or off."""

    def protect_by_hand(self) -> int:
        """Have the log keep what it says."""

    def read_dirty_log(self, slot: int, bitmap: CData) -> None:
        """Read it."""

    def clear_dirty_log(self, slot: int, first: int, pages: int, bitmap: CData) -> None:
        """Take pages out of it."""


@final
class DirtyLog:
    """The log of one VM's RAM, whose slots are numbered as its regions. Off at first. For one thread at a time."""

    def __init__(self, vm: LoggingVm, memory: GuestMemory) -> None:
        self._vm: Final = vm
        self._memory: Final = memory
        self._on = False
        self._by_hand = False
        self._said: Final = PageMap(memory.size // PAGE_SIZE)
        """What the log said when it was last read."""
        self._cleared: Final[set[int]] = set()
        """Chunks that have been taken out of the log since, as far as it said so."""
        self._used: PageMap | None = None
        """Of a log that began full, until it is read: what of RAM had been used as it began."""

    def start(self) -> None:
        """Begin: what is written from here on is collected. Raises `KvmCallFailed`."""
        rings = self._vm.rings
        ways = self._vm.protect_by_hand() if rings is None else 0
        self._by_hand = bool(ways)
        self._memory.begin_notes()
        if rings is not None:
            rings.begin(self._memory)
        self._on = True
        self._log(on=True)
        self._cleared.clear()
        self._said.clear()
        if ways & lib.KVM_DIRTY_LOG_INITIALLY_SET:
            self._said.set_all()
            self._used = self._memory.touched()
            self._skip_untouched(self._used)

    def stop(self) -> None:
        """End. Without effect where it is off. Raises `KvmCallFailed`."""
        if self._on:
            self._on = False
            self._memory.end_notes()
            self._log(on=False)
            if self._vm.rings is not None:
                self._vm.rings.end()

    def collect(self, into: PageMap) -> None:
        """Put every page into the set that was written since `start`, or since the last call.

        Of pages that were not protected after the last call, those that it named are named again.

        Raises:
            KvmCallFailed: naming the slot.
        """
        if self._vm.rings is not None:
            self._vm.rings.collect(into)
            self._memory.take_notes(into)
            return
        for slot, region in enumerate(self._memory.regions):
            self._vm.read_dirty_log(slot, self._at(region.offset // PAGE_SIZE))
        self._cleared.clear()
        into.merge(self._said)
        self._memory.take_notes(into)
        if self._used is not None:
            into.merge(self._newly_used(self._used))
            self._used = None

    def protect(self, first: int, pages: int) -> None:
        """Note that these pages are about to be read: what is written to them from here on is collected next.

        More than these may be protected. So every page that was collected, and at first every page that was ever
        touched, must be read after this, or be kept to be read later.

        Raises:
            KvmCallFailed: naming the slot.
        """
        if self._by_hand and pages > 0:
            for chunk in range(first // CHUNK, (first + pages - 1) // CHUNK + 1):
                self._clear(chunk)

    def _clear(self, chunk: int) -> None:
        if chunk in self._cleared:
            return
        self._cleared.add(chunk)
        first = chunk * CHUNK
        if not self._said.count(first, first + CHUNK):
            return
        for slot, region in enumerate(self._memory.regions):
            begin = region.offset // PAGE_SIZE
            end = begin + region.size // PAGE_SIZE
            if begin <= first < end:
                self._vm.clear_dirty_log(slot, first - begin, min(CHUNK, end - first), self._at(first))

    def _skip_untouched(self, used: PageMap) -> None:
        """Take those chunks out of a log that begins full of which no page was ever used: nobody will read them."""
        for chunk in range(-(-used.pages // CHUNK)):
            if not used.count(chunk * CHUNK, (chunk + 1) * CHUNK):
                self._clear(chunk)

    def _newly_used(self, before: PageMap) -> PageMap:
        """Return what was used for the first time since `before`.

        Some of it was used just before its chunk was taken out of the log, which forgot it then, and after whoever
        reads it had looked what there is.
        """
        used = self._memory.touched()
        for first, pages in before.runs():
            used.discard(first, pages)
        return used

    def _at(self, page: int) -> CData:
        return ffi.addressof(self._said.words, page // 64)

    def _log(self, *, on: bool) -> None:
        for slot, region in enumerate(self._memory.regions):
            self._vm.set_memory_slot(slot, region.address, self._memory.hva(region.offset), region.size, log_dirty=on)
