"""That loading the state of a machine that has not run is a reset."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import attrs
import pytest

from tests.kvm.tiny import TinyMachine
from vmm.kvm.machine_state import load_machine, save_machine

if TYPE_CHECKING:
    from vmm.kvm.state import VcpuState

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

KVM_SYSTEM_TIME = 0x4B564D01
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
