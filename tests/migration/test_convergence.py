"""When a guest is slowed down, and by how much."""

from __future__ import annotations

import pytest

from vmm.migration.convergence import Convergence
from vmm.migration.parameter_table import MigrationParameters

MIB = 1 << 20


def convergence(mode: str | None, vcpus: int = 1, **changes: object) -> tuple[Convergence, list[int]]:
    """Return a policy, and what it gives to the throttle."""
    parameters = dict(MigrationParameters().values) | {name.replace("_", "-"): value for name, value in changes.items()}
    given: list[int] = []
    return Convergence(mode, parameters, vcpus, given.append), given


def passes(policy: Convergence, count: int, *, sent: int = 100, dirtied: int = 60, seconds: float = 1.0) -> None:
    for _ in range(count):
        policy.after_pass(sent * MIB, dirtied * MIB, seconds)


def test_with_neither_capability_nothing_is_done() -> None:
    policy, given = convergence(None)
    passes(policy, 10, dirtied=1000)
    assert (given, policy.percent) == ([], 0)


def test_two_bad_passes_begin_it_and_two_more_are_a_step() -> None:
    policy, given = convergence("auto-converge")
    passes(policy, 1)
    assert given == []
    passes(policy, 1)
    assert given == [20]
    passes(policy, 5)
    assert (given, policy.percent) == ([20, 30, 40], 40)


def test_passes_in_which_little_is_written_are_no_reason() -> None:
    policy, given = convergence("auto-converge")
    passes(policy, 10, dirtied=50)
    assert given == []
    policy, given = convergence("auto-converge", throttle_trigger_threshold=20)
    passes(policy, 2, dirtied=21)
    assert given == [20]


def test_the_steps_end_at_the_most_there_may_be() -> None:
    settings = {"cpu_throttle_initial": 30, "cpu_throttle_increment": 50, "max_cpu_throttle": 85}
    policy, given = convergence("auto-converge", **settings)
    passes(policy, 20, dirtied=500)
    assert given == [30, 80, 85]


def test_a_first_step_is_no_higher_than_the_most() -> None:
    policy, given = convergence("auto-converge", cpu_throttle_initial=50, max_cpu_throttle=40)
    passes(policy, 2)
    assert given == [40]


def test_with_tailslow_a_step_is_no_larger_than_is_needed() -> None:
    policy, given = convergence("auto-converge", cpu_throttle_tailslow=True)
    passes(policy, 2)
    passes(policy, 2, dirtied=52)  # 50 would do: 4 percent less than what runs now, 80
    assert given == [20, 23]
    passes(policy, 2, dirtied=500)
    assert given == [20, 23, 33]


def test_a_limit_is_set_once_it_is_needed_and_then_kept_to_what_is_measured() -> None:
    policy, given = convergence("dirty-limit", vcpus=2, vcpu_dirty_limit=10)
    passes(policy, 1, dirtied=100)
    assert given == []
    passes(policy, 1, dirtied=100)
    assert given == [80]  # two vCPUs at 10 MiB/s are a fifth of 100
    passes(policy, 1, dirtied=40)
    assert given == [80, 90]
    passes(policy, 1, dirtied=10)
    assert given == [80, 90, 80]
    passes(policy, 1, dirtied=0)
    assert given == [80, 90, 80, 0]


def test_a_limit_goes_by_the_rate_and_not_by_the_amount() -> None:
    policy, given = convergence("dirty-limit", vcpu_dirty_limit=50)
    passes(policy, 2, dirtied=100, seconds=4.0)
    assert given == []
    policy, given = convergence("dirty-limit", vcpu_dirty_limit=50)
    passes(policy, 2, dirtied=100, seconds=0.5)
    assert given == [75]


def test_a_limit_is_looked_at_again_when_its_period_is_over() -> None:
    policy, given = convergence("dirty-limit", vcpu_dirty_limit=10, x_vcpu_dirty_limit_period=1000)
    passes(policy, 2, dirtied=100)
    assert given == [90]
    passes(policy, 3, dirtied=5, seconds=0.3)
    assert given == [90]
    passes(policy, 1, dirtied=9, seconds=0.3)  # 24 MiB in 1.2 s
    assert given == [90, 95]


def test_a_limit_does_not_exceed_the_most_there_may_be() -> None:
    policy, given = convergence("dirty-limit", max_cpu_throttle=60)
    passes(policy, 2, dirtied=10_000)
    assert given == [60]


@pytest.mark.parametrize("mode", ["auto-converge", "dirty-limit"])
def test_a_parameter_that_is_changed_meanwhile_counts(mode: str) -> None:
    parameters = dict(MigrationParameters().values)
    given: list[int] = []
    policy = Convergence(mode, parameters, 1, given.append)
    parameters["throttle-trigger-threshold"] = 100
    passes(policy, 10, dirtied=100)
    assert given == []
    parameters["throttle-trigger-threshold"] = 50
    passes(policy, 2, dirtied=100)
    assert given == [20 if mode == "auto-converge" else 99]
