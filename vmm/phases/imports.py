"""The imports that a monitor starts without: KVM, devices, streams, and the commands of later phases.

They take longer than it takes to start, and longer than a client should wait for an answer: so they are made when it is
known that a machine is coming, all at once, lest one be left for a guest's pause, and in a thread, so that the monitor
answers meanwhile.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from vmm.hw.codec import Codecs
    from vmm.monitor.command import CommandTable

_MODULES: Final = (
    *("vmm.phases.assembly", "vmm.phases.fd_receive", "vmm.phases.accel"),
    "calendar",  # for a guest that sets its clock
)
"""With what they import, all phases, and what a running guest may need when no descriptor is left for an import."""


async def import_the_rest(table: CommandTable) -> None:
    """Import it all, unless that has been done. A cancellation waits for the imports that have begun."""
    if table.imported and all(name in sys.modules for name in _MODULES):
        return
    await trio.to_thread.run_sync(_import, table)


async def compile_codecs() -> Codecs:
    """Return codecs for a machine that comes, compiled for each device that may be on its board.

    They take half of the time from `migrate` to a guest that runs, and no more than a wait has.
    """
    return await trio.to_thread.run_sync(_compiled)


def _compiled() -> Codecs:
    from vmm.hw.codec import Codecs
    from vmm.phases.board import STATES

    codecs = Codecs()
    for kind in STATES:
        codecs.of(kind)
    return codecs


def _import(table: CommandTable) -> None:
    for name in _MODULES:
        importlib.import_module(name)
    table.import_handlers()
