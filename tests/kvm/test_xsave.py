"""Vector registers beyond SSE, and the register that says which there are."""

from __future__ import annotations

import random
import struct
from typing import TYPE_CHECKING

import attrs
import pytest

from tests.kvm.tiny import TinyMachine
from vmm.kvm.machine_state import load_machine, save_machine

if TYPE_CHECKING:
    from vmm.kvm.state import VcpuState

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

# Source: Intel SDM volume 1, 13.4 (XSAVE area); linux/kvm.h, struct kvm_xcrs.
FCW, XMM, XSTATE_BV, YMM_HIGH = 0, slice(160, 416), 512, slice(576, 832)
XCR0_VALUE = 16
X87_SSE_AVX = 0x7
DOUBLE_PRECISION = 0x27F
"""An x87 control word that is not the initial one."""


def with_avx_in_use(state: VcpuState) -> VcpuState:
    """The state of a guest that has turned AVX on and used every register.

    The x87 too: of a component in its initial state a processor may say that it is not in use (13.6).
    """
    xsave, xcrs, chance = bytearray(state.xsave), bytearray(state.xcrs), random.Random(1)
    xsave[XMM], xsave[YMM_HIGH] = chance.randbytes(256), chance.randbytes(256)
    struct.pack_into("<H", xsave, FCW, DOUBLE_PRECISION)
    struct.pack_into("<Q", xsave, XSTATE_BV, X87_SSE_AVX)
    struct.pack_into("<Q", xcrs, XCR0_VALUE, X87_SSE_AVX)
    return attrs.evolve(state, xsave=bytes(xsave), xcrs=bytes(xcrs))


def test_avx_registers_and_xcr0_are_the_same_after_a_hand_over_and_a_run() -> None:
    with TinyMachine() as source, TinyMachine() as heir:
        features = {(leaf.function, leaf.index): leaf for leaf in source.kvm.supported_cpuid()}
        if (0xD, 2) not in features or not features[0xD, 2].eax:
            pytest.skip("this host's processor has no AVX")
        states, chips = save_machine(source.vm, source.fds)
        used = with_avx_in_use(states[0])
        load_machine(heir.vm, heir.fds, [used], chips)
        heir.boot(" out 0x99, al\n hlt")
        assert heir.run().reason == "kicked"
        (after,), _ = save_machine(heir.vm, heir.fds)
        assert after.xcrs == used.xcrs
        assert after.xsave == used.xsave
