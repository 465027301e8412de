"""Registers as KVM takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.guests.machine import carry_out
from tests.hw.boot.images import bzimage, elf, source
from tests.kvm.tiny import TinyMachine
from vmm.hw.boot.image import plan_boot

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

RAM_SIZE = 32 << 20

# The code below says on port 0x80 what it was given, and then kicks itself out.
OUT_EAX = b"\xe7\x80"
KICK_AND_HALT = b"\xe6\x99\xf4"


@pytest.fixture
def machine() -> Iterator[TinyMachine]:
    with TinyMachine(size=RAM_SIZE) as machine:
        yield machine


def test_a_flat_image_runs_in_real_mode(machine: TinyMachine) -> None:
    # mov ax, cs; push ax; pop bx; xchg ax, bx; out 0x80, ax; mov ax, sp; out 0x80, ax; mov ax, ss; out 0x80, ax
    code = b"\x8c\xc8\x50\x5b\x93\xe7\x80\x89\xe0\xe7\x80\x8c\xd0\xe7\x80" + KICK_AND_HALT
    carry_out(plan_boot(source(code, "code.bin"), None, "", RAM_SIZE, 1), machine)
    assert machine.run().reason == "kicked"
    assert machine.outs(0x80) == [0x1000, 0x8000, 0x1000]


def test_an_elf_image_runs_in_protected_mode_with_its_start_info(machine: TinyMachine) -> None:
    # mov eax, [ebx]; out; mov esi, [ebx + 24]; mov eax, [esi]; out; mov eax, cr0; out
    code = b"\x8b\x03" + OUT_EAX + b"\x8b\x73\x18\x8b\x06" + OUT_EAX + b"\x0f\x20\xc0" + OUT_EAX + KICK_AND_HALT
    carry_out(plan_boot(source(elf(bits=32, content=code)), None, "abcd", RAM_SIZE, 1), machine)
    assert machine.run().reason == "kicked"
    assert machine.outs(0x80) == [0x336EC578, int.from_bytes(b"abcd", "little"), 0x11]


def test_a_bzimage_runs_in_long_mode_with_its_boot_params(machine: TinyMachine) -> None:
    # mov eax, [rsi + 0x202]; out; mov ecx, [rsi + 0x228]; mov eax, [rcx]; out; mov rax, cr3; out
    code = (
        b"\x8b\x86\x02\x02\x00\x00"
        + OUT_EAX
        + b"\x8b\x8e\x28\x02\x00\x00\x8b\x01"
        + OUT_EAX
        + b"\x0f\x20\xd8"
        + OUT_EAX
    )
    image = bzimage(payload=bytes(0x200) + code + KICK_AND_HALT, init_size=1 << 20)
    carry_out(plan_boot(source(image), None, "abcd", RAM_SIZE, 1), machine)
    assert machine.run().reason == "kicked"
    assert machine.outs(0x80) == [int.from_bytes(b"HdrS", "little"), int.from_bytes(b"abcd", "little"), 0x9000]


def test_a_plan_is_carried_out_again(machine: TinyMachine) -> None:
    # inc dword [0x100800]; mov eax, [0x100800]; out: the counter lies in the part that a reset clears
    code = b"\xff\x05\x00\x08\x10\x00\xa1\x00\x08\x10\x00" + OUT_EAX + KICK_AND_HALT
    plan = plan_boot(source(elf(bits=32, content=code, memory_size=0x1000)), None, "", RAM_SIZE, 1)
    for _ in range(2):
        carry_out(plan, machine)
        assert machine.run().reason == "kicked"
    assert machine.outs(0x80) == [1, 1]
