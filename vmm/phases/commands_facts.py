"""Commands that tell what kinds of machines there are, and the plain facts of this one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, Literal, final

import attrs

from vmm.capabilities import MayQuery
from vmm.errors import DeviceNotActive
from vmm.phases.commands_machine import CpuInstanceProperties
from vmm.phases.config import ACCELERATORS, MAX_CPUS
from vmm.phases.recorder import Recorder

if TYPE_CHECKING:
    from vmm.phases.assembly import Definition

_KVM: Final = "/dev/kvm"

AcceleratorName = Literal["kvm", "qtest"]


def kvm_is_present() -> bool:
    """Say whether this process may open KVM."""
    return os.access(_KVM, os.R_OK | os.W_OK)


def _accelerator(may: MayQuery) -> AcceleratorName | None:
    """Return what `accel-set` has chosen; None if that is still to come."""
    for step in may.view(Recorder).recipe():
        if step.execute == "accel-set":
            return next(name for name in ACCELERATORS if name == step.arguments["accel"])
    return None


def _definition(may: MayQuery) -> Definition:
    from vmm.phases.assembly import Definition  # Brings the boot loaders.

    return may.view(Definition)


@final
@attrs.frozen(kw_only=True)
class QemuTargetInfo:
    """QEMU's QemuTargetInfo."""

    arch: Literal["x86_64"] = "x86_64"


def query_target(may: MayQuery) -> QemuTargetInfo:
    """Tell the architecture of guests."""
    return QemuTargetInfo()


@final
@attrs.frozen(kw_only=True)
class KvmInfo:
    """QEMU's KvmInfo."""

    enabled: bool
    """Whether the machine is built on it."""
    present: bool
    """Whether this process may open it."""


def query_kvm(may: MayQuery) -> KvmInfo:
    """Tell whether KVM can be used, and whether it is."""
    return KvmInfo(enabled=_accelerator(may) == "kvm", present=kvm_is_present())


@final
@attrs.frozen(kw_only=True)
class AcceleratorInfo:
    """QEMU's AcceleratorInfo."""

    enabled: AcceleratorName
    present: list[AcceleratorName]


def query_accelerators(may: MayQuery) -> AcceleratorInfo:
    """Tell which accelerator the machine is built on, and which it could have been."""
    enabled = _accelerator(may)
    if enabled is None:
        raise DeviceNotActive(what="The accelerator", phase="backends")
    return AcceleratorInfo(enabled=enabled, present=[n for n in ACCELERATORS if n != "kvm" or kvm_is_present()])


@final
@attrs.frozen(kw_only=True)
class QueryMachines:
    """Arguments of `query-machines`."""

    compat_props: bool = attrs.field(default=False, metadata={"features": ("unstable",)})
    """Whether to list what a type changes for the sake of older guests, which is nothing."""


@final
@attrs.frozen(kw_only=True)
class CompatProperty:
    """QEMU's CompatProperty."""

    qom_type: str
    property: str
    value: str


@final
@attrs.frozen(kw_only=True)
class MachineInfo:
    """QEMU's MachineInfo."""

    name: str
    is_default: bool
    cpu_max: int
    hotpluggable_cpus: bool
    numa_mem_supported: bool
    deprecated: bool
    default_cpu_type: str
    acpi: bool
    compat_props: list[CompatProperty] | None = attrs.field(default=None, metadata={"features": ("unstable",)})


def query_machines(may: MayQuery, args: QueryMachines) -> list[MachineInfo]:
    """List the machine types, which is one."""
    microvm = MachineInfo(
        name="microvm",
        is_default=True,
        cpu_max=MAX_CPUS,
        hotpluggable_cpus=False,
        numa_mem_supported=True,
        deprecated=False,
        default_cpu_type="host-x86_64-cpu",
        acpi=True,
        compat_props=[] if args.compat_props else None,
    )
    return [microvm]


@final
@attrs.frozen(kw_only=True)
class CurrentMachineParams:
    """QEMU's CurrentMachineParams."""

    wakeup_suspend_support: bool = False


def query_current_machine(may: MayQuery) -> CurrentMachineParams:
    """Tell that guests cannot be suspended and woken up."""
    _definition(may)
    return CurrentMachineParams()


@final
@attrs.frozen(kw_only=True)
class MemoryInfo:
    """QEMU's MemoryInfo, in bytes."""

    base_memory: int
    plugged_memory: int = 0


def query_memory_size_summary(may: MayQuery) -> MemoryInfo:
    """Tell how much RAM the machine has."""
    return MemoryInfo(base_memory=_definition(may).options.memory.size)


@final
@attrs.frozen(kw_only=True)
class HotpluggableCpu:
    """QEMU's HotpluggableCPU."""

    type: str
    vcpus_count: int
    props: CpuInstanceProperties
    qom_path: str


def query_hotpluggable_cpus(may: MayQuery) -> list[HotpluggableCpu]:
    """List the places for vCPUs, all of which are taken from the beginning; the last one comes first, as in QEMU."""
    definition = _definition(may)
    node_of = definition.numa.node_of
    return [
        HotpluggableCpu(
            type="host-x86_64-cpu",
            vcpus_count=1,
            props=CpuInstanceProperties(socket_id=0, core_id=index, thread_id=0, node_id=node_of(index)),
            qom_path=f"/machine/unattached/device[{index}]",
        )
        for index in reversed(range(definition.options.smp.cpus))
    ]
