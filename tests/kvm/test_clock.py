"""The arithmetic of a guest's TSC on another host."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmm.kvm.clock import WORD, clock_distance, moved_tsc_offset

TSC = st.integers(0, 1 << 58)
KHZ = st.integers(500_000, 6_000_000)


@given(TSC, TSC, st.integers(0, WORD - 1), KHZ, st.integers(0, 10**15))
def test_at_one_rate_the_guests_tsc_has_counted_what_elapsed_to_the_tick(
    then: int, now: int, offset: int, khz: int, elapsed: int
) -> None:
    moved = moved_tsc_offset(
        offset, guest_khz=khz, then_tsc=then, then_khz=khz, now_tsc=now, now_khz=khz, elapsed_ns=elapsed
    )
    assert (now + moved) % WORD == (then + offset + elapsed * khz // 1_000_000) % WORD


@given(TSC, TSC, KHZ, KHZ, KHZ)
def test_a_scaled_tsc_goes_on_from_the_scaled_reading(then: int, now: int, guest: int, there: int, here: int) -> None:
    moved = moved_tsc_offset(
        7, guest_khz=guest, then_tsc=then, then_khz=there, now_tsc=now, now_khz=here, elapsed_ns=1_000_000
    )
    assert (now * guest // here + moved) % WORD == (then * guest // there + 7 + guest) % WORD


def test_a_distance_is_short_across_the_wrap() -> None:
    assert clock_distance(3, WORD - 2) == 5
    assert clock_distance(WORD - 2, 3) == -5
