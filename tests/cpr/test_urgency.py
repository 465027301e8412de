"""The loop's thread before all ordinary ones, where the host permits, and garbage held off."""

from __future__ import annotations

import gc
import os
import threading

import pytest

from vmm.cpr.urgency import Urgency

STRANGER = 65534


def test_the_thread_goes_back_to_what_it_was() -> None:
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    urgency = Urgency()
    urgency.begin()
    urgency.close()
    urgency.close()
    assert (os.sched_getscheduler(0), os.sched_getparam(0)) == before


def test_garbage_is_held_off_meanwhile() -> None:
    urgency = Urgency()
    urgency.begin()
    held_off = not gc.isenabled()
    urgency.close()
    assert held_off
    assert gc.isenabled()


def test_of_two_at_a_time_the_first_lets_garbage_come_again() -> None:
    one, two = Urgency(), Urgency()
    one.begin()
    two.begin()
    two.close()
    held_off = not gc.isenabled()
    one.close()
    assert held_off
    assert gc.isenabled()


def test_where_garbage_is_held_off_anyway_it_stays_so() -> None:
    gc.disable()
    try:
        urgency = Urgency()
        urgency.begin()
        urgency.close()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_thread_that_is_made_meanwhile_is_ordinary() -> None:
    policies: list[int] = []
    urgency = Urgency()
    urgency.begin()
    try:
        own = os.sched_getscheduler(0)
        thread = threading.Thread(target=lambda: policies.append(os.sched_getscheduler(0)))
        thread.start()
        thread.join()
    finally:
        urgency.close()
    assert policies == [os.SCHED_OTHER]
    if os.geteuid() == 0:
        assert own == os.SCHED_RR | os.SCHED_RESET_ON_FORK


@pytest.mark.parametrize("policy", [os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.SCHED_BATCH, os.SCHED_IDLE])
def test_whatever_is_ordinary_is_raised(policy: int) -> None:
    before = os.sched_getscheduler(0)
    os.sched_setscheduler(0, policy, os.sched_param(0))
    urgency = Urgency()
    try:
        urgency.begin()
        assert os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK == os.SCHED_RR
        urgency.close()
        assert os.sched_getscheduler(0) == policy
    finally:
        urgency.close()
        os.sched_setscheduler(0, before, os.sched_param(0))


def test_a_thread_that_goes_first_anyway_stays_as_it_is() -> None:
    one, two = Urgency(), Urgency()
    before = os.sched_getscheduler(0)
    one.begin()
    two.begin()
    one.close()
    two.close()
    assert os.sched_getscheduler(0) == before


def test_where_the_host_does_not_permit_it_nothing_changes() -> None:
    child = os.fork()
    if child == 0:
        if os.geteuid() == 0:
            os.setresuid(STRANGER, STRANGER, STRANGER)
        urgency = Urgency()
        urgency.begin()
        unchanged = os.sched_getscheduler(0) == os.SCHED_OTHER
        urgency.close()
        os._exit(0 if unchanged else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
