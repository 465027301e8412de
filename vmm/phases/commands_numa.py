"""The command that makes NUMA nodes."""

from __future__ import annotations

import trio

from vmm.capabilities import MaySetNuma
from vmm.phases.numa import SetNumaNode


async def set_numa_node(may: MaySetNuma, args: SetNumaNode) -> None:
    """Make a NUMA node, put vCPUs into one, or say how far one is from another. Only the guest can tell the difference.

    Nodes have to be complete, with all of the machine's memory, when the machine is. A vCPU that was put nowhere is in
    node 0.
    """
    await trio.lowlevel.checkpoint()
    may.set(args.options)
