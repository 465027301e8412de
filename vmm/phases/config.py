"""What a machine is: the arguments of `machine-set`, `accel-set` and `cpu-model-set`.

Member names are those of QEMU's `-machine`, `-m`, `-smp` and `-cpu`. A configuration is checked whole and before
anything of it is carried out.
"""

from __future__ import annotations

import uuid as uuids
from typing import Final, Literal, final

import attrs

from vmm.errors import OptionInvalid, Unsupported
from vmm.phases.firmware_options import FirmwareOptions

MAX_CPUS: Final = 8
MIN_MEMORY: Final = 1 << 20
MAX_MEMORY: Final = 1 << 40
PAGE: Final = 4096
DEFAULT_MEMORY: Final = 128 << 20
ACCELERATORS: Final = ("kvm", "qtest")


@final
@attrs.frozen(kw_only=True)
class MemoryOptions:
    """`-m`: guest RAM in bytes, a multiple of 4 KiB between 1 MiB and 1 TiB."""

    size: int = DEFAULT_MEMORY


@final
@attrs.frozen(kw_only=True)
class SmpOptions:
    """`-smp`: vCPUs, each a core of its own, 1 to 8."""

    cpus: int = 1
    cores: int | None = None
    sockets: int | None = None
    threads: int | None = None
    maxcpus: int | None = None


@final
@attrs.frozen(kw_only=True)
class MachineOptions:
    """The arguments of `machine-set`; what is left out has QEMU's default, or the one named here."""

    type: str = "microvm"
    name: str | None = None
    uuid: str | None = None
    memory: MemoryOptions = MemoryOptions()
    memory_backend: str | None = attrs.field(default=None, metadata={"wire": "memory-backend"})
    """Id of the object that the RAM is made of, of the same size; None for a memfd of its own."""
    smp: SmpOptions = SmpOptions()
    kernel: str | None = None
    """Path of a bzImage or an ELF file with a PVH note; `flat:PATH` for a flat binary; `builtin:NAME` for a guest
    that comes with this package."""
    initrd: str | None = None
    append: str = ""
    serial: list[str] = attrs.Factory(list)
    """Labels of the chardevs behind COM1, COM2; at most two."""
    reboot_action: Literal["reset", "shutdown"] = attrs.field(default="reset", metadata={"wire": "reboot-action"})
    """What a reset that the guest asks for does (`-no-reboot` is `shutdown`)."""
    firmware: FirmwareOptions = attrs.field(default=FirmwareOptions(), metadata={"inline": True})

    def check(self) -> None:
        """Raise `OptionInvalid` or `Unsupported` for the first thing that cannot be."""
        if self.type != "microvm":
            raise Unsupported(what="Machine type", name=self.type, instead="the one there is is microvm")
        size = self.memory.size
        if not MIN_MEMORY <= size <= MAX_MEMORY or size % PAGE:
            wanted = "a multiple of 4 KiB between 1 MiB and 1 TiB"
            raise OptionInvalid(option="memory.size", value=size, wanted=wanted)
        smp = self.smp
        if not 1 <= smp.cpus <= MAX_CPUS:
            raise OptionInvalid(option="smp.cpus", value=smp.cpus, wanted=f"a number of vCPUs from 1 to {MAX_CPUS}")
        for member, only in (("cores", smp.cpus), ("maxcpus", smp.cpus), ("sockets", 1), ("threads", 1)):
            value = getattr(smp, member)
            if value not in (None, only):
                wanted = f"{only}, the only value with {smp.cpus} vCPUs (one socket, a core each, no hot plug)"
                raise OptionInvalid(option=f"smp.{member}", value=value, wanted=wanted)
        for member in ("initrd", "append"):
            if getattr(self, member) and self.kernel is None:
                raise OptionInvalid(option=member, value=getattr(self, member), wanted="possible without a kernel")
        if self.uuid is not None:
            try:
                uuids.UUID(self.uuid)
            except ValueError:
                wanted = "a UUID such as 6ba7b810-9dad-11d1-80b4-00c04fd430c8"
                raise OptionInvalid(option="uuid", value=self.uuid, wanted=wanted) from None
        if len(self.serial) > 2:
            raise OptionInvalid(option="serial", value=self.serial, wanted="at most two chardevs (COM1 and COM2)")
        self.firmware.check()


@final
@attrs.frozen(kw_only=True)
class AcceleratorOptions:
    """The arguments of `accel-set`."""

    accel: str = "kvm"
    dirty_ring_size: int | None = None
    """Of kvm: each vCPU says what it writes in a ring of so many entries, a power of two from 1024 to 65536. 0, and
    nothing, is KVM's log of all memory."""

    def check(self) -> None:
        """Raise `Unsupported` for anything but KVM, and the one that executes nothing; `OptionInvalid` for a ring."""
        if self.accel not in ACCELERATORS:
            raise Unsupported(what="Accelerator", name=self.accel, instead="there are kvm, and qtest for tests")
        size = self.dirty_ring_size
        if not size:
            return
        if self.accel != "kvm":
            raise OptionInvalid(option="dirty-ring-size", value=size, wanted="possible but with kvm")
        if not 1024 <= size <= 65536 or size & (size - 1):
            raise OptionInvalid(option="dirty-ring-size", value=size, wanted="a power of two from 1024 to 65536, or 0")


@final
@attrs.frozen(kw_only=True)
class CpuOptions:
    """The arguments of `cpu-model-set`."""

    model: str = "host"
    props: dict[str, object] = attrs.Factory(dict)
    """CPU features by QEMU's property names, on (true) or off (false)."""

    def check(self) -> None:
        """Raise `Unsupported` for a model that does not come from this host."""
        if self.model not in ("host", "max", "base"):
            instead = "use host, which is all that this host's KVM offers, or base with the features that props names"
            raise Unsupported(what="CPU model", name=self.model, instead=instead)


@final
@attrs.frozen
class GoOn:
    """The decision to go on through the phases that remain: to a running guest, or to one that stands (`-S`)."""

    start: bool
    to_incoming: bool = False
    """Whether the guest's state comes in, and nothing is booted."""
