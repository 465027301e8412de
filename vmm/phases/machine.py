"""A machine that is all there, and its power-on state."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, final

import attrs
import trio

from vmm.hw.boot.plan import Data, FileRange, Zeros
from vmm.migration.stream import StreamReader, StreamWriter
from vmm.migration.stream_io import StateStream
from vmm.migration.stream_records import Section

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vmm.facets import GuestRam
    from vmm.hw.codec import DeviceSection
    from vmm.hw.device import Device
    from vmm.kvm.memory import GuestMemory
    from vmm.migration.registry import StateRegistry
    from vmm.phases.accel import Accelerator
    from vmm.phases.assembly import Precreated
    from vmm.phases.cpus import CpuModel
    from vmm.phases.guest_requests import GuestBells
    from vmm.phases.processors import Processors
    from vmm.phases.slots import Slots
    from vmm.phases.vcpus import GuestCpu
    from vmm.qtest.access import MachineAccess


@final
@attrs.frozen(eq=False)
class Machine:
    """All parts of one machine. Published to `may-query`; what changes it takes a token."""

    what: ClassVar[str] = "The machine"
    phase: ClassVar[str] = "devices"

    made: Precreated
    accelerator: Accelerator
    memory: GuestMemory
    cpu: CpuModel
    processors: Processors
    devices: tuple[Device, ...]
    """Those of the board itself."""
    slots: Slots
    """With the devices that are plugged in."""
    access: MachineAccess
    bells: GuestBells
    state: StateRegistry
    sections: tuple[DeviceSection, ...]
    """Of `devices`."""

    @property
    def vcpus(self) -> tuple[GuestCpu, ...]:
        """The vCPUs, by number."""
        return self.processors.vcpus

    def prepare_to_move(self) -> None:
        """Do now what would else be done at the first save or load, inside the guest's pause: make the codecs."""
        self.made.host.stores.declare_again(self.state)
        for section in (*self.sections, *self.slots.sections):
            section.prepare()
        self.made.host.stores.prepare_to_move()

    async def rehearse_load(self) -> None:
        """Save, send, check and load this machine's own state once, so that nothing is done for the first time later.

        For a machine that has not run: everything is as it was afterwards. In steps, so that the monitor answers
        meanwhile: what is done for the first time takes long.
        """
        for prepared in self.sections:
            prepared.prepare()
            await trio.lowlevel.checkpoint()
        self.made.host.stores.prepare_to_move()
        for _ in self._rehearsal():
            await trio.lowlevel.checkpoint()

    def rehearse_again(self) -> None:
        """Do as `rehearse_load`, at once, when it has been done: all that a load takes is in the CPU's caches then."""
        for _ in self._rehearsal():
            pass

    def _rehearsal(self) -> Iterator[None]:
        writer = StreamWriter("rehearsal")
        for section in self.state.save(optional=False):
            writer.section(section.name, section.version, section.state)
        yield
        reader = StreamReader()
        stream = StateStream.of(reader.feed(b"".join(writer.finish())))
        yield
        checked = self.state.check(stream.sections)
        yield
        checked.apply()

    def save_ahead(self) -> list[Section]:
        """Return the sections of the board's devices and its ports' chardevs, most of which will be the same later.

        One whose device does something meanwhile may be neither as it was before nor as it is after that.
        """
        board = [Section(section.name, section.version, section.save()) for section in self.sections]
        return [*board, *(Section(*port) for port in self.made.host.stores.save_ports())]

    def rehearse_save(self) -> None:
        """Encode some state: all that it takes is in the CPU's caches then. The guest may run."""
        writer = StreamWriter("rehearsal")
        for section in self.sections:
            writer.section(section.name, section.version, section.save())
        for name, state in self.processors.reset_state().items():
            writer.section(name, 0, state)
        writer.finish()

    def power_on(self, ram: GuestRam) -> None:
        """Write what starts out in the guest's RAM, and put the boot processor where it begins.

        Raises:
            BootError: an image has changed since it was looked at.
        """
        plan = self.made.definition.plan
        if plan is None:
            return
        for write in plan.writes:
            match write:
                case Data():
                    ram.write(write.address, bytes(write.data))
                case FileRange():
                    ram.fill(write.address, write.fd, write.offset, write.size)
                case Zeros():
                    ram.write(write.address, bytes(write.size))
        self.processors.begin_at(plan.start)

    def power_on_again(self) -> None:
        """Put everything into its power-on state. No vCPU may be in the guest."""
        self.processors.power_on_again()
        for device in (*self.devices, *self.slots.devices):
            device.reset()
        self.power_on(self.memory)

    async def quiesce(self) -> None:
        """Come to rest: afterwards nothing here touches the guest's memory, or a chardev. No vCPU is in the guest."""
        self.slots.hold()
        await self.made.host.stores.quiesce()
        self.accelerator.vm.hold_irqfds()

    def resume(self) -> None:
        """Go on, here, with what came meanwhile: this process owns the guest, and what its descriptors stand for."""
        self.accelerator.vm.release_irqfds()
        self.made.host.stores.resume()
        self.slots.go_on()

    async def rest(self) -> None:
        """Bring the devices and their chardevs to rest; monitors go on, as the process does not change."""
        self.slots.hold()
        await self.made.host.stores.quiesce_chardevs()
        self.accelerator.vm.hold_irqfds()

    def wake(self) -> None:
        """Undo `rest`, with what came meanwhile."""
        self.accelerator.vm.release_irqfds()
        self.made.host.stores.resume_chardevs()
        self.slots.go_on()

    def descriptors(self, *, sessions: bool = False) -> Mapping[str, int]:
        """Return what a successor needs before the pause, by resource name; with `sessions`, clients' sockets too."""
        own = {"ram": self.memory.fd} if self.made.definition.ram is None else {}
        return {
            **own,
            **self.made.definition.descriptors(),
            **self.made.host.stores.standing_descriptors(sessions=sessions),
        }
