"""Where a guest's TSC stands on another host, or after its time stood still."""

from __future__ import annotations

from typing import final

import attrs

WORD = 1 << 64


@final
@attrs.frozen
class Moment:
    """When state was read: struct tv_moment, as bytes in `ChipState.moment`. Times in nanoseconds."""

    boot_id: bytes
    raw_ns: int
    monotonic_ns: int
    host_tsc: int
    realtime_ns: int

    @classmethod
    def from_bytes(cls, data: bytes) -> Moment:
        """Take struct tv_moment apart. `data` has its size: 48 bytes."""
        words = [int.from_bytes(data[at : at + 8], "little") for at in range(16, 48, 8)]
        return cls(data[:16], *words)


def moved_tsc_offset(
    offset: int, *, guest_khz: int, then_tsc: int, then_khz: int, now_tsc: int, now_khz: int, elapsed_ns: int
) -> int:
    """Work out the TSC offset that makes a guest's TSC go on.

    The guest's TSC is the host's, scaled from the host's rate to the guest's, plus the offset, modulo 2**64. It was so
    on the host of `then_*`, where the offset was `offset`, and shall be so `elapsed_ns` later on the host of `now_*`.
    With scaling the result is as exact as the hardware's fixed-point ratio; without, to one tick.

    Source: Linux Documentation/virt/kvm/devices/vcpu.rst, KVM_VCPU_TSC_OFFSET.
    """
    guest_then = then_tsc * guest_khz // then_khz + offset
    guest_now = guest_then + elapsed_ns * guest_khz // 1_000_000
    return (guest_now - now_tsc * guest_khz // now_khz) % WORD


def clock_distance(a: int, b: int) -> int:
    """How far `a` is ahead of `b`, on a clock of 64 bits that wraps around."""
    return (a - b + WORD // 2) % WORD - WORD // 2
