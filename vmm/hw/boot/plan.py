"""What is to be written into guest RAM, and how the boot processor starts: plain data.

A plan names file ranges instead of holding their bytes: a kernel or an initrd goes from the page cache into guest RAM
in one copy, by whoever carries the plan out. The plan stays valid, and can be carried out again at a reset, as long as
the descriptors in it are open and the files unchanged.
"""

from __future__ import annotations

import os
import stat
from typing import Final, Literal, final

import attrs

from vmm.errors import BootError

BootKind = Literal["bzimage", "pvh", "flat"]


@final
@attrs.frozen
class BinarySource:
    """A kernel or an initrd: bytes, or a regular file by its open descriptor, which stays the caller's."""

    name: str
    """As the user gave it; error texts say it."""
    size: int
    _fd: int | None = None
    _data: bytes = b""

    @classmethod
    def from_bytes(cls, name: str, data: bytes) -> BinarySource:
        """Wrap `data`."""
        return cls(name, len(data), None, data)

    @classmethod
    def from_fd(cls, name: str, fd: int) -> BinarySource:
        """Wrap open descriptor `fd` of a regular file. Its offset is neither used nor changed.

        Raises:
            BootError: it is not a regular file.
        """
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise BootError(image=name, reason="it is not a regular file")
        return cls(name, status.st_size, fd)

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`, or fewer where the content ends."""
        if self._fd is None:
            return self._data[offset : offset + size]
        return os.pread(self._fd, size, offset)

    def place(self, address: int, offset: int, size: int) -> Data | FileRange:
        """Describe the writing of `size` bytes from `offset` to guest-physical `address`."""
        if self._fd is None:
            return Data(address, memoryview(self._data)[offset : offset + size])
        return FileRange(address, self._fd, offset, size, self.name)


@final
@attrs.frozen
class Data:
    """These bytes go to guest-physical `address`."""

    address: int
    data: bytes | memoryview

    @property
    def size(self) -> int:
        """Number of bytes written."""
        return len(self.data)


@final
@attrs.frozen
class FileRange:
    """`size` bytes from `offset` of descriptor `fd` go to guest-physical `address`; `name` is for error texts."""

    address: int
    fd: int
    offset: int
    size: int
    name: str


@final
@attrs.frozen
class Zeros:
    """`size` bytes from guest-physical `address` become zero. A fresh memfd has them so; after a reset it has not."""

    address: int
    size: int


Write = Data | FileRange | Zeros


# --- the boot processor ---------------------------------------------------------------------------------------------

CODE_TYPE: Final = 0xB  # execute, read, accessed
DATA_TYPE: Final = 0x3  # read, write, accessed
TSS_TYPE: Final = 0xB  # 32- or 64-bit TSS, busy: what VMX wants in TR at every entry


@final
@attrs.frozen(kw_only=True)
class Segment:
    """A segment register with its hidden part; fields as in `struct kvm_segment` (dpl 0, present, usable).

    `limit` is in bytes whatever `g` says, as KVM has it.
    """

    selector: int
    base: int = 0
    limit: int = 0xFFFF_FFFF
    type: int
    s: int = 1
    db: int = 0
    l: int = 0  # noqa: E741 - its name in linux/kvm.h
    g: int = 0

    def descriptor(self) -> int:
        """Return the descriptor of 8 bytes that belongs into a GDT. Source: Intel SDM volume 3, 3.4.5."""
        limit = self.limit >> 12 if self.g else self.limit
        access = self.type | self.s << 4 | 1 << 7
        flags = self.l << 1 | self.db << 2 | self.g << 3
        return (
            (limit & 0xFFFF)
            | (self.base & 0xFF_FFFF) << 16
            | access << 40
            | (limit >> 16 & 0xF) << 48
            | flags << 52
            | (self.base >> 24 & 0xFF) << 56
        )


@final
@attrs.frozen(kw_only=True)
class CpuStart:
    """Registers of the boot processor at its first instruction.

    What is not named here stays as KVM resets it, general registers are zero. The other processors are not started:
    their MP state is KVM_MP_STATE_UNINITIALIZED until the guest sends INIT and SIPI.
    """

    mode: Literal["real", "protected", "long"]
    rip: int
    rsp: int = 0
    rbx: int = 0
    rsi: int = 0
    rflags: int = 0x2
    cr0: int
    cr3: int = 0
    cr4: int = 0
    efer: int = 0
    code: Segment
    data: Segment
    """For DS, ES, FS, GS and SS."""
    task: Segment | None = None
    """TR; None leaves it as it is after reset."""
    gdt: range = range(0)
    """Addresses of the GDT: base and, as its last address, base plus limit. Empty in real mode."""
    idt: range = range(0)


@final
@attrs.frozen(kw_only=True)
class BootPlan:
    """All that a loaded image amounts to. `writes` do not overlap, except that later ones win."""

    kind: BootKind
    image: str
    writes: tuple[Write, ...]
    start: CpuStart
