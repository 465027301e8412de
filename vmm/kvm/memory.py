"""The guest's RAM: one shared memfd or file, mapped once."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, final

import attrs

from vmm import hostmem
from vmm.errors import DescriptorWrongKind, GuestAddressInvalid, HostFileRefused, KvmCallFailed, OptionInvalid
from vmm.kvm._kvm import ffi, lib
from vmm.kvm.page_map import PageMap

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.kvm._kvm import Buffer
    from vmm.kvm.faults import PagesFromFile, PagesFromLink
    from vmm.kvm.page_file import PageFile

PAGE_SIZE = 4096
LOW_RAM_END = 3 << 30
"""RAM above this starts again at `HIGH_RAM_START`: in between are the chips, PCI windows, KVM's own pages, firmware."""
HIGH_RAM_START = 4 << 30

_SCAN_PAGES = 256
"""Pages that are looked through in one call."""


@final
@attrs.frozen
class Region:
    """RAM at guest-physical `address`, `size` bytes, which are those from `offset` in the memfd."""

    address: int
    size: int
    offset: int


def ram_layout(size: int) -> tuple[Region, ...]:
    """Lay `size` bytes of RAM out: up to 3 GiB from 0, the rest from 4 GiB.

    Raises:
        OptionInvalid: `size` is not a positive multiple of 4096.
    """
    if size <= 0 or size % PAGE_SIZE:
        raise OptionInvalid(option="memory size", value=size, wanted=f"a positive multiple of {PAGE_SIZE}")
    low = Region(0, min(size, LOW_RAM_END), 0)
    if size <= LOW_RAM_END:
        return (low,)
    return (low, Region(HIGH_RAM_START, size - LOW_RAM_END, LOW_RAM_END))


@final
class GuestMemory:
    """Guest-physical memory, as the host reads and writes it.

    `read` and `write` may be called from any thread while the guest runs; they are plain copies, and what the guest
    stores at the same time is seen partly, wholly or not at all.
    """

    def __init__(self, fd: int, size: int, base: int) -> None:
        self.fd = fd
        self.size = size
        self.regions = ram_layout(size)
        self.page_size = hostmem.page_size_of(fd)
        """Of the pages that are mapped: huge ones, or 4096."""
        self.absent: PagesFromFile | PagesFromLink | None = None
        """Who brings the pages that are not there yet; None where all are. Set by them."""
        self._base = base
        self._noted: set[int] | None = None
        self._bytes: Buffer | None = ffi.buffer(ffi.cast("char *", base), size)

    @classmethod
    def from_memfd(cls, fd: int, size: int) -> GuestMemory:
        """Map the first `size` bytes of `fd`. Takes `fd` over: it is closed by `close`, and if this raises.

        Raises:
            OptionInvalid: `size` is not a positive multiple of 4096.
            DescriptorWrongKind: `fd` is shorter than `size`.
            KvmCallFailed: the mapping was refused.
        """
        try:
            ram_layout(size)
            length = os.fstat(fd).st_size
            if length < size:
                raise DescriptorWrongKind(name="ram", found=f"{length} bytes long", wanted=f"{size} bytes or more")
            error = ffi.new("int *")
            base = lib.tv_map(fd, size, error)
            if not base:
                raise KvmCallFailed(ioctl="mmap", errno=error[0], context=f"{size} bytes of guest RAM")
        except BaseException:
            os.close(fd)
            raise
        lib.tv_advise_huge(base, size)
        return cls(fd, size, base)

    def hva(self, offset: int) -> int:
        """Host virtual address of byte `offset` of the memfd, for a memory slot. Valid until `close`."""
        return self._base + offset

    def address_of(self, offset: int) -> int:
        """Guest-physical address of byte `offset` of the memfd."""
        return next(r.address + offset - r.offset for r in self.regions if 0 <= offset - r.offset < r.size)

    def read(self, address: int, size: int) -> bytes:
        """Copy `size` bytes out from guest-physical `address`.

        Raises:
            GuestAddressInvalid: they are not all inside one region of RAM.
            GuestPageLost: some of it is in a file that cannot be read.
        """
        at = self._locate(address, size)
        assert self._bytes is not None, "guest memory was used after close()"
        self._have(at, size)
        return self._bytes[at : at + size]

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` in at guest-physical `address`. Nothing is written if it does not fit.

        Raises:
            GuestAddressInvalid: it would not all be inside one region of RAM.
            GuestPageLost: as `read`.
        """
        size = data.nbytes if isinstance(data, memoryview) else len(data)
        at = self._locate(address, size)
        assert self._bytes is not None, "guest memory was used after close()"
        self._have(at, size)
        self._bytes[at : at + size] = data
        self.note(at, size)

    def check(self, address: int, size: int) -> None:
        """Find out whether `size` bytes from guest-physical `address` are inside one region of RAM.

        Raises:
            GuestAddressInvalid: they are not.
        """
        self._locate(address, size)

    def fill(self, address: int, fd: int, offset: int, size: int) -> None:
        """Read `size` bytes at `offset` of regular file `fd` to guest-physical `address`, in one copy.

        Raises:
            GuestAddressInvalid: it would not all be inside one region of RAM; nothing was read.
            HostFileRefused: the file is shorter, or cannot be read.
        """
        at = self._locate(address, size)
        assert self._bytes is not None, "guest memory was used after close()"
        self._have(at, size)
        view = memoryview(self._bytes).cast("B")  # type: ignore[arg-type]  # cffi's buffer has the protocol
        done = 0
        while done < size:
            try:
                count = os.preadv(fd, [view[at + done : at + size]], offset + done)
            except OSError as error:
                raise _unreadable(fd, os.strerror(error.errno or 0)) from error
            if not count:
                raise _unreadable(fd, f"it ends {size - done} bytes early; it has changed since it was opened")
            done += count
            self.note(at, done)

    # A guest that stands still is copied; from any thread, and other threads run meanwhile.

    def data_runs(self) -> Iterator[tuple[int, int]]:
        """Yield (guest-physical address, bytes) of what is not zero, in whole pages, ascending, 1 MiB at most each.

        Memory that was never touched is not touched by this either. What is still to come is waited for.
        """
        self._have(0, self.size)
        runs = ffi.new("uint32_t[]", 2 * _SCAN_PAGES)
        for region in self.regions:
            for start, end in self._touched(region.offset, region.offset + region.size):
                for at in range(start, end, _SCAN_PAGES * PAGE_SIZE):
                    pages = min(_SCAN_PAGES, (end - at) // PAGE_SIZE)
                    base = region.address + at - region.offset
                    for run in range(lib.tv_data_runs(self._base + at, pages, runs)):
                        yield base + runs[2 * run] * PAGE_SIZE, runs[2 * run + 1] * PAGE_SIZE

    def touched(self) -> PageMap:
        """Return the pages that were ever touched; all others are zero. By now others may be, too."""
        pages = PageMap(self.size // PAGE_SIZE)
        for start, end in self._touched(0, self.size):
            first = start // PAGE_SIZE
            pages.add(first, -(-end // PAGE_SIZE) - first)
        return pages

    def _touched(self, at: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield first and last bytes of what may be other than zero between two offsets in the memfd."""
        while at < end:
            try:
                start = os.lseek(self.fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                return  # nothing but a hole is left
            if start >= end:
                return
            at = min(os.lseek(self.fd, start, os.SEEK_HOLE), end)
            yield start, at

    def view(self, address: int, size: int) -> memoryview:
        """Return `size` bytes at guest-physical `address` as they lie there, until `close`.

        Raises:
            GuestAddressInvalid: they are not all inside one region of RAM.
            GuestPageLost: as `read`.
        """
        at = self._locate(address, size)
        assert self._bytes is not None, "guest memory was used after close()"
        self._have(at, size)
        view = memoryview(self._bytes).cast("B")  # type: ignore[arg-type]  # cffi's buffer has the protocol
        return view[at : at + size]

    def place(self, address: int, data: bytes | memoryview) -> None:
        """Copy `data` in at guest-physical `address`, as `write` does, by system calls.

        Raises:
            GuestAddressInvalid: it would not all be inside one region of RAM; nothing was written.
            HostFileRefused: the host has no memory left; a part may have been written.
        """
        at = self._locate(address, len(data))
        if self.page_size != PAGE_SIZE:
            # A file of huge pages cannot be written to; all of them have been reserved.
            assert self._bytes is not None, "guest memory was used after close()"
            self._bytes[at : at + len(data)] = data
            self.note(at, len(data))
            return
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(self.fd, data[done:], at + done)
            except OSError as error:
                raise HostFileRefused(
                    action="fill", path="the guest's RAM", reason=os.strerror(error.errno or 0)
                ) from error
            self.note(at, done)

    def clear(self) -> None:
        """Make all of it zero, as it was at first, and give it back to the host until it is used. No vCPU runs.

        A file that is marked for a saved state (`stay`) is that no longer: this comes first.

        Raises:
            KvmCallFailed, HostFileRefused: the host refused.
        """
        hostmem.unmark(self.fd, self.size)
        if self.absent is not None:
            self.absent.close()
        if error := lib.tv_forget(self._base, self.size):
            raise KvmCallFailed(ioctl="madvise", errno=error, context=f"{self.size} bytes of guest RAM")
        if self.page_size != PAGE_SIZE:
            # Given back, they are anybody's. Reserved again, before a guest lacks one.
            hostmem.allocate(self.fd, self.size, "guest RAM")
        self.note(0, self.size)

    # KVM does not see what this process writes. While somebody wants to know, it is noted: after the store, as
    # KVM does it, so that whoever takes a page out of the notes and then copies it has it as stored, or finds it again.

    def begin_notes(self) -> None:
        """Note from here on which pages this process writes. Idempotent; what was noted before stays."""
        if self._noted is None:
            self._noted = set()

    def end_notes(self) -> None:
        """Note nothing any more."""
        self._noted = None

    def note(self, offset: int, size: int) -> None:
        """Note that this process has written `size` bytes from byte `offset` of the memfd. Any thread.

        For whoever writes there by a way of its own; the methods here do it themselves.
        """
        noted = self._noted
        if noted is not None and size:
            noted.update(range(offset // PAGE_SIZE, (offset + size - 1) // PAGE_SIZE + 1))

    def take_notes(self, into: PageMap) -> None:
        """Put the pages that this process has written into the set, and forget them. Any thread."""
        noted = self._noted
        while noted:
            # Others may add meanwhile: each page is taken by one call, which no other thread gets into.
            into.add(noted.pop())

    def load_pages(self, file: PageFile, first: int, count: int) -> int:
        """As `PageFile.load`; return how many of these pages are in the file."""
        return file.load(self, first, count).data

    def come_from(self, file: PageFile) -> PagesFromFile:
        """Have pages come from `file` as they are used, into memory that is zero. Raises `PageFaultsUnavailable`."""
        from vmm.kvm.faults import PagesFromFile  # Few machines have their RAM so.

        return PagesFromFile(self, file)

    def forget(self, first: int, pages: int) -> None:
        """Give `pages` pages from number `first` on back: they are absent, and zero to whoever touches them.

        Raises:
            KvmCallFailed: the host refused.
        """
        if error := lib.tv_forget(self._base + first * PAGE_SIZE, pages * PAGE_SIZE):
            raise KvmCallFailed(ioctl="madvise", errno=error, context=f"{pages} pages of guest RAM")

    def forget_all(self, pages: PageMap) -> None:
        """As `forget`, of all these pages."""
        for first, count in pages.runs():
            self.forget(first, count)

    # RAM in a file with a name can be left in it, for a later process, while the rest of the guest is saved elsewhere.

    @property
    def can_stay(self) -> bool:
        """Whether another process can find this RAM again by the name of its file."""
        return self.page_size == PAGE_SIZE and os.fstat(self.fd).st_nlink > 0

    @property
    def path(self) -> str:
        """The name of the file, for texts."""
        return os.readlink(f"/proc/self/fd/{self.fd}")

    def stay(self, identity: bytes) -> None:
        """Put all of it on its disk, marked as that of the state `identity`. The guest stands. For a thread.

        Raises:
            HostFileRefused: the disk did not take it.
        """
        hostmem.mark(self.fd, self.size, identity)

    def stays_for(self) -> bytes | None:
        """Return the identity of the state whose RAM this is; None if it is of none, or was used since."""
        return hostmem.mark_of(self.fd, self.size)

    def begin_use(self) -> None:
        """Take the mark off: what is in it changes from here on, and no saved state can go on with it any more.

        Raises:
            HostFileRefused: the disk did not take it.
        """
        hostmem.unmark(self.fd, self.size)

    def close(self) -> None:
        """Unmap, and close the descriptor. No VM may have slots in it any more. Closing twice is harmless."""
        if self.absent is not None:
            self.absent.close()
        if self._bytes is not None:
            self._bytes = None
            lib.tv_unmap(self._base, self.size)
            os.close(self.fd)

    def _have(self, at: int, size: int) -> None:
        # A thread that faulted on an absent page would wait with the interpreter's lock, and everybody with it.
        if self.absent is not None and size:
            first = at // PAGE_SIZE
            self.absent.require(first, (at + size - 1) // PAGE_SIZE - first + 1)

    def _locate(self, address: int, size: int) -> int:
        for region in self.regions:
            start = address - region.address
            if start >= 0 and size >= 0 and start + size <= region.size:
                return region.offset + start
        raise GuestAddressInvalid(address=address, size=size, regions=self._describe())

    def _describe(self) -> str:
        return " and ".join(f"{r.address:#x} to {r.address + r.size - 1:#x}" for r in self.regions)


def _unreadable(fd: int, reason: str) -> HostFileRefused:
    return HostFileRefused(action="load", path=os.readlink(f"/proc/self/fd/{fd}"), reason=reason)
