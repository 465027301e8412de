"""Phase ``backends``: the guest's RAM, shared memory of its back end; in a live update the predecessor's own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, final

import attrs

from vmm import hostio, hostmem
from vmm.capabilities import MayCreateBackend, MayOpenHostFile
from vmm.kvm.memory import GuestMemory
from vmm.phases.preconfig import run_preconfig

if TYPE_CHECKING:
    from vmm.capabilities import Mint
    from vmm.nursery_tree import Phase
    from vmm.phases.accel import Accelerator
    from vmm.phases.assembly import Definition, Precreated


@final
@attrs.frozen
class BackendsGrants:
    """Tokens of this phase."""

    create_backend: MayCreateBackend
    open_host_file: MayOpenHostFile


def make_ram(may: MayOpenHostFile, definition: Definition) -> GuestMemory:
    """Create or claim the guest's RAM, and map it. Raises `VmmError`; then nothing stays open."""
    size = definition.options.memory.size
    if definition.ram is not None:
        return GuestMemory.from_memfd(hostio.dup(definition.ram.fd), size)
    fd = may.obtain("ram", lambda: hostio.create_ram(size, "ram"))
    try:
        hostmem.require_ram(fd, "ram", "memfd", size)
    except BaseException:
        os.close(fd)
        raise
    return GuestMemory.from_memfd(fd, size)


async def run_backends(accel: Phase, made: Precreated, accelerator: Accelerator, memory: GuestMemory) -> None:
    """Go on to phase preconfig with the guest's RAM, which was made before phase accel was left: that can fail."""
    async with accel.child("backends", machine_phase="accel-created") as phase:

        def grants(mint: Mint) -> BackendsGrants:
            return BackendsGrants(
                create_backend=mint(MayCreateBackend, made.host.stores),
                open_host_file=mint(MayOpenHostFile, made.incoming.resources()),
            )

        async with phase.window(grants):
            pass
        await run_preconfig(phase, made, accelerator, memory)
