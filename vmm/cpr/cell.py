"""The ownership cell: one word of shared memory that says which process owns the guest.

::

    SOURCE ──offer──▶ OFFERED ──take──▶ TAKEN ──run──▶ RUNNING
       ▲                │                 │
       └──take back─────┘                 │
       └──────── reclaim, once the pidfd says that the taker is dead

A guest that is copied to a process on the same host goes as far as TAKEN, and nobody reclaims it: it is whole in both.

Every arrow is a compare-and-swap, and only one that succeeded lets a process run, read, write, accept or start
anything. So two owners cannot be, and a process that was stalled and wakes finds out by its next swap that it lost.
Whether a process owns the guest is what its own swaps said, and not what the word says now. A cell is made anew for
each attempt and never used again: a late waker must not find a later offer.

The word lives in a memfd whose size is sealed, so that the other side can't make access to it fault.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import mmap
import os
import stat
from typing import TYPE_CHECKING, Final, final

from vmm.errors import CprRefused, DescriptorWrongKind, HostFileRefused
from vmm.kvm._kvm import ffi, lib

if TYPE_CHECKING:
    from vmm.kvm._kvm import CData

_SIZE: Final = mmap.PAGESIZE
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Owner(enum.IntEnum):
    """The states of the cell."""

    SOURCE = 1
    OFFERED = 2
    TAKEN = 3
    RUNNING = 4


@final
class OwnershipCell:
    """One process's view of a cell. Each side uses it from its trio loop alone."""

    def __init__(self, fd: int, *, ours: bool) -> None:
        self.fd: Final = fd
        self._ours = ours
        self._map = mmap.mmap(fd, _SIZE)
        self._word: CData | None = ffi.from_buffer("uint32_t[]", self._map)

    @classmethod
    def create(cls, *, ours: bool = True) -> OwnershipCell:
        """Make a cell in state SOURCE, sealed. Raises `HostFileRefused` where the host has nothing left for it.

        Args:
            ours: whether this process is the source, and not the destination.
        """
        fd = -1
        try:
            fd = os.memfd_create("trio-vmm-owner", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, _SIZE)
            os.pwrite(fd, int(Owner.SOURCE).to_bytes(4, "little"), 0)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return cls(fd, ours=ours)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise _refused("create", error) from error

    @classmethod
    def adopt(cls, fd: int, *, ours: bool = False) -> OwnershipCell:
        """Map a cell that a peer sent. The descriptor becomes the cell's.

        Args:
            ours: as in `create`.

        Raises:
            DescriptorWrongKind: it is no sealed memfd of the right size, or not fresh; the descriptor has been closed.
            HostFileRefused: the host has nothing left to map it with; likewise.
        """
        try:
            found = os.fstat(fd)
            wanted = f"a sealed memfd of {_SIZE} bytes"
            if not stat.S_ISREG(found.st_mode):
                raise DescriptorWrongKind(name="owner", found="no file", wanted=wanted)
            if found.st_size != _SIZE:
                raise DescriptorWrongKind(name="owner", found=f"a file of {found.st_size} bytes", wanted=wanted)
            try:
                seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            except OSError:
                seals = 0
            if seals & _SEALS != _SEALS:
                raise DescriptorWrongKind(name="owner", found=f"a file with seals {seals:#x}", wanted=wanted)
            word = int.from_bytes(os.pread(fd, 4, 0), "little")
            if word != Owner.SOURCE:
                raise DescriptorWrongKind(name="owner", found=f"a cell that says {word}", wanted="a fresh one")
            try:
                return cls(fd, ours=ours)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EPERM):
                    found_out = "a file that can't be written"
                    raise DescriptorWrongKind(name="owner", found=found_out, wanted=wanted) from error
                raise _refused("map", error) from error
        except BaseException:
            os.close(fd)
            raise

    @property
    def ours(self) -> bool:
        """Whether this process owns the guest: its own last swap says so; the source's before its first one, too."""
        return self._ours

    @property
    def owner(self) -> Owner:
        """The present state. A word that is none of them counts as RUNNING: whoever wrote it has the guest."""
        word = lib.cell_load(self._word)
        return Owner(word) if word in Owner.__members__.values() else Owner.RUNNING

    def _swap(self, old: Owner, new: Owner) -> bool:
        return bool(lib.cell_compare_and_swap(self._word, old, new) == old)

    def offer(self) -> None:
        """SOURCE -> OFFERED. The source alone can leave SOURCE; so this fails only where somebody breaks the rules.

        Raises:
            CprRefused: the destination wrote to the cell. Nothing was offered.
        """
        if not self._swap(Owner.SOURCE, Owner.OFFERED):
            raise CprRefused(side="source", step="loaded", reason="the destination wrote to the ownership cell unasked")
        self._ours = False

    def take_back(self) -> bool:
        """OFFERED -> SOURCE. False where the destination was quicker."""
        self._ours = self._swap(Owner.OFFERED, Owner.SOURCE)
        return self._ours

    def take(self) -> bool:
        """OFFERED -> TAKEN. False where nothing is offered, or no longer."""
        return self._swap(Owner.OFFERED, Owner.TAKEN)

    def run(self) -> bool:
        """TAKEN -> RUNNING. False where the source found this process dead, and reclaimed."""
        self._ours = self._swap(Owner.TAKEN, Owner.RUNNING)
        return self._ours

    def reclaim(self) -> bool:
        """TAKEN -> SOURCE. Only for a source that knows the taker to be dead."""
        self._ours = self._swap(Owner.TAKEN, Owner.SOURCE)
        return self._ours

    def close(self) -> None:
        """Unmap and close. Idempotent."""
        if self._word is not None:
            ffi.release(self._word)
            self._word = None
            self._map.close()
            os.close(self.fd)


def _refused(action: str, error: OSError) -> HostFileRefused:
    return HostFileRefused(action=action, path="an ownership cell", reason=os.strerror(error.errno or 0))
