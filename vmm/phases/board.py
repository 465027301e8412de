"""The board of machine type `microvm`: vCPUs, legacy devices, and what of them travels."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any, Final, final

import attrs

from vmm.errors import StateRejected
from vmm.hw import board
from vmm.hw.acpi_pm import AcpiPm
from vmm.hw.bus import Bus
from vmm.hw.codec import Codecs, DeviceSection
from vmm.hw.debug_exit import DebugExit
from vmm.hw.i8042 import I8042
from vmm.hw.irq import GsiLine
from vmm.hw.legacy import PostCode, SystemControlA
from vmm.hw.rtc import Rtc
from vmm.hw.uart import Uart
from vmm.kvm.cpuid import guest_cpuid
from vmm.kvm.machine_state import check_machine, load_machine, save_machine
from vmm.kvm.state import ChipState, VcpuState
from vmm.kvm.system import MTRR_DEFAULT_TYPE
from vmm.kvm.vcpu import Vcpu
from vmm.migration.registry import StateRegistry
from vmm.phases.guest_requests import GuestBells
from vmm.phases.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import ExitStack

    from vmm.capabilities import MayDeclareState, MayMapGuestMemory, MayPlugDevice
    from vmm.hw.device import Device
    from vmm.kvm.memory import GuestMemory
    from vmm.phases.accel import Accelerator
    from vmm.phases.assembly import Precreated


MTRRS_ENABLED: Final = 1 << 11
WRITE_BACK: Final = 6
"""IA32_MTRR_DEF_TYPE: ranges count, and what is in none is write-back. Source: Intel SDM volume 3, 12.11.2.1."""


@final
class BoardBuilder:
    """Builds the board. The facet of `may-plug-device` and `may-map-guest-memory` while it does."""

    def __init__(self, made: Precreated, accelerator: Accelerator, memory: GuestMemory, stack: ExitStack) -> None:
        self._made = made
        self._accelerator = accelerator
        self._memory = memory
        self._stack = stack
        self._ports = Bus()
        self._mmio = Bus()
        self._devices: list[Device] = []
        self.state = StateRegistry()

    def map(self) -> None:
        """Give every RAM region its KVM memory slot."""
        for slot, region in enumerate(self._memory.regions):
            self._accelerator.vm.set_memory_slot(slot, region.address, self._memory.hva(region.offset), region.size)

    def plug(self, device: Any) -> None:
        """Put `device` on the port bus."""
        self._ports.plug(device)
        self._devices.append(device)

    def build(self, may_map: MayMapGuestMemory, may_plug: MayPlugDevice, may_declare: MayDeclareState) -> Machine:
        """Build it all. What is built is closed by the stack that the builder was given."""
        made, vm = self._made, self._accelerator.vm
        may_map.map()
        vcpus = self._make_vcpus()
        bells = self._stack.enter_context(closing(GuestBells()))
        codecs = Codecs()
        sections: list[DeviceSection] = []
        for device in self._make_devices(bells):
            may_plug.plug(device)
            section = DeviceSection(device, codecs)
            sections.append(section)
            schema = device.state.SCHEMA
            may_declare.register(
                device.name,
                schema.version,
                save=section.save,
                load=section.load,
                accepts=schema.accepts,
                after=("kvm",),
            )
        fds = [vcpu.fd for vcpu in vcpus]
        machine = Machine(
            made,
            self._accelerator,
            self._memory,
            tuple(vcpus),
            tuple(self._devices),
            bells,
            self.state,
            tuple(sections),
            save_machine(vm, fds),
        )
        kernel = KernelState(machine)
        may_declare.register("kvm", KernelState.VERSION, save=kernel.save, load=kernel.load)
        arrival = made.incoming.arrival
        for name, owner in made.host.stores.sections(None if arrival is None else arrival.recipe):
            may_declare.register(name, owner.version, save=owner.save, load=owner.load)
        return machine

    def _make_vcpus(self) -> list[Vcpu]:
        kvm, vm = self._accelerator.kvm, self._accelerator.vm
        count = self._made.definition.options.smp.cpus
        supported = kvm.supported_cpuid()
        deadline = bool(kvm.extension("KVM_CAP_TSC_DEADLINE_TIMER"))
        vcpus: list[Vcpu] = []
        for index in range(count):
            fd = self._stack.enter_context(closing(vm.create_vcpu(index)))
            fd.set_cpuid(guest_cpuid(supported, index, count, deadline))
            # As firmware leaves it. Without it memory counts as uncached, and older kernels give up on PAT.
            fd.set_msr(MTRR_DEFAULT_TYPE, MTRRS_ENABLED | WRITE_BACK)
            vcpus.append(Vcpu(index, fd, self._ports, self._mmio))
        return vcpus

    def _make_devices(self, bells: GuestBells) -> list[Device]:
        vm = self._accelerator.vm
        stores = self._made.host.stores

        def line(gsi: int) -> GsiLine:
            return GsiLine(gsi, vm.set_irq)

        devices: list[Device] = []
        for number, label in enumerate(self._made.definition.options.serial):
            ports, gsi = board.COM[number]
            chardev = stores.chardevs[label].chardev  # This machine's since `machine-set`.
            uart = Uart(
                name=f"uart{number}", addresses=(ports,), irq=line(gsi), sink=chardev, on_room=chardev.accept_input
            )
            chardev.attach(uart)
            self._stack.callback(chardev.detach)
            devices.append(uart)
        devices.append(I8042(irq=line(board.I8042_GSI), request_reset=bells.request_reset))
        devices.append(Rtc())
        devices.append(AcpiPm(request_power_off=bells.request_power_off))
        devices.append(PostCode())
        devices.append(SystemControlA(request_reset=bells.request_reset))
        devices.append(DebugExit(request_exit=bells.request_exit))
        return devices


@final
class KernelState:
    """The section of what KVM keeps: vCPUs and chips, as the kernel's structures in bytes."""

    VERSION = 1

    def __init__(self, machine: Machine) -> None:
        self._vm = machine.accelerator.vm
        self._vcpus = [vcpu.fd for vcpu in machine.vcpus]

    def save(self) -> Mapping[str, Any]:
        """Read it all. Every vCPU is out."""
        vcpus, chips = save_machine(self._vm, self._vcpus)
        return {"vcpus": [_fields(vcpu) for vcpu in vcpus], "chips": _fields(chips)}

    def load(self, _version: int, state: Mapping[str, Any]) -> Callable[[], None]:
        """Check it all, and return what loads it."""
        vcpus = state.get("vcpus")
        if set(state) != {"vcpus", "chips"} or not isinstance(vcpus, list):
            raise StateRejected(section="kvm", faults=("it must have members vcpus (a list) and chips, and no other",))
        states = [_structure(VcpuState, vcpu, f"vcpus[{index}]") for index, vcpu in enumerate(vcpus)]
        chips = _structure(ChipState, state["chips"], "chips")
        check_machine(self._vm, self._vcpus, states, chips)
        return lambda: load_machine(self._vm, self._vcpus, states, chips)


def _fields(state: VcpuState | ChipState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in attrs.fields(type(state))}


def _structure(kind: type[Any], value: object, path: str) -> Any:
    names = [field.name for field in attrs.fields(kind)]
    if not isinstance(value, dict) or set(value) != set(names):
        raise StateRejected(section="kvm", faults=(f"{path} must have exactly the members {', '.join(names)}",))
    wrong = [f"{path}.{name} must be bytes" for name in names if not isinstance(value[name], bytes)]
    if wrong:
        raise StateRejected(section="kvm", faults=tuple(wrong))
    return kind(**value)
