"""A machine's vCPUs, with what the accelerator keeps beside them: by KVM, or where nothing is executed."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol, final

import attrs

from vmm.errors import StateRejected
from vmm.hw.boot.start import set_start
from vmm.kvm.machine_state import check_machine, load_machine, save_machine
from vmm.kvm.state import ChipState, VcpuState
from vmm.kvm.system import MTRR_DEFAULT_TYPE
from vmm.kvm.vcpu import Vcpu

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import ExitStack

    from vmm.capabilities import MayDeclareState
    from vmm.hw.boot.plan import CpuStart
    from vmm.kvm.cpuid import CpuidEntry
    from vmm.kvm.vcpu import IoSpace
    from vmm.kvm.vcpu_fd import VcpuFd
    from vmm.kvm.vm import Vm
    from vmm.phases.vcpus import GuestCpu

MTRRS_ENABLED: Final = 1 << 11
WRITE_BACK: Final = 6
"""IA32_MTRR_DEF_TYPE: ranges count, and what is in none is write-back. Source: Intel SDM volume 3, 12.11.2.1."""


class Processors(Protocol):
    """All vCPUs of a machine, and the chips and clocks that the accelerator models. No vCPU may be in the guest."""

    @property
    def vcpus(self) -> tuple[GuestCpu, ...]:
        """The vCPUs, by number."""

    @property
    def sections(self) -> tuple[str, ...]:
        """Names of the sections of state that `declare` declares; those of devices are loaded after them."""

    @property
    def apart_from_ram(self) -> bool:
        """Whether a load of these looks at nothing of the guest's RAM, and so may come before that."""

    def declare(self, may: MayDeclareState) -> None:
        """Declare what of it travels."""

    def answer(self, leaves: Sequence[tuple[CpuidEntry, ...]]) -> None:
        """Change what each vCPU answers to CPUID. None has run yet."""

    def begin_at(self, start: CpuStart) -> None:
        """Put the boot processor, which is in its power-on state, where a plan says that it starts."""

    def power_on_again(self) -> None:
        """Put everything into its power-on state."""

    def reset_state(self) -> Mapping[str, Mapping[str, Any]]:
        """Return what `declare` has declared, as it was at power-on, by section. vCPUs may be in the guest."""

    def note_pause(self) -> None:
        """Tell the guest's watchdogs that it stood."""

    def let_time_stand(self, stood_still: bool) -> None:
        """Say whether the clocks of a state that is loaded go on where they stood, as if no time had passed since."""


@final
class KvmProcessors:
    """Processors as KVM models them: vCPUs, interrupt controllers, timer, clocks."""

    sections: ClassVar[tuple[str, ...]] = ("kvm",)

    def __init__(self, vm: Vm, vcpus: Sequence[Vcpu]) -> None:
        self._vm: Final = vm
        self.vcpus: Final = tuple(vcpus)
        self._fds: Final = [vcpu.fd for vcpu in vcpus]
        self._reset_state: Final = save_machine(vm, self._fds)
        """What KVM had made of vCPUs and chips before anything ran."""
        self._kernel: Final = KernelState(vm, self._fds)
        # Without it KVM reads the page directory pointers of a guest with PAE out of its RAM.
        self.apart_from_ram: Final = bool(vm.extension("KVM_CAP_SREGS2"))

    @classmethod
    def make(
        cls,
        vm: Vm,
        leaves: Sequence[tuple[CpuidEntry, ...]],
        ports: IoSpace,
        mmio: IoSpace,
        stack: ExitStack,
    ) -> KvmProcessors:
        """Make a vCPU for each of `leaves`, its answers to CPUID; `stack` closes them."""
        vcpus: list[Vcpu] = []
        for index, answers in enumerate(leaves):
            fd = stack.enter_context(closing(vm.create_vcpu(index)))
            fd.set_cpuid(answers)
            # As firmware leaves it. Without it memory counts as uncached, and older kernels give up on PAT.
            fd.set_msr(MTRR_DEFAULT_TYPE, MTRRS_ENABLED | WRITE_BACK)
            vcpus.append(Vcpu(index, fd, ports, mmio))
        return cls(vm, vcpus)

    def declare(self, may: MayDeclareState) -> None:
        """Declare section `kvm`."""
        kernel = self._kernel
        may.register("kvm", KernelState.VERSION, save=kernel.save, load=kernel.load)

    def answer(self, leaves: Sequence[tuple[CpuidEntry, ...]]) -> None:
        """Tell KVM."""
        for fd, answers in zip(self._fds, leaves, strict=True):
            fd.set_cpuid(answers)

    def begin_at(self, start: CpuStart) -> None:
        """Set the boot processor's registers."""
        set_start(self._fds[0], start)

    def power_on_again(self) -> None:
        """Load what KVM had made of it all."""
        vcpus, chips = self._reset_state
        load_machine(self._vm, self._fds, vcpus, chips)

    def reset_state(self) -> Mapping[str, Mapping[str, Any]]:
        """Return section `kvm`."""
        return {"kvm": _section(*self._reset_state)}

    def note_pause(self) -> None:
        """Have each vCPU's next entry say that it was paused."""
        for fd in self._fds:
            fd.note_pause()

    def let_time_stand(self, stood_still: bool) -> None:
        """Choose the time of the next load."""
        self._kernel.stood_still = stood_still


@final
class KernelState:
    """The section of what KVM keeps: vCPUs and chips, as the kernel's structures in bytes."""

    VERSION = 1

    def __init__(self, vm: Vm, vcpus: Sequence[VcpuFd]) -> None:
        self._vm = vm
        self._vcpus = vcpus
        self.stood_still = False
        """Whether the clocks of what is loaded next stood from its save on."""

    def save(self) -> Mapping[str, Any]:
        """Read it all. Every vCPU is out."""
        return _section(*save_machine(self._vm, self._vcpus))

    def load(self, _version: int, state: Mapping[str, Any]) -> Callable[[], None]:
        """Check it all, and return what loads it."""
        vcpus = state.get("vcpus")
        if set(state) != {"vcpus", "chips"} or not isinstance(vcpus, list):
            raise StateRejected(section="kvm", faults=("it must have members vcpus (a list) and chips, and no other",))
        states = [_structure(VcpuState, vcpu, f"vcpus[{index}]") for index, vcpu in enumerate(vcpus)]
        chips = _structure(ChipState, state["chips"], "chips")
        check_machine(self._vm, self._vcpus, states, chips)
        stood_still = self.stood_still
        return lambda: load_machine(self._vm, self._vcpus, states, chips, stood_still=stood_still)


def _section(vcpus: Sequence[VcpuState], chips: ChipState) -> dict[str, Any]:
    return {"vcpus": [_fields(vcpu) for vcpu in vcpus], "chips": _fields(chips)}


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
