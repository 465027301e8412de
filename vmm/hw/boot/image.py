"""Which kind of image a file is, and how it is booted.

The kind is read from the content: a bzImage has "HdrS" at byte 0x202, an ELF file its magic. Anything else could be a
truncated or a wrong kernel, so it is an error, unless the name says that it is a flat image: `flat:PATH` (whatever the
content), or a PATH that ends in `.bin` (if it is neither of the other two).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vmm.errors import BootError
from vmm.hw.boot import layout
from vmm.hw.boot.tables import firmware_tables

if TYPE_CHECKING:
    from vmm.hw.boot.plan import BinarySource, BootKind, BootPlan, Data

FLAT_PREFIX: Final = "flat:"
FLAT_SUFFIX: Final = ".bin"

_HDRS: Final = b"HdrS"
_HDRS_OFFSET: Final = 0x202
_ELF: Final = b"\x7fELF"
_HINTS: Final = (
    (b"\x1f\x8b", "it is compressed with gzip; unpack it first"),
    (b"\xfd7zXZ", "it is compressed with xz; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "it is compressed with zstd; unpack it first"),
    (b"!<arch>", "it is an archive, perhaps a Debian package; the kernel is a file in it"),
)


def image_path(name: str) -> str:
    """Return the path of the file that a kernel called `name` is in."""
    return name.removeprefix(FLAT_PREFIX)


def image_kind(kernel: BinarySource) -> BootKind:
    """Tell the kind of `kernel` from its content and its name.

    Raises:
        BootError: it is none of the kinds that boot here.
    """
    if kernel.name.startswith(FLAT_PREFIX):
        return "flat"
    first = kernel.read(0, _HDRS_OFFSET + len(_HDRS))
    if first[_HDRS_OFFSET:] == _HDRS:
        return "bzimage"
    if first.startswith(_ELF):
        return "pvh"
    if kernel.name.endswith(FLAT_SUFFIX):
        return "flat"
    if not first:
        raise BootError(image=kernel.name, reason="it is empty")
    for magic, hint in _HINTS:
        if first.startswith(magic):
            raise BootError(image=kernel.name, reason=hint)
    raise BootError(
        image=kernel.name,
        reason="it is neither a bzImage nor an ELF kernel; if it is a flat real-mode image, say "
        f"{FLAT_PREFIX}{kernel.name}",
    )


def plan_boot(
    kernel: BinarySource,
    initrd: BinarySource | None,
    cmdline: str,
    ram_size: int,
    cpus: int,
    acpi: Data | None = None,
) -> BootPlan:
    """Plan the start of `kernel` on a machine with `ram_size` bytes of RAM and `cpus` processors.

    `acpi` is what `vmm.hw.boot.acpi.acpi_tables` made, or None for a machine without ACPI; MP tables there are always.
    Reads headers only; does not block on anything but the file. Nothing in it depends on the host or on time, so the
    same files give the same plan.

    Raises:
        BootError: the image, the initrd or the command line cannot be had on this machine, and why.
    """
    if ram_size < layout.RAM_MINIMUM:
        raise BootError(
            image=kernel.name,
            reason=f"the machine has {layout.size_text(ram_size)} of RAM, "
            f"at least {layout.size_text(layout.RAM_MINIMUM)} are needed",
        )
    tables = firmware_tables(cpus, acpi)
    # One of the three is needed, and start-up time counts.
    match image_kind(kernel):
        case "bzimage":
            from vmm.hw.boot.bzimage import plan_bzimage

            return plan_bzimage(kernel, initrd, cmdline, ram_size, tables)
        case "pvh":
            from vmm.hw.boot.pvh import plan_pvh

            return plan_pvh(kernel, initrd, cmdline, ram_size, tables)
        case "flat":
            from vmm.hw.boot.flat import plan_flat

            return plan_flat(kernel, initrd, cmdline, tables)
