"""Phase ``backends``: the guest's RAM, a shared memfd; in a live update the predecessor's own."""

from __future__ import annotations

from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, final

import attrs

from vmm import hostio
from vmm.capabilities import MayCreateBackend, MayOpenHostFile
from vmm.kvm.memory import GuestMemory
from vmm.phases.preconfig import run_preconfig

if TYPE_CHECKING:
    from vmm.capabilities import Mint
    from vmm.nursery_tree import Phase
    from vmm.phases.accel import Accelerator
    from vmm.phases.assembly import Precreated


@final
@attrs.frozen
class BackendsGrants:
    """Tokens of this phase."""

    create_backend: MayCreateBackend
    open_host_file: MayOpenHostFile


async def run_backends(accel: Phase, made: Precreated, accelerator: Accelerator) -> None:
    """Create or claim the guest's RAM, then go on to phase preconfig."""
    async with accel.child("backends", machine_phase="accel-created") as phase:

        def grants(mint: Mint) -> BackendsGrants:
            return BackendsGrants(
                create_backend=mint(MayCreateBackend, made.host.stores),
                open_host_file=mint(MayOpenHostFile, made.incoming.resources()),
            )

        size = made.definition.options.memory.size
        with ExitStack() as stack:
            async with phase.window(grants) as window:
                fd = window.grants.open_host_file.obtain("ram", lambda: hostio.create_ram(size, "ram"))
                memory = stack.enter_context(closing(GuestMemory.from_memfd(fd, size)))
            await run_preconfig(phase, made, accelerator, memory)
