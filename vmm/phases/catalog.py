"""The table of commands and of events.

Commands are named with the modules that have them; a module is imported when the first of its commands is used. The
monitor thus greets before anything is imported that only some command needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

import attrs

from vmm.monitor.command import Command
from vmm.monitor.events import Event
from vmm.phases.jobs import JobStatus

if TYPE_CHECKING:
    from vmm.recipe import Step

_MONITOR: Final = "vmm.phases.commands_monitor"
_BACKENDS: Final = "vmm.phases.commands_backends"
_MONITORS: Final = "vmm.phases.commands_monitors"
_MACHINE: Final = "vmm.phases.commands_machine"
_CPUS: Final = "vmm.phases.commands_cpus"
_FACTS: Final = "vmm.phases.commands_facts"
_NUMA: Final = "vmm.phases.commands_numa"
_MIGRATION: Final = "vmm.phases.commands_migration"
_DIRTY_RATE: Final = "vmm.phases.commands_dirty_rate"
_JOBS: Final = "vmm.phases.commands_jobs"
_UPDATE: Final = "vmm.phases.commands_update"
_SNAPSHOTS: Final = "vmm.phases.commands_snapshots"

_DEVICES: Final = "vmm.phases.commands_devices"
_OBJECTS: Final = "vmm.phases.commands_objects"
_NETDEV: Final = "vmm.phases.commands_netdev"

LATE_OBJECTS: Final = frozenset({"rng-builtin", "rng-random"})
"""Types of objects that are back ends of devices: they come after the accelerator."""

LATE_OBJECT: Final = "object-add of a back end of devices"

MEMORY_OBJECTS: Final = frozenset({"memory-backend-file", "memory-backend-memfd"})
"""Types of objects that RAM is made of: they come before the machine, and where one is awaited they are only noted."""

MEMORY_OBJECT: Final = "object-add of memory"

COMMANDS: Final = (
    Command("query-version", f"{_MONITOR}:query_version"),
    Command("query-commands", f"{_MONITOR}:query_commands"),
    Command("query-qmp-schema", f"{_MONITOR}:query_qmp_schema"),
    Command("query-name", f"{_MONITOR}:query_name"),
    Command("query-uuid", f"{_MONITOR}:query_uuid"),
    Command("query-machine-phase", f"{_MONITOR}:query_machine_phase"),
    Command("query-nursery-tree", f"{_MONITOR}:query_nursery_tree"),
    Command("getfd", f"{_MONITOR}:getfd"),
    Command("closefd", f"{_MONITOR}:closefd"),
    Command("add-fd", f"{_MONITOR}:add_fd"),
    Command("remove-fd", f"{_MONITOR}:remove_fd"),
    Command("query-fdsets", f"{_MONITOR}:query_fdsets"),
    Command("quit", f"{_MONITOR}:quit_machine"),
    Command("chardev-add", f"{_BACKENDS}:chardev_add", recorded=True, overrides=True),
    Command("chardev-remove", f"{_BACKENDS}:chardev_remove"),
    Command("query-chardev", f"{_BACKENDS}:query_chardev"),
    Command("object-add", f"{_OBJECTS}:object_add", overrides=True),
    Command("object-del", f"{_OBJECTS}:object_del"),
    Command("netdev_add", f"{_NETDEV}:netdev_add", overrides=True),
    Command("netdev_del", f"{_NETDEV}:netdev_del"),
    Command("device_add", f"{_DEVICES}:device_add", overrides=True),
    Command("device_del", f"{_DEVICES}:device_del"),
    Command("device-list-properties", f"{_DEVICES}:device_list_properties"),
    Command("query-monitors", f"{_MONITORS}:query_monitors"),
    Command("machine-set", f"{_MACHINE}:machine_set", moves_to="accel", overrides=True),
    Command("x-exit-precreate", f"{_MACHINE}:x_exit_precreate", moves_to="accel"),
    Command("accel-set", f"{_MACHINE}:accel_set", moves_to="preconfig", overrides=True),
    Command("set-numa-node", f"{_NUMA}:set_numa_node", recorded=True, overrides=True),
    Command("cpu-model-set", f"{_MACHINE}:cpu_model_set", moves_to="devices", overrides=True),
    Command("x-exit-preconfig", f"{_MACHINE}:x_exit_preconfig", moves_to="devices"),
    Command("finish-machine-init", f"{_MACHINE}:finish_machine_init", moves_to="running"),
    Command("cont", f"{_MACHINE}:cont"),
    Command("stop", f"{_MACHINE}:stop"),
    Command("system_reset", f"{_MACHINE}:system_reset"),
    Command("query-status", f"{_MACHINE}:query_status"),
    Command("query-cpus-fast", f"{_MACHINE}:query_cpus_fast"),
    Command("query-hotpluggable-cpus", f"{_FACTS}:query_hotpluggable_cpus"),
    Command("query-target", f"{_FACTS}:query_target"),
    Command("query-kvm", f"{_FACTS}:query_kvm"),
    Command("query-accelerators", f"{_FACTS}:query_accelerators"),
    Command("query-machines", f"{_FACTS}:query_machines"),
    Command("query-current-machine", f"{_FACTS}:query_current_machine"),
    Command("query-memory-size-summary", f"{_FACTS}:query_memory_size_summary"),
    Command("query-cpu-model-expansion", f"{_CPUS}:query_cpu_model_expansion"),
    Command("query-cpu-definitions", f"{_CPUS}:query_cpu_definitions"),
    Command("migrate-set-capabilities", f"{_MIGRATION}:migrate_set_capabilities"),
    Command("query-migrate-capabilities", f"{_MIGRATION}:query_migrate_capabilities"),
    Command("migrate-set-parameters", f"{_MIGRATION}:migrate_set_parameters"),
    Command("query-migrate-parameters", f"{_MIGRATION}:query_migrate_parameters"),
    Command("query-migrate", f"{_MIGRATION}:query_migrate"),
    Command("calc-dirty-rate", f"{_DIRTY_RATE}:calc_dirty_rate"),
    Command("query-dirty-rate", f"{_DIRTY_RATE}:query_dirty_rate"),
    Command("set-vcpu-dirty-limit", f"{_DIRTY_RATE}:set_vcpu_dirty_limit"),
    Command("cancel-vcpu-dirty-limit", f"{_DIRTY_RATE}:cancel_vcpu_dirty_limit"),
    Command("query-vcpu-dirty-limit", f"{_DIRTY_RATE}:query_vcpu_dirty_limit"),
    Command("migrate", f"{_MIGRATION}:migrate", moves_to="migrating"),
    Command("migrate-incoming", f"{_MIGRATION}:migrate_incoming"),
    Command("loadvm", f"{_MIGRATION}:loadvm"),
    Command("migrate-continue", f"{_MIGRATION}:migrate_continue"),
    Command("migrate_cancel", f"{_MIGRATION}:migrate_cancel"),
    Command("migrate-start-postcopy", f"{_MIGRATION}:migrate_start_postcopy"),
    Command("migrate-pause", f"{_MIGRATION}:migrate_pause", oob=True),
    Command("migrate-recover", f"{_MIGRATION}:migrate_recover", oob=True),
    Command("query-jobs", f"{_JOBS}:query_jobs"),
    Command("job-cancel", f"{_JOBS}:job_cancel"),
    Command("job-dismiss", f"{_JOBS}:job_dismiss"),
    Command("snapshot-save", f"{_SNAPSHOTS}:snapshot_save", moves_to="migrating"),
    Command("snapshot-load", f"{_SNAPSHOTS}:snapshot_load"),
    Command("snapshot-delete", f"{_SNAPSHOTS}:snapshot_delete"),
    Command("x-query-snapshots", f"{_SNAPSHOTS}:x_query_snapshots"),
    Command("x-cpr-check", f"{_UPDATE}:x_cpr_check"),
    Command("x-cpr-abandon", f"{_UPDATE}:x_cpr_abandon"),
    Command("x-cpr-undo", f"{_UPDATE}:x_cpr_undo"),
    Command("x-cpr-forget", f"{_UPDATE}:x_cpr_forget"),
    Command("x-allow-difference", f"{_UPDATE}:x_allow_difference"),
    Command("x-allow-resource", f"{_UPDATE}:x_allow_resource"),
    Command("query-differences", f"{_UPDATE}:query_differences"),
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
class DeviceDeleted:
    """A device has been taken off."""

    device: str | None = None
    path: str


@final
@attrs.frozen(kw_only=True)
class MigrationChanged:
    """A migration has entered a status (with migration capability `events`)."""

    status: str


@final
@attrs.frozen(kw_only=True)
class MigrationPass:
    """A pass over the guest's RAM begins (with migration capability `events`)."""

    number: int = attrs.field(metadata={"wire": "pass"})


@final
@attrs.frozen(kw_only=True)
class JobStatusChange:
    """A job has entered a status."""

    id: str
    status: JobStatus


EVENTS: Final = (
    Event("PHASE_CHANGED", PhaseChanged),
    Event("TOKEN_GRANTED", TokenChange),
    Event("TOKEN_REVOKED", TokenChange),
    Event("STOP"),
    Event("RESUME"),
    Event("RESET", Shutdown),
    Event("SHUTDOWN", Shutdown),
    Event("VCPU_FAILED", VcpuFailed),
    Event("DEVICE_DELETED", DeviceDeleted),
    Event("MIGRATION", MigrationChanged),
    Event("MIGRATION_PASS", MigrationPass),
    Event("JOB_STATUS_CHANGE", JobStatusChange),
)

_ORDER: Final = (
    ("chardev-add", "object-add", "add-fd", "getfd"),
    ("migrate-set-capabilities", "migrate-set-parameters", "x-allow-difference", "x-allow-resource"),
    ("migrate-incoming",),
    (MEMORY_OBJECT,),
    ("machine-set", "x-exit-precreate"),
    ("accel-set",),
    (LATE_OBJECT, "netdev_add"),
    ("set-numa-node",),
    ("cpu-model-set", "x-exit-preconfig"),
    ("device_add",),
    ("finish-machine-init",),
)


def rank(step: Step) -> int:
    """Return the place of a step in a recipe: by the phase that it belongs to. Others come last, as they stand."""
    place = step.execute
    if place == "object-add":
        kind = step.arguments.get("qom-type")
        place = LATE_OBJECT if kind in LATE_OBJECTS else MEMORY_OBJECT if kind in MEMORY_OBJECTS else place
    return next((number for number, places in enumerate(_ORDER) if place in places), len(_ORDER))
