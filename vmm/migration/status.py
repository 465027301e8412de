"""How far a migration is: QEMU's MigrationStatus as two state machines, and what `query-migrate` says in each state.

Source: QEMU qapi/migration.json (MigrationStatus, MigrationInfo), migration/migration.c (fill_source_migration_info,
fill_destination_migration_info).
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Final, Literal, Protocol, cast, final

import attrs

from vmm.migration.address import SocketAddress
from vmm.monitor.arguments import unstructure

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

Side = Literal["source", "target"]
StatusName = Literal[
    "none",
    "setup",
    "cancelling",
    "cancelled",
    "active",
    "postcopy-device",
    "postcopy-active",
    "postcopy-paused",
    "postcopy-recover-setup",
    "postcopy-recover",
    "completed",
    "failing",
    "failed",
    "colo",
    "pre-switchover",
    "device",
    "wait-unplug",
]
"""In the order of QEMU's enumeration."""


@final
class MigrationStatus(StrEnum):
    """What QEMU calls MigrationStatus."""

    NONE = "none"
    SETUP = "setup"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    ACTIVE = "active"
    POSTCOPY_DEVICE = "postcopy-device"
    POSTCOPY_ACTIVE = "postcopy-active"
    POSTCOPY_PAUSED = "postcopy-paused"
    POSTCOPY_RECOVER_SETUP = "postcopy-recover-setup"
    POSTCOPY_RECOVER = "postcopy-recover"
    COMPLETED = "completed"
    FAILING = "failing"
    FAILED = "failed"
    COLO = "colo"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"
    WAIT_UNPLUG = "wait-unplug"


_S = MigrationStatus

_POSTCOPY: Final[Mapping[MigrationStatus, frozenset[MigrationStatus]]] = {
    _S.POSTCOPY_DEVICE: frozenset({_S.POSTCOPY_ACTIVE, _S.POSTCOPY_PAUSED, _S.CANCELLING}),
    _S.POSTCOPY_ACTIVE: frozenset({_S.POSTCOPY_PAUSED, _S.COMPLETED}),
    _S.POSTCOPY_PAUSED: frozenset({_S.POSTCOPY_RECOVER_SETUP}),
    _S.POSTCOPY_RECOVER_SETUP: frozenset({_S.POSTCOPY_RECOVER, _S.POSTCOPY_PAUSED}),
    _S.POSTCOPY_RECOVER: frozenset({_S.POSTCOPY_ACTIVE, _S.POSTCOPY_PAUSED}),
}

SOURCE_STEPS: Final[Mapping[MigrationStatus, frozenset[MigrationStatus]]] = {
    _S.NONE: frozenset({_S.SETUP}),
    _S.SETUP: frozenset({_S.WAIT_UNPLUG, _S.ACTIVE, _S.CANCELLING}),
    _S.WAIT_UNPLUG: frozenset({_S.ACTIVE, _S.CANCELLING}),
    _S.ACTIVE: frozenset({_S.PRE_SWITCHOVER, _S.DEVICE, _S.POSTCOPY_DEVICE, _S.POSTCOPY_ACTIVE, _S.CANCELLING}),
    _S.PRE_SWITCHOVER: frozenset({_S.DEVICE, _S.POSTCOPY_DEVICE, _S.CANCELLING}),
    _S.DEVICE: frozenset({_S.COMPLETED, _S.POSTCOPY_ACTIVE, _S.CANCELLING}),
    _S.CANCELLING: frozenset({_S.CANCELLED}),
    _S.FAILING: frozenset({_S.FAILED}),
    # What is over can begin anew.
    _S.CANCELLED: frozenset({_S.SETUP}),
    _S.FAILED: frozenset({_S.SETUP}),
    _S.COMPLETED: frozenset({_S.SETUP}),
    **_POSTCOPY,
}
"""Where each status may lead on the source, besides `failing`."""

TARGET_STEPS: Final[Mapping[MigrationStatus, frozenset[MigrationStatus]]] = {
    _S.NONE: frozenset({_S.SETUP}),
    _S.SETUP: frozenset({_S.ACTIVE, _S.CANCELLING}),
    _S.ACTIVE: frozenset({_S.COMPLETED, _S.POSTCOPY_ACTIVE, _S.CANCELLING}),
    _S.CANCELLING: frozenset({_S.CANCELLED}),
    _S.FAILING: frozenset({_S.FAILED}),
    _S.CANCELLED: frozenset({_S.SETUP}),
    _S.FAILED: frozenset({_S.SETUP}),
    _S.COMPLETED: frozenset({_S.SETUP}),
    **_POSTCOPY,
}
"""Where each status may lead on the target, besides `failing`."""

IDLE: Final = frozenset({_S.NONE, _S.CANCELLED, _S.FAILED, _S.COMPLETED})
"""Nothing is under way."""

_CANNOT_FAIL: Final = IDLE | {_S.FAILING, _S.CANCELLING}
_BARE: Final = frozenset({_S.SETUP, _S.CANCELLED, _S.FAILED, _S.WAIT_UNPLUG, _S.COLO})
"""States in which `query-migrate` of a source tells neither times nor RAM."""


@final
@attrs.frozen(kw_only=True)
class MigrationRamStats:
    """QEMU's MigrationRAMStats. A live update copies no RAM: all is 0 then but `total` and `page_size`, in bytes."""

    transferred: int = 0
    remaining: int = 0
    total: int = 0
    duplicate: int = 0
    normal: int = 0
    normal_bytes: int = 0
    dirty_pages_rate: int = 0
    mbps: float = 0.0
    dirty_sync_count: int = 0
    postcopy_requests: int = 0
    page_size: int = 4096
    multifd_bytes: int = 0
    pages_per_second: int = 0
    precopy_bytes: int = 0
    downtime_bytes: int = 0
    postcopy_bytes: int = 0
    dirty_sync_missed_zero_copy: int = 0


@final
@attrs.frozen(kw_only=True)
class KeptProcess:
    """The process that the guest came from, ready to take it back."""

    pid: int
    program: str
    """What it calls itself, as in its monitor's greeting."""


@final
@attrs.frozen(kw_only=True)
class MigrationInfo:
    """What `query-migrate` replies; None stands for an absent member. Times are in milliseconds."""

    status: StatusName | None = None
    ram: MigrationRamStats | None = None
    remaining: int | None = None
    total_time: int | None = None
    expected_downtime: int | None = None
    downtime: int | None = None
    setup_time: int | None = None
    cpu_throttle_percentage: int | None = None
    """The share of the time in which the guest is kept from running, so that it writes less."""
    postcopy_blocktime: int | None = None
    """Of a target, with migration capability postcopy-blocktime: how long all vCPUs waited for pages at one time."""
    postcopy_vcpu_blocktime: list[int] | None = None
    """How long each of them did."""
    error_desc: str | None = None
    blocked_reasons: list[str] | None = None
    socket_address: list[SocketAddress] | None = None
    x_pause: dict[str, float] | None = None
    """How long each stage of a live update's pause took, in milliseconds. Not in QEMU."""
    x_step: str | None = None
    """The step that a live update has reached on this side, and after a failure the last one. Not in QEMU."""
    x_pause_before: dict[str, float] | None = None
    """After an update by exec: the same of the first of the two pauses, when the guest went to the caretaker."""
    x_kept: KeptProcess | None = None
    """Who waits to take the guest back (`x-cpr-undo`). Not in QEMU."""

    def to_json(self) -> dict[str, object]:
        """Return the reply with its names on the wire."""
        json = unstructure(self)
        assert isinstance(json, dict)
        return json


class Throttled(Protocol):
    """Something by which a guest is slowed down."""

    @property
    def percent(self) -> int:
        """The share of the time in which it does not run; 0 where it is not slowed down."""


@final
class MigrationProgress:
    """One side's migration, the last or the present one.

    Lives on the trio loop; nothing here blocks.

    Args:
        observer: called with each new status, for the event MIGRATION.
        clock: seconds, as `trio.current_time`.
    """

    def __init__(self, side: Side, observer: Callable[[MigrationStatus], None], clock: Callable[[], float]) -> None:
        self.side: Final = side
        self._ram = MigrationRamStats()
        self._meter: Callable[[], MigrationRamStats] | None = None
        self._meter_goes_on = False
        self.throttle: Throttled | None = None
        """What the guest is slowed down by, if it is."""
        self.expected_downtime = 0
        """Milliseconds; what `query-migrate` tells while the downtime is not known."""
        self.addresses: tuple[SocketAddress, ...] = ()
        """Of a target: where it listens, with the real ports."""
        self.pause_stages: Mapping[str, float] | None = None
        """Stage of a live update's pause -> milliseconds."""
        self.step: str | None = None
        """Of a live update: the step that this side has reached; see `vmm.cpr.steps`."""
        self.pause_before: Mapping[str, float] | None = None
        """The same of the first of two pauses, where there were two."""
        self._steps: Final = SOURCE_STEPS if side == "source" else TARGET_STEPS
        self._observer: Final = observer
        self._clock: Final = clock
        self._status: MigrationStatus = _S.NONE
        self._error: str | None = None
        self._begun = 0.0
        self._setup_done: float | None = None
        self._blocktime: Callable[[], tuple[int, list[int]]] | None = None
        self._paused: float | None = None
        self._downtime: float | None = None
        self._over: float | None = None

    @property
    def status(self) -> MigrationStatus:
        """The present status."""
        return self._status

    @property
    def ram(self) -> MigrationRamStats:
        """What was sent of RAM, or has come."""
        return self._ram if self._meter is None else self._meter()

    @ram.setter
    def ram(self, statistics: MigrationRamStats) -> None:
        self._ram, self._meter, self._meter_goes_on = statistics, None, False

    def follow_ram(self, meter: Callable[[], MigrationRamStats], *, beyond: bool = False) -> None:
        """From now until the end, ask `meter` what was sent of RAM, or has come.

        Args:
            beyond: also after it, until `keep_ram`: pages come after the guest.
        """
        self._meter, self._meter_goes_on = meter, beyond

    def keep_ram(self) -> None:
        """Ask no more: it stays as it is."""
        self.ram = self.ram

    @property
    def under_way(self) -> bool:
        """Whether a migration has begun and is not over."""
        return self._status not in IDLE

    def begin(self, addresses: Iterable[SocketAddress] = ()) -> None:
        """Enter `setup`, forgetting the migration before: its times, error, RAM figures, addresses and stages.

        Args:
            addresses: of a target, where it listens now.
        """
        self._check(_S.SETUP)
        self._error = None
        self._blocktime = None
        self._begun = self._clock()
        self._setup_done = self._paused = self._downtime = self._over = None
        self.ram = MigrationRamStats()
        self.addresses = tuple(addresses)
        self.step = None
        self.throttle = None
        self.pause_stages = self.pause_before = None
        self._enter(_S.SETUP)

    def advance(self, status: MigrationStatus) -> None:
        """Enter `status`. A step that is not in the table is a bug: `RuntimeError`."""
        if status is _S.SETUP:
            raise RuntimeError("a migration enters setup by begin()")
        self._check(status)
        self._enter(status)

    def fail(self, reason: str) -> None:
        """Enter `failing` for `reason`, a sentence for `error-desc`; `failed` follows once all is undone.

        While it is being cancelled a migration does not fail any more, and what is over cannot: then without effect.
        """
        if self._status in _CANNOT_FAIL:
            return
        self._error = reason
        self._enter(_S.FAILING)

    def note_break(self, reason: str) -> None:
        """Note why a postcopy is about to pause; `error-desc`, until it goes on."""
        self._error = reason

    def follow_blocktime(self, meter: Callable[[], tuple[int, list[int]]]) -> None:
        """From now until the end, ask `meter` how long vCPUs wait for pages: all at one time, and each, in ms."""
        self._blocktime = meter

    def keep_blocktime(self) -> None:
        """Ask no more: it stays as it is. Without `follow_blocktime` before: no effect."""
        if self._blocktime is not None:
            last = self._blocktime()
            self._blocktime = lambda: last

    def note_step(self, step: str) -> None:
        """Note the step that this side of a live update has reached."""
        self.step = step

    def pause_begins(self) -> None:
        """Note that the guest stands still from now."""
        self._paused = self._clock()

    def pause_ends(self, ago: float = 0.0) -> None:
        """Note that the guest runs again, here or there. Without `pause_begins` before: no effect.

        Args:
            ago: for how many seconds it has run already, as somebody else says.
        """
        if self._paused is not None:
            stood = self._clock() - self._paused
            self._downtime = stood - ago if 0 <= ago <= stood else stood
            self._paused = None

    def info(self, blocked_reasons: Sequence[str] = ()) -> MigrationInfo:
        """Return what `query-migrate` replies. `blocked_reasons`: what rules out a migration of the present mode."""
        blocked = list(blocked_reasons) or None
        if self._status is _S.NONE:
            return MigrationInfo(blocked_reasons=blocked)
        bare = MigrationInfo(
            status=cast("StatusName", self._status.value),
            error_desc=self._error,
            blocked_reasons=blocked,
            socket_address=list(self.addresses) or None,
            x_pause=dict(self.pause_stages) if self.pause_stages is not None else None,
            x_step=self.step,
            x_pause_before=dict(self.pause_before) if self.pause_before is not None else None,
        )
        if self._blocktime is not None:
            together, each = self._blocktime()
            bare = attrs.evolve(bare, postcopy_blocktime=together, postcopy_vcpu_blocktime=each)
        if self._status in _BARE:
            return bare
        ram = self.ram
        if self.side == "target":
            # In a live update none comes.
            return attrs.evolve(bare, ram=ram) if ram.total else bare
        downtime = None if self._downtime is None else _milliseconds(self._downtime)
        completed = self._status is _S.COMPLETED
        return attrs.evolve(
            bare,
            cpu_throttle_percentage=(self.throttle.percent or None) if self.throttle is not None else None,
            ram=ram,
            remaining=None if completed else ram.remaining,
            total_time=_milliseconds((self._clock() if self._over is None else self._over) - self._begun),
            expected_downtime=self.expected_downtime if downtime is None and not completed else None,
            downtime=0 if downtime is None and completed else downtime,
            setup_time=0 if self._setup_done is None else _milliseconds(self._setup_done - self._begun),
        )

    def _check(self, status: MigrationStatus) -> None:
        allowed: Collection[MigrationStatus] = self._steps.get(self._status, frozenset())
        if status not in allowed:
            raise RuntimeError(f"migration {self.side}: {self._status} does not lead to {status}")

    def _enter(self, status: MigrationStatus) -> None:
        if self._status is _S.SETUP:
            self._setup_done = self._clock()
        if status is _S.POSTCOPY_ACTIVE:
            self._error = None
        if status in IDLE:
            self._over = self._clock()
            if not self._meter_goes_on:
                self.keep_ram()
        self._status = status
        self._observer(status)


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
