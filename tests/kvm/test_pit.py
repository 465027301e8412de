from __future__ import annotations

import pytest

from tests.kvm.tiny import TinyMachine

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

MEASURES_A_MILLISECOND = """
 in al, 0x61
 and al, 0xfc
 or al, 1
 out 0x61, al
 mov al, 0xb0
 out 0x43, al
 mov ax, 1193
 out 0x42, al
 mov al, ah
 out 0x42, al
 xor ecx, ecx
l: inc ecx
 cmp ecx, 100000
 je done
 in al, 0x61
 test al, 0x20
 jz l
done: mov [0x8000], ecx
 out 0x99, al
 hlt
"""
"""Channel 2 counts down once, as Linux has it to measure the TSC, while the guest looks at its output in port 0x61."""


def test_the_gate_and_the_output_of_channel_2_are_the_kernels() -> None:
    with TinyMachine() as machine:
        machine.boot(MEASURES_A_MILLISECOND)
        assert machine.run().reason == "kicked"
        assert 1 < machine.word(0x8000) < 100000
        assert machine.ports.reads == []
        assert [address for address, _, _ in machine.ports.written] == [0x99]
