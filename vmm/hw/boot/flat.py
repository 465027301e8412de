"""Flat images: a few KiB of real-mode code, for tests and demonstrations.

Loaded at 0x10000 and started in real mode with CS, DS, ES, FS, GS and SS 0x1000, IP 0 and SP 0x8000, which is kvmtool's
convention (x86/kvm.c, load_flat_binary). An image of more than 32 KiB has the stack inside it until it moves SP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vmm.errors import BootError
from vmm.hw.boot import layout
from vmm.hw.boot.plan import CODE_TYPE, DATA_TYPE, BootPlan, CpuStart, Segment

if TYPE_CHECKING:
    from vmm.hw.boot.plan import BinarySource
    from vmm.hw.boot.tables import FirmwareTables

SELECTOR: Final = layout.FLAT_IMAGE >> 4
STACK: Final = 0x8000
SIZE_LIMIT: Final = layout.EBDA - layout.FLAT_IMAGE
_CR0_ET: Final = 1 << 4


def plan_flat(kernel: BinarySource, initrd: BinarySource | None, cmdline: str, firmware: FirmwareTables) -> BootPlan:
    """Plan the start of a flat image.

    Raises:
        BootError: it is empty or too long, or there is an initrd or a command line, which it has no way to find.
    """
    if not 0 < kernel.size <= SIZE_LIMIT:
        raise BootError(
            image=kernel.name,
            reason=f"a flat image has 1 to {SIZE_LIMIT} bytes ({layout.size_text(SIZE_LIMIT)}), this one {kernel.size}",
        )
    if initrd is not None:
        raise BootError(image=kernel.name, reason=f"a flat image takes no initrd, and {initrd.name} was given")
    if cmdline:
        raise BootError(image=kernel.name, reason=f"a flat image takes no command line, and {cmdline!r} was given")
    code = Segment(selector=SELECTOR, base=layout.FLAT_IMAGE, limit=0xFFFF, type=CODE_TYPE)
    data = Segment(selector=SELECTOR, base=layout.FLAT_IMAGE, limit=0xFFFF, type=DATA_TYPE)
    return BootPlan(
        kind="flat",
        image=kernel.name,
        writes=(*firmware.writes, kernel.place(layout.FLAT_IMAGE, 0, kernel.size)),
        start=CpuStart(mode="real", rip=0, rsp=STACK, cr0=_CR0_ET, code=code, data=data, idt=range(0x400)),
    )
