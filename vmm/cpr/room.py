"""Room for the descriptors that a live update brings, made before the first of them comes.

A process may have as many descriptors as RLIMIT_NOFILE says: the soft limit holds, and everybody may raise it as far
as the hard one (getrlimit(2)). What comes over a unix socket beyond the limit is lost, so it is raised in time, or the
update refused while nothing has happened yet.
"""

from __future__ import annotations

import os
import resource
from typing import Final

from vmm.errors import TooManyDescriptors

_SPARE: Final = 256
"""Descriptors besides those that come: of KVM, of doorbells, of monitors' clients."""


def make_room(count: int) -> None:
    """See to it that `count` descriptors can come, and some be opened besides.

    Raises:
        TooManyDescriptors: the hard limit is in the way. Nothing was changed.
    """
    there = len(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = there + count + _SPARE
    if soft >= needed or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise TooManyDescriptors(count=count, there=there, limit=hard, needed=needed)
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
