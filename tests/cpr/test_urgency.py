"""The loop's thread before all ordinary ones, where the host permits."""

from __future__ import annotations

import os
import threading

from vmm.cpr.urgency import Urgency

STRANGER = 65534


def test_the_thread_goes_back_to_what_it_was() -> None:
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    urgency = Urgency()
    urgency.begin()
    urgency.close()
    urgency.close()
    assert (os.sched_getscheduler(0), os.sched_getparam(0)) == before


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
