"""The table of commands and of events."""

from __future__ import annotations

from typing import Final, final

import attrs

from vmm.monitor.command import Command
from vmm.monitor.events import Event
from vmm.phases import commands_backends, commands_machine, commands_migration, commands_monitor

COMMANDS: Final[tuple[Command, ...]] = (
    *commands_monitor.COMMANDS,
    *commands_backends.COMMANDS,
    *commands_machine.COMMANDS,
    *commands_migration.COMMANDS,
)


@final
@attrs.frozen(kw_only=True)
class PhaseChanged:
    """A phase was opened or left."""

    path: str
    phase: str
    machine_phase: str
    opened: bool


@final
@attrs.frozen(kw_only=True)
class TokenChange:
    """A window that grants a token has opened or closed."""

    token: str
    path: str
    phase: str
    scope: list[str] | None = None


@final
@attrs.frozen(kw_only=True)
class Shutdown:
    """The process ends, for QAPI ShutdownCause `reason`."""

    guest: bool
    reason: str


@final
@attrs.frozen(kw_only=True)
class VcpuFailed:
    """A vCPU cannot go on; the machine has been paused. Only a reset leads out."""

    cpu_index: int
    reason: str
    detail: str
    registers: dict[str, object]


@final
@attrs.frozen(kw_only=True)
class MigrationChanged:
    """A migration has entered a status (with migration capability `events`)."""

    status: str


EVENTS: Final = (
    Event("PHASE_CHANGED", PhaseChanged),
    Event("TOKEN_GRANTED", TokenChange),
    Event("TOKEN_REVOKED", TokenChange),
    Event("STOP"),
    Event("RESUME"),
    Event("RESET", Shutdown),
    Event("SHUTDOWN", Shutdown),
    Event("VCPU_FAILED", VcpuFailed),
    Event("MIGRATION", MigrationChanged),
)

_ORDER: Final = (
    ("chardev-add", "object-add", "add-fd", "getfd"),
    ("migrate-set-capabilities", "migrate-set-parameters"),
    ("migrate-incoming",),
    ("machine-set", "x-exit-precreate"),
    ("accel-set",),
    ("cpu-model-set", "x-exit-preconfig"),
    ("finish-machine-init",),
)


def rank(command: str) -> int:
    """Return the place of a command in a recipe: by the phase that it belongs to. Others come last, as they stand."""
    return next((number for number, commands in enumerate(_ORDER) if command in commands), len(_ORDER))
