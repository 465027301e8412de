"""The memory behind a memory-backend object: made, opened, or taken over from the source of a live update."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import trio

from vmm import hostmem
from vmm.backends.memory import MemoryBackend
from vmm.errors import OptionInvalid, Unsupported
from vmm.phases.commands_objects import MemoryBackendFile
from vmm.phases.config import MAX_MEMORY, MIN_MEMORY

if TYPE_CHECKING:
    from vmm.capabilities import MayAdoptDescriptor, MayOpenHostFile
    from vmm.phases.commands_objects import MemoryBackendMemfd

_DEFAULT_HUGE: Final = 2 << 20


async def open_memory(
    host: MayOpenHostFile | MayAdoptDescriptor, args: MemoryBackendMemfd | MemoryBackendFile
) -> MemoryBackend:
    """Make or open it, or claim its descriptor, which is checked before anything maps it.

    Raises:
        OptionInvalid, Unsupported: `args` cannot be.
        HostFileRefused: the host has no such memory, or another machine has the file.
        DescriptorMissing, DescriptorWrongKind: of what came.
    """
    huge = _checked(args)
    name = f"object/{args.id}/memory"
    made = False

    def make() -> int:
        nonlocal made
        made = True
        if isinstance(args, MemoryBackendFile):
            return hostmem.open_ram_file(args.mem_path, args.size)
        return hostmem.create_memfd(args.size, name, huge)

    fd = host.obtain(name, make)
    try:
        if isinstance(args, MemoryBackendFile):
            hostmem.require_ram(fd, name, "file", args.size)
            # Also what came: its lock came with it, and another's is another machine's.
            hostmem.lock(fd, args.mem_path)
        else:
            hostmem.require_ram(fd, name, "memfd", args.size, huge or hostmem.PAGE_SIZE)
        if made and args.prealloc:
            where = args.mem_path if isinstance(args, MemoryBackendFile) else f"memfd:{name}"
            await trio.to_thread.run_sync(hostmem.allocate, fd, args.size, where)
    except BaseException:
        os.close(fd)
        raise
    return MemoryBackend(fd, args.size)


def _checked(args: MemoryBackendMemfd | MemoryBackendFile) -> int:
    """Return the size of the huge pages that are wanted, 0 for none. Raises `OptionInvalid`, `Unsupported`."""
    if not MIN_MEMORY <= args.size <= MAX_MEMORY or args.size % hostmem.PAGE_SIZE:
        wanted = "a multiple of 4 KiB between 1 MiB and 1 TiB"
        raise OptionInvalid(option=f"object-add {args.id}: size", value=args.size, wanted=wanted)
    if not args.share:
        instead = "set it to on: a machine's RAM is shared with a successor, always"
        raise Unsupported(what=f"Option of {args.qom_type}", name="share=off", instead=instead)
    if isinstance(args, MemoryBackendFile):
        return 0
    if not args.seal:
        instead = "leave it on: who has the descriptor could cut the RAM off from under the guest"
        raise Unsupported(what="Option of memory-backend-memfd", name="seal=off", instead=instead)
    if not args.hugetlb:
        if args.hugetlbsize is not None:
            wanted = "possible without hugetlb=on"
            raise OptionInvalid(option=f"object-add {args.id}: hugetlbsize", value=args.hugetlbsize, wanted=wanted)
        return 0
    sizes = hostmem.huge_page_sizes()
    huge = args.hugetlbsize if args.hugetlbsize is not None else _DEFAULT_HUGE
    if huge not in sizes:
        wanted = f"a size of huge pages of this host: {', '.join(map(str, sizes)) or 'it has none'}"
        raise OptionInvalid(option=f"object-add {args.id}: hugetlbsize", value=huge, wanted=wanted)
    if args.size % huge:
        wanted = f"a multiple of its huge pages of {huge} bytes"
        raise OptionInvalid(option=f"object-add {args.id}: size", value=args.size, wanted=wanted)
    return huge
