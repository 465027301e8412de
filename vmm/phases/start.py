"""How a machine is to be started: what an embedding program or the command line decides."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Final, final

import attrs

from vmm import __version__
from vmm.monitor.session import Version
from vmm.service import NO_MANAGER, ServiceManager

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.cpr.limits import CprLimits
    from vmm.phases.config import GoOn
    from vmm.recipe import Recipe

QEMU_VERSION: Final = (11, 0, 92)
"""The release whose protocol is spoken."""

VERSION: Final = Version(*QEMU_VERSION, f"trio-vmm {__version__}")


def _complain_on_stderr(text: str) -> None:
    # A disk that is full, or a pipe that nobody reads any more, is no reason to end a guest.
    with contextlib.suppress(OSError, ValueError):
        print(f"trio-vmm: {text}", file=sys.stderr, flush=True)


@final
@attrs.define(eq=False)
class Identity:
    """Name and UUID of the machine; set by `machine-set`, shown by `query-name` and `query-uuid`."""

    name: str | None = None
    uuid: str | None = None


@final
@attrs.frozen(eq=False)
class Start:
    """A recipe, and what the command line says beside it."""

    recipe: Recipe
    after_preconfig: GoOn | None = None
    """With `--preconfig`: what follows by itself once a session has sent `x-exit-preconfig`."""
    stop_at: str = ""
    """For tests of live update: the named step at which this process stops itself with SIGSTOP."""
    limits: CprLimits | None = None
    """How long this side of a live update waits for the other; None for the usual."""
    cpr_uids: frozenset[int] = frozenset()
    """Users whose processes may be the other side of a live update, besides root and this process's own."""
    stderr: int | None = None
    """Descriptor of this process's standard error: handed to a successor, and replaced by a predecessor's. None where
    it is not the machine's alone, as in an embedding program."""
    autostart: bool = True
    """Whether a guest that comes in, and ran where it was, runs here at once (`-S`: not before `cont`)."""
    begun: Callable[[], None] | None = None
    """Called once the recipe has been carried out."""
    own_process: bool = False
    """Whether the process is the machine's alone: it can become another program then, or await its guest's return."""
    is_caretaker: bool = False
    """Whether the guest is here only until the process that had it has become another program."""
    caretaker_options: tuple[str, ...] = ()
    """For tests: more options of the process that has the guest while this one becomes another program."""
    failure: str = ""
    """Why a guest that left for another program comes back here instead, as a sentence; empty where none does."""
    service: ServiceManager = NO_MANAGER
    """Who is told which process has the guest."""
    version: Version = VERSION
    complain: Callable[[str], None] = _complain_on_stderr
    """Takes a sentence for the operator: something went wrong that the machine survives."""
    identity: Identity = attrs.Factory(Identity)
