"""That loading the state of a machine that has not run is a reset, and what KVM does not list travels."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import attrs
import pytest

from tests.kvm.tiny import TinyMachine
from vmm.errors import KvmCallFailed
from vmm.kvm.machine_state import load_machine, save_machine

if TYPE_CHECKING:
    from vmm.kvm.state import VcpuState

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

KVM_SYSTEM_TIME = 0x4B564D01
MTRR_DEFAULT_TYPE = 0x2FF
MTRR_BASE_0, MTRR_MASK_0, MTRR_FIXED_64K = 0x200, 0x201, 0x250
CLOCK_PAGE = 0x8000


def msrs(state: VcpuState) -> dict[int, int]:
    return {index: data for index, _, data in struct.iter_unpack("<IIQ", state.msrs)}


def test_a_reset_takes_the_clock_page_from_kvm() -> None:
    """Or it would go on writing there, into whatever the guest that boots next keeps in the page."""
    with TinyMachine() as machine:
        states, chips = save_machine(machine.vm, machine.fds)
        assert msrs(states[0])[KVM_SYSTEM_TIME] == 0
        blob = b"".join(
            struct.pack("<IIQ", index, 0, CLOCK_PAGE | 1 if index == KVM_SYSTEM_TIME else data)
            for index, data in msrs(states[0]).items()
        )
        load_machine(machine.vm, machine.fds, [attrs.evolve(states[0], msrs=blob)], chips)
        machine.boot(" out 0x99, al\n hlt")
        machine.run()
        assert machine.memory.read(CLOCK_PAGE, 32) != bytes(32)
        assert msrs(save_machine(machine.vm, machine.fds)[0][0])[KVM_SYSTEM_TIME] == CLOCK_PAGE | 1

        load_machine(machine.vm, machine.fds, states, chips)
        machine.memory.write(CLOCK_PAGE, bytes(32))
        machine.boot(" out 0x99, al\n hlt")
        machine.run()
        assert machine.memory.read(CLOCK_PAGE, 32) == bytes(32)
        assert msrs(save_machine(machine.vm, machine.fds)[0][0])[KVM_SYSTEM_TIME] == 0


def test_memory_types_travel_and_are_reset() -> None:
    chosen = {
        MTRR_DEFAULT_TYPE: 0xC06,
        MTRR_BASE_0: 0xC0000000,
        MTRR_MASK_0: 0xC0000800,
        MTRR_FIXED_64K: 0x0606060606060606,
    }
    with TinyMachine() as source, TinyMachine() as heir:
        fresh, fresh_chips = save_machine(source.vm, source.fds)
        assert {msrs(fresh[0])[index] for index in chosen} == {0}
        for index, value in chosen.items():
            source.fds[0].set_msr(index, value)
        states, chips = save_machine(source.vm, source.fds)
        load_machine(heir.vm, heir.fds, states, chips)
        after = msrs(save_machine(heir.vm, heir.fds)[0][0])
        assert {index: after[index] for index in chosen} == chosen
        load_machine(heir.vm, heir.fds, fresh, fresh_chips)
        assert {msrs(save_machine(heir.vm, heir.fds)[0][0])[index] for index in chosen} == {0}


def test_a_register_that_does_not_take_a_value_is_named() -> None:
    with TinyMachine() as machine:
        with pytest.raises(KvmCallFailed) as caught:
            machine.fds[0].set_msr(MTRR_DEFAULT_TYPE, 0xFFFF)
        assert str(caught.value) == "KVM_SET_MSRS failed for MSR 0x2ff of vCPU 0: Invalid argument (errno 22)"
