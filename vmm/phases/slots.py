"""The board's virtio slots, with the devices that are plugged in: built in phases devices and running.

A device is a resident task of phase devices, whoever plugged it in: it ends after the vCPUs, and before its back end.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, final

import attrs
import trio

from vmm.hw import board
from vmm.hw.codec import DeviceSection
from vmm.hw.doorbell import open_doorbell
from vmm.hw.irq import GsiLine
from vmm.hw.virtio.mmio import QUEUE_NOTIFY, EmptySlot, VirtioMmio
from vmm.hw.virtio.rng import REQUESTS, Quota, RngWorker, VirtioRng

if TYPE_CHECKING:
    from collections.abc import Generator

    from vmm.hw.bus import Bus
    from vmm.hw.codec import Codecs
    from vmm.hw.device import Device
    from vmm.hw.doorbell import Doorbell
    from vmm.kvm.memory import GuestMemory
    from vmm.migration.registry import StateRegistry
    from vmm.phases.accel import Accelerator
    from vmm.phases.foundation import Host
    from vmm.phases.slot_plan import Planned, Request, SlotPlan
    from vmm.residents import Resident, Residents


@final
@attrs.frozen(eq=False)
class Wiring:
    """What devices are connected to."""

    host: Host
    accelerator: Accelerator
    memory: GuestMemory
    ports: Bus
    mmio: Bus
    state: StateRegistry
    codecs: Codecs
    residents: Residents
    """Of phase devices."""


@final
@attrs.define(eq=False)
class _Plugged:
    """A device in its slot."""

    device: VirtioMmio
    worker: RngWorker
    section: DeviceSection
    resident: Resident


@final
class Slots:
    """The buses of a board. The facet of `may-plug-device`."""

    def __init__(self, plan: SlotPlan, wiring: Wiring, *, held: bool) -> None:
        """With `held` the guest is another process's yet: no device touches its memory before `go_on`."""
        self._plan: Final = plan
        self._wiring: Final = wiring
        self._held = held
        self._plugged: Final[dict[int, _Plugged]] = {}
        self.all_devices: Final[list[Device]] = []
        """Those of the board too. It changes as devices come and go."""
        self.after: tuple[str, ...] = ()
        """Names of the sections of state that a device's is loaded after."""
        for slot in range(board.VIRTIO_SLOTS):
            wiring.mmio.plug(_empty(slot))

    # The facet.

    def fix(self, device: Any) -> None:
        """Put `device`, which is part of the board, on the port bus."""
        self._wiring.ports.plug(device)
        self.all_devices.append(device)

    async def plug(self, request: Request) -> Planned:
        """Plug in what `request` asks for; see `SlotPlan.reserve` for what it raises. Nothing is left of a failure."""
        planned = self._plan.reserve(request)
        try:
            await self._build(planned)
        except BaseException:
            self._plan.release(planned)
            raise
        return planned

    async def unplug(self, name: str) -> None:
        """Take device `name` off, whatever the guest does with it. Raises `DeviceNotFound`."""
        planned = self._plan.find(name)
        plugged = self._plugged.pop(planned.slot)
        self.all_devices.remove(plugged.device)
        self._wiring.mmio.exchange(_empty(planned.slot))
        plugged.device.reset()  # So its line is low.
        await plugged.resident.leave()
        self._wiring.state.unregister(plugged.device.name)
        self._plan.release(planned)

    # The machine's side.

    async def build_planned(self) -> None:
        """Plug in what was planned before there was a board."""
        for planned in self._plan.devices:
            await self._build(planned)

    @property
    def devices(self) -> tuple[VirtioMmio, ...]:
        """All devices."""
        return tuple(plugged.device for plugged in self._plugged.values())

    @property
    def sections(self) -> tuple[DeviceSection, ...]:
        """Their sections of state."""
        return tuple(plugged.section for plugged in self._plugged.values())

    def hold(self) -> None:
        """Let every queue be at rest: from now on no device touches the guest's memory."""
        self._held = True
        for plugged in self._plugged.values():
            plugged.worker.hold()

    def go_on(self) -> None:
        """Let the devices work, with what the guest asked for meanwhile too: its memory is this process's to write."""
        self._held = False
        for plugged in self._plugged.values():
            plugged.worker.go_on()

    # Building.

    async def _build(self, planned: Planned) -> None:
        wiring = self._wiring
        built: list[tuple[VirtioMmio, RngWorker]] = []
        resident = await wiring.residents.start(f"device {planned.id}", self._serve, planned, built)
        ((device, worker),) = built
        section = DeviceSection(device, wiring.codecs)
        wiring.state.register(
            section.name, section.version, save=section.save, load=section.load, accepts=section.accepts,
            after=self.after,
        )  # fmt: skip
        self._plugged[planned.slot] = _Plugged(device, worker, section, resident)
        self.all_devices.append(device)
        wiring.mmio.exchange(device)

    async def _serve(
        self,
        planned: Planned,
        built: list[tuple[VirtioMmio, RngWorker]],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Make the device and its worker, add them to `built`, and work the queue off until cancelled."""
        addresses, host = board.virtio_addresses(planned.slot), self._wiring.host
        with open_doorbell() as bell, self._kicked_by_guest(bell, addresses):
            device = VirtioMmio(
                name=planned.bus,
                addresses=(addresses,),
                irq=GsiLine(board.VIRTIO_GSI + planned.slot, self._wiring.accelerator.lines.set),
                ram=self._wiring.memory,
                function=VirtioRng(),
                kick=bell.ring,
                held=self._held,
            )
            quota = Quota(planned.properties.max_bytes, planned.properties.period / 1000)

            def complain(text: str) -> None:
                host.complain(f"device {planned.id}: {text}")

            worker = RngWorker(device, bell, planned.source, quota, complain)
            built.append((device, worker))
            task_status.started()
            await worker.serve()

    @contextmanager
    def _kicked_by_guest(self, bell: Doorbell, addresses: range) -> Generator[None, None, None]:
        """Have the kernel ring `bell` when the guest notifies the queue, without an exit to this process."""
        vm, address = self._wiring.accelerator.vm, addresses.start + QUEUE_NOTIFY
        vm.assign_ioeventfd(bell.fd, address, 4, value=REQUESTS)
        try:
            yield
        finally:
            vm.deassign_ioeventfd(bell.fd, address, 4, value=REQUESTS)


def _empty(slot: int) -> EmptySlot:
    return EmptySlot(board.virtio_bus(slot), (board.virtio_addresses(slot),))
