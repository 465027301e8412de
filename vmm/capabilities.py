"""Tokens: what the open phases allow, as objects to be passed on.

A token is the only route to the facet that it stands for. A function that has an effect takes the token for it as
a parameter; without one there is nothing to call, and after the phase's window has closed the token leads nowhere
(`TokenRevoked`). The set of kinds is closed: each is in `KINDS` and declared in `vmm.tokens`. `vmm.nursery_tree` mints
them and nobody else does.

Tokens stop mistakes and make authority reviewable. They do not hold hostile code in the process: that takes seccomp
and landlock (docs/tokens.md).

Of the four things that English calls capability, this module has the first; a *migration capability*, a *QMP
capability* and a *KVM extension* are always called by their whole name.
"""

from __future__ import annotations

from typing import Final, final

from vmm.tokens.guest import MayInject as MayInject
from vmm.tokens.guest import MayLoadState as MayLoadState
from vmm.tokens.guest import MayPreviewState as MayPreviewState
from vmm.tokens.guest import MayRestoreGuest as MayRestoreGuest
from vmm.tokens.guest import MayRunVcpus as MayRunVcpus
from vmm.tokens.guest import MaySaveState as MaySaveState
from vmm.tokens.guest import MayWriteGuestMemory as MayWriteGuestMemory
from vmm.tokens.machine import MayAppendRecipe as MayAppendRecipe
from vmm.tokens.machine import MayConfigureMachine as MayConfigureMachine
from vmm.tokens.machine import MayDeclareState as MayDeclareState
from vmm.tokens.machine import MayMapGuestMemory as MayMapGuestMemory
from vmm.tokens.machine import MayOpenKvm as MayOpenKvm
from vmm.tokens.machine import MayPlugDevice as MayPlugDevice
from vmm.tokens.machine import MaySetNuma as MaySetNuma
from vmm.tokens.mechanism import AnyToken as AnyToken
from vmm.tokens.mechanism import Cell as Cell
from vmm.tokens.mechanism import Mint as Mint
from vmm.tokens.mechanism import Token as Token
from vmm.tokens.migration import IncomingPort as IncomingPort
from vmm.tokens.migration import MayCancelMigration as MayCancelMigration
from vmm.tokens.migration import MayListen as MayListen
from vmm.tokens.migration import MayReadDirtyLog as MayReadDirtyLog
from vmm.tokens.migration import MayReleaseGuest as MayReleaseGuest
from vmm.tokens.migration import MayResumeHere as MayResumeHere
from vmm.tokens.migration import MaySendDescriptors as MaySendDescriptors
from vmm.tokens.migration import MaySetMigrationCap as MaySetMigrationCap
from vmm.tokens.migration import MaySetMigrationParam as MaySetMigrationParam
from vmm.tokens.migration import MayStartMigration as MayStartMigration
from vmm.tokens.migration import MaySteerPostcopy as MaySteerPostcopy
from vmm.tokens.migration import MaySwitchOver as MaySwitchOver
from vmm.tokens.process import Ender as Ender
from vmm.tokens.process import HostResources as HostResources
from vmm.tokens.process import MayAddDescriptor as MayAddDescriptor
from vmm.tokens.process import MayAdoptDescriptor as MayAdoptDescriptor
from vmm.tokens.process import MayCreateBackend as MayCreateBackend
from vmm.tokens.process import MayDismissJob as MayDismissJob
from vmm.tokens.process import MayOpenHostFile as MayOpenHostFile
from vmm.tokens.process import MayQuery as MayQuery
from vmm.tokens.process import MayQuit as MayQuit
from vmm.tokens.process import Views as Views

KINDS: Final[tuple[type[AnyToken], ...]] = (
    MayQuery, MayQuit, MayDismissJob, MayAddDescriptor, MayCreateBackend, MayOpenHostFile, MayAdoptDescriptor,
    MayConfigureMachine, MayAppendRecipe, MayOpenKvm, MaySetNuma, MaySetMigrationCap, MaySetMigrationParam,
    MayListen, MayRestoreGuest, MayPlugDevice, MayMapGuestMemory, MayDeclareState, MayWriteGuestMemory,
    MayLoadState, MayRunVcpus, MayInject, MayStartMigration, MayCancelMigration, MaySwitchOver,
    MaySteerPostcopy, MaySendDescriptors, MayReadDirtyLog, MayPreviewState, MaySaveState, MayReleaseGuest,
    MayResumeHere,
)  # fmt: skip
"""Every kind there is, in the order in which the phases come to grant them."""


@final
class Grant:
    """The kinds that a session may be lent, whatever the phases grant. Has a name for error texts."""

    __slots__ = ("kinds", "name")

    def __init__(self, name: str, kinds: frozenset[type[AnyToken]]) -> None:
        self.name: Final = name
        self.kinds: Final = kinds


OBSERVE: Final = Grant("observe", frozenset({MayQuery}))
OPERATE: Final = Grant("operate", OBSERVE.kinds | {MayQuit, MayRunVcpus, MayResumeHere, MayPlugDevice})
MIGRATE: Final = Grant(
    "migrate",
    OPERATE.kinds
    | {
        MayDismissJob,
        MaySetMigrationCap,
        MaySetMigrationParam,
        MayListen,
        MayStartMigration,
        MayCancelMigration,
        MaySwitchOver,
        MaySteerPostcopy,
    },
)
QTEST: Final = Grant("qtest", frozenset({MayInject}))
ADMIN: Final = Grant("admin", frozenset(KINDS) - {MayAdoptDescriptor})
REPLAY: Final = Grant("incoming-recipe", frozenset(KINDS) - {MayOpenHostFile, MayStartMigration, MayRestoreGuest})
"""For a recipe that arrived in a stream: host resources are claimed from the predecessor, never opened by path."""
