"""Where an initrd goes: as high as it may, so that it is out of the kernel's way while that unpacks itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.errors import BootError
from vmm.hw.boot import layout
from vmm.kvm.memory import LOW_RAM_END

if TYPE_CHECKING:
    from vmm.hw.boot.plan import BinarySource


def place_initrd(image: str, initrd: BinarySource, kernel_end: int, ram_size: int, limit: int = LOW_RAM_END) -> int:
    """Return the page-aligned address for `initrd`, above `kernel_end` and below both `limit` and the end of low RAM.

    Raises:
        BootError: it is empty, or there is not that much room.
    """
    if not initrd.size:
        raise BootError(image=image, reason=f"initrd {initrd.name} is empty")
    bottom = layout.align_up(kernel_end, layout.PAGE)
    top = min(limit, layout.low_ram_end(ram_size))
    address = layout.align_down(top - initrd.size, layout.PAGE)
    if address >= bottom:
        return address
    needed = layout.align_up(bottom + layout.align_up(initrd.size, layout.PAGE), layout.MIB)
    if needed <= min(limit, LOW_RAM_END):
        advice = f"give the machine at least {layout.size_text(needed)}"
    else:
        advice = f"no amount of RAM helps, because an initrd must lie below {layout.size_text(limit)}"
    raise BootError(
        image=image,
        reason=f"initrd {initrd.name} has {layout.size_text(initrd.size)}, and of {layout.size_text(ram_size)} of RAM "
        f"the kernel leaves it {layout.size_text(max(top - bottom, 0))}; {advice}",
    )
