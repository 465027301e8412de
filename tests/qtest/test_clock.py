from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.errors import OptionInvalid
from vmm.qtest.clock import LAST, VirtualClock

EPOCH = 1_000_000_000 * 10**9


@given(st.lists(st.integers(0, 10**12), max_size=20))
def test_time_is_the_sum_of_the_steps(steps: list[int]) -> None:
    clock = VirtualClock(EPOCH)
    for step in steps:
        before = clock.now_ns
        assert clock.step(step) == before + step
    assert clock.now_ns == sum(steps)
    assert clock.time_ns() == EPOCH + sum(steps)


def test_it_can_be_set_ahead_and_to_where_it_is() -> None:
    clock = VirtualClock(EPOCH)
    assert [clock.set(5), clock.set(5), clock.set(LAST)] == [5, 5, LAST]


def test_it_never_goes_back() -> None:
    clock = VirtualClock(EPOCH)
    clock.set(5)
    with pytest.raises(OptionInvalid) as caught:
        clock.set(4)
    assert str(caught.value) == (
        "clock_set: 4 is not possible: the clock is at 5 ns, and goes on, never back, and to 2**63 - 1 at most"
    )
    assert clock.now_ns == 5


def test_it_ends_with_63_bits() -> None:
    clock = VirtualClock(EPOCH)
    clock.set(LAST)
    with pytest.raises(OptionInvalid) as caught:
        clock.step(1)
    assert str(caught.value).startswith("clock_step: 1 is not possible: the clock is at 9223372036854775807 ns")
