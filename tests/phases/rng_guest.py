"""A guest of a few hundred bytes that asks a virtio-rng for random bytes, over and over, and records how it goes."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final, final

import attrs
import trio

from tests.kvm.tiny import assemble
from tests.phases.update_kit import due

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

RECORD: Final = 0x20000
USED: Final = 0x23000
"""Where the used ring is: flags, then how many requests the device has given back."""

RAM: Final = 2 << 20

_SOURCE: Final = """
; Where the image is: linear addresses are 0x10000 more than labels.
%define at(label) (0x10000 + label)
%define SLOT 0xfeb00000 + 0x200 * {slot}
%define RECORD 0x20000
%define TABLE 0x21000
%define AVAILABLE 0x22000
%define USED 0x23000
%define BUFFER 0x24000
%define IDT 0x25000
bits 16
 cli
 lgdt [gdtr]
 mov eax, cr0
 or al, 1
 mov cr0, eax
 jmp dword 8:at(flat)
align 8
gdt: dq 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdtr: dw 23
 dd at(gdt)
idtr: dw 0x41 * 8 - 1
 dd IDT
bits 32
flat: mov ax, 16
 mov ds, ax
 mov es, ax
 mov ss, ax
 mov esp, 0x1f000
 mov al, 0xff
 out 0x21, al
 out 0xa1, al
 ; Interrupt 0x40 is the device's, by way of the IOAPIC: level-triggered.
 mov eax, at(isr)
 mov word [IDT + 0x40 * 8], ax
 mov word [IDT + 0x40 * 8 + 2], 8
 mov word [IDT + 0x40 * 8 + 4], 0x8e00
 shr eax, 16
 mov word [IDT + 0x40 * 8 + 6], ax
 lidt [at(idtr)]
 mov dword [0xfee000f0], 0x1ff
 mov dword [0xfec00000], 0x11 + 2 * (16 + {slot})
 mov dword [0xfec00010], 0
 mov dword [0xfec00000], 0x10 + 2 * (16 + {slot})
 mov dword [0xfec00010], 0x8040
 mov ebx, SLOT
find: inc dword [RECORD]
 cmp dword [ebx + 8], 4
 jne find
 mov dword [AVAILABLE], 0
 mov dword [USED], 0
 mov dword [ebx + 0x70], 0
 mov dword [ebx + 0x70], 1
 mov dword [ebx + 0x70], 3
 mov dword [ebx + 0x24], 0
 mov dword [ebx + 0x20], 0
 mov dword [ebx + 0x24], 1
 mov dword [ebx + 0x20], 1
 mov dword [ebx + 0x70], 11
 mov dword [ebx + 0x30], 0
 mov dword [ebx + 0x38], 8
 mov dword [ebx + 0x80], TABLE
 mov dword [ebx + 0x84], 0
 mov dword [ebx + 0x90], AVAILABLE
 mov dword [ebx + 0x94], 0
 mov dword [ebx + 0xa0], USED
 mov dword [ebx + 0xa4], 0
 mov dword [ebx + 0x44], 1
 mov dword [ebx + 0x70], 15
 mov dword [TABLE], BUFFER
 mov dword [TABLE + 8], 16
 mov dword [TABLE + 12], 2
 xor esi, esi
ask: mov dword [BUFFER], 0
 mov dword [BUFFER + 4], 0
 inc si
 mov [AVAILABLE + 2], si
 inc dword [RECORD + 4]
 mov dword [ebx + 0x50], 0
 ; Not looked at before it has been waited for: on a busy host the answer may always be there already.
wait_interrupt: sti
 hlt
wait_used: cli
 cmp [USED + 2], si
 jne wait_interrupt
 mov eax, [BUFFER]
 or eax, [BUFFER + 4]
 jnz .good
 inc dword [RECORD + 12]
.good: inc dword [RECORD + 8]
 jmp ask
; Only ever from the hlt above. Some KVM hosts emulate this code, and that emulator has no IRET outside real mode.
isr: mov eax, [ebx + 0x60]
 mov [ebx + 0x64], eax
 inc dword [RECORD + 16]
 mov dword [0xfee000b0], 0
 add esp, 12
 jmp wait_used
"""


@final
@attrs.frozen
class Progress:
    """What the guest has recorded."""

    looked: int
    """How often it has looked for the device."""
    asked: int
    answered: int
    empty: int
    """Answers without a byte."""
    interrupts: int


@final
class RngGuest:
    """The guest, seen from outside. `read` copies out of its memory."""

    def __init__(self, read: Callable[[int, int], bytes]) -> None:
        self._read = read

    def now(self) -> Progress:
        return Progress(*struct.unpack("<5I", self._read(RECORD, 20)))

    async def until(self, what: str, reached: Callable[[Progress], bool]) -> Progress:
        """Wait until the guest has recorded what is waited for."""
        async with due(what):
            while not reached(self.now()):  # noqa: ASYNC110 - memory does not tell
                await trio.sleep(0.001)
        return self.now()

    async def answers(self, count: int) -> Progress:
        """Wait for so many answers more, none of which may be empty."""
        before = self.now().answered
        progress = await self.until(f"{count} answers", lambda it: it.answered >= before + count)
        assert progress.empty == 0
        return progress


def rng_guest(directory: Path, slot: int = 0) -> str:
    """Assemble it for a device in `slot`; return the value of `-kernel`."""
    path = directory / f"rng{slot}.bin"
    path.write_bytes(assemble(_SOURCE.format(slot=slot), origin=0))
    return f"flat:{path}"


def definition(kernel: str) -> dict[str, Any]:
    """Return the arguments of `machine-set`."""
    return {"kernel": kernel, "memory": {"size": RAM}}
