"""RAM in a file, each page at its fixed place: saved there, loaded from there, several threads at a time.

Pages are numbered by their offset in the RAM's memory object. Page n is at `offset` + n * 4096 of the file; one that is
zero is a hole there, and not *listed*. Of each that is listed there is a checksum, a CRC-32C.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final, final

import attrs

from vmm.errors import GuestPageLost, HostFileRefused
from vmm.kvm._mapped import ffi, lib

if TYPE_CHECKING:
    from vmm.kvm._kvm import CData
    from vmm.kvm.memory import GuestMemory

PAGE_SIZE: Final = 4096
PIECE_PAGES: Final = 16384
"""Pages that a thread takes on at once: 64 MiB."""


@final
@attrs.frozen
class Tally:
    """Pages that were moved, and those that were found to be zero."""

    data: int
    zero: int


@final
class PageFile:
    """Where a guest's pages are in a file. The descriptor stays the caller's; `listed` and `sums` are for C, too."""

    def __init__(self, fd: int, offset: int, pages: int) -> None:
        self.fd: Final = fd
        self.offset: Final = offset
        self.pages: Final = pages
        self.listed: Final = ffi.new("uint64_t[]", -(-pages // 64))
        """One bit for each page that is in the file."""
        self.sums: Final = ffi.new("uint32_t[]", pages)
        """The checksum of each page that is in the file."""

    def listed_bytes(self) -> memoryview:
        """Return the bitmap as it lies there, little-endian words of 64 bits."""
        return memoryview(ffi.buffer(self.listed)).cast("B")  # type: ignore[arg-type]  # it has the protocol

    def sums_bytes(self) -> memoryview:
        """Return the table of checksums as it lies there, 4 little-endian bytes for each page."""
        return memoryview(ffi.buffer(self.sums)).cast("B")  # type: ignore[arg-type]  # likewise

    def save(self, memory: GuestMemory, wanted: CData, first: int, count: int) -> Tally:
        """Write those of `count` pages from `first` on, a multiple of 64, whose bit is set in `wanted`. For a thread.

        A page that the guest writes meanwhile may get a wrong checksum: it is dirty then, and must be saved again.

        Raises:
            HostFileRefused: the file cannot be written.
        """
        tally = ffi.new("struct tm_tally *")
        wanted = ffi.cast("uint64_t *", wanted)  # another module's, and the same to C
        error = lib.tm_save(memory.hva(0), self.fd, self.offset, wanted, self.listed, self.sums, first, count, tally)
        if error:
            raise _unwritten(self.fd, -error)
        return Tally(tally.data, tally.zero)

    def load(self, memory: GuestMemory, first: int, count: int) -> Tally:
        """Read `count` pages from `first` on, a multiple of 64, into memory that is zero. For a thread.

        Raises:
            GuestPageLost: one cannot be read, or is not what its checksum says.
        """
        # A file of huge pages cannot be written to; all of them have been reserved.
        ram = memory.fd if memory.page_size == PAGE_SIZE else -1
        return self._read(memory, ram, memory.hva(0), first, count)

    def check(self, memory: GuestMemory, first: int, count: int) -> Tally:
        """Read `count` pages from `first` on, and put them nowhere. For a thread. Raises as `load`."""
        return self._read(memory, -1, 0, first, count)

    def _read(self, memory: GuestMemory, ram: int, base: int, first: int, count: int) -> Tally:
        tally = ffi.new("struct tm_tally *")
        error = lib.tm_load(base, ram, self.fd, self.offset, self.listed, self.sums, first, count, tally)
        if error:
            raise self.lost(memory, tally.page, error, tally.found)
        return Tally(tally.data, tally.zero)

    def lost(self, memory: GuestMemory, page: int, error: int, found: int, fd: int | None = None) -> GuestPageLost:
        """Return why page `page` cannot be had: minus an errno, or TP_DAMAGED and the checksum that was found.

        Args:
            fd: of the same file, if this one's may be closed.
        """
        if error == lib.TP_DAMAGED:
            reason = f"it is damaged: its checksum is {found:#010x}, expected {self.sums[page]:#010x}"
        elif -error == errno.ENODATA:
            reason = "the file ends before it"
        else:
            reason = os.strerror(-error)
        return GuestPageLost(
            address=memory.address_of(page * PAGE_SIZE),
            path=path_of(self.fd if fd is None else fd),
            offset=self.offset + page * PAGE_SIZE,
            reason=reason,
            damaged=error == lib.TP_DAMAGED,
        )


def all_pages(pages: int) -> CData:
    """Return a bitmap of all pages, as `PageFile.save` wants it."""
    return ffi.new("uint64_t[]", [(1 << 64) - 1] * (pages // 64) + [(1 << pages % 64) - 1] * (pages % 64 > 0))


def checksum(data: bytes | memoryview, start: int = 0) -> int:
    """Return the CRC-32C of `data`; with `start`, of it after what had that one."""
    return int(lib.tm_crc32c(start, ffi.from_buffer("char[]", data), len(data)))


def path_of(fd: int) -> str:
    """Return the name of an open file, for texts."""
    return os.readlink(f"/proc/self/fd/{fd}")


def _unwritten(fd: int, error: int) -> HostFileRefused:
    return HostFileRefused(action="write", path=path_of(fd), reason=os.strerror(error))
