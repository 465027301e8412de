"""The board of machine type `microvm`: vCPUs, legacy devices, and what of them travels."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Final, final

from vmm.hw import board
from vmm.hw.acpi_pm import AcpiPm, AcpiPmState
from vmm.hw.bus import Bus
from vmm.hw.codec import Codecs, DeviceSection
from vmm.hw.debug_exit import DebugExit, DebugExitState
from vmm.hw.i8042 import I8042, I8042State
from vmm.hw.irq import GsiLine
from vmm.hw.legacy import PostCode, PostCodeState, SystemControlA, SystemControlState
from vmm.hw.rtc import Rtc, RtcState
from vmm.hw.uart import Uart, UartState
from vmm.migration.registry import StateRegistry
from vmm.phases.guest_requests import GuestBells
from vmm.phases.machine import Machine
from vmm.phases.slots import Slots, Wiring
from vmm.qtest.access import MachineAccess

if TYPE_CHECKING:
    from contextlib import ExitStack

    from vmm.capabilities import MayDeclareState, MayMapGuestMemory, MayPlugDevice
    from vmm.hw.device import Device
    from vmm.kvm.memory import GuestMemory
    from vmm.phases.accel import Accelerator
    from vmm.phases.assembly import Precreated
    from vmm.phases.cpus import CpuModel
    from vmm.phases.slot_plan import SlotPlan
    from vmm.residents import Residents


SECOND: Final = 1_000_000_000  # ns

STATES: Final = (
    AcpiPmState, DebugExitState, I8042State, PostCodeState, RtcState, SystemControlState, UartState,
)  # fmt: skip
"""Classes of the state of a board's own devices."""


@final
class BoardBuilder:
    """Builds the board, with its slots as yet empty. The facet of `may-map-guest-memory`."""

    def __init__(
        self,
        made: Precreated,
        accelerator: Accelerator,
        memory: GuestMemory,
        cpu: CpuModel,
        plan: SlotPlan,
        residents: Residents,
        stack: ExitStack,
    ) -> None:
        self._made = made
        self._accelerator = accelerator
        self._memory = memory
        self._cpu = cpu
        self._stack = stack
        self._ports = Bus()
        self._mmio = Bus()
        self._codecs = made.incoming.codecs or Codecs()
        self.state = StateRegistry()
        wiring = Wiring(
            made.host, accelerator, memory, self._ports, self._mmio, self.state, self._codecs, residents,
        )  # fmt: skip
        self.slots = Slots(plan, wiring, held=made.incoming.arrival is not None)
        self.access = MachineAccess(self._ports, self._mmio, memory, accelerator, self.slots.all_devices)

    def map(self) -> None:
        """Give every RAM region its KVM memory slot."""
        for slot, region in enumerate(self._memory.regions):
            self._accelerator.vm.set_memory_slot(slot, region.address, self._memory.hva(region.offset), region.size)

    def build(self, may_map: MayMapGuestMemory, may_plug: MayPlugDevice, may_declare: MayDeclareState) -> Machine:
        """Build it all. What is built is closed by the stack that the builder was given."""
        made = self._made
        may_map.map()
        leaves = [self._cpu.leaves(index) for index in range(made.definition.options.smp.cpus)]
        processors = self._accelerator.make_processors(leaves, self._ports, self._mmio, self._stack)
        bells = self._stack.enter_context(closing(GuestBells()))
        self.slots.after = processors.sections
        sections: list[DeviceSection] = []
        devices = self._make_devices(bells)
        for device in devices:
            may_plug.fix(device)
            section = DeviceSection(device, self._codecs)
            sections.append(section)
            schema = device.state.SCHEMA
            may_declare.register(
                device.name,
                schema.version,
                save=section.save,
                load=section.load,
                accepts=schema.accepts,
                after=processors.sections,
            )
        machine = Machine(
            made,
            self._accelerator,
            self._memory,
            self._cpu,
            processors,
            tuple(devices),
            self.slots,
            self.access,
            bells,
            self.state,
            tuple(sections),
        )
        processors.declare(may_declare)
        arrival = made.incoming.arrival
        made.host.stores.declare(may_declare.register, None if arrival is None else arrival.source)
        return machine

    def _make_devices(self, bells: GuestBells) -> list[Device]:
        accelerator = self._accelerator
        stores = self._made.host.stores

        def line(gsi: int) -> GsiLine:
            return GsiLine(gsi, accelerator.lines.set)

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
        offset = self._made.definition.options.firmware.rtc.offset(accelerator.time_ns() // SECOND)
        devices.append(Rtc(now_ns=accelerator.time_ns, state=RtcState(offset=offset)))
        devices.append(AcpiPm(request_power_off=bells.request_power_off))
        devices.append(PostCode())
        devices.append(SystemControlA(request_reset=bells.request_reset))
        devices.append(DebugExit(request_exit=bells.request_exit))
        return devices
