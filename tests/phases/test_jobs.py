"""Jobs: their states, and the registry."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vmm.errors import BackendNotFound, InvalidState, NameTaken, OptionInvalid
from vmm.phases.jobs import STATUSES, STEPS, Job, Jobs


@attrs.define
class Events:
    """What was emitted."""

    told: list[tuple[str, Any]] = attrs.Factory(list)

    def emit(self, name: str, data: object) -> None:
        """Note an event."""
        self.told.append((name, data))

    def statuses(self, name: str) -> list[object]:
        """Statuses of one job, in order."""
        return [data["status"] for event, data in self.told if event == "JOB_STATUS_CHANGE" and data["id"] == name]


def made(**how: Any) -> tuple[Jobs, Job, Events]:
    events = Events()
    jobs = Jobs(events.emit)
    return jobs, jobs.create("j", "migrate", **{"progress": lambda: (3, 7), **how}), events


# --- states -----------------------------------------------------------------------------------------------


def test_a_job_that_succeeds_goes_qemus_way_and_stays_until_it_is_dismissed() -> None:
    jobs, job, events = made()
    job.start()
    job.succeed()
    assert [found.name for found in jobs] == ["j"]
    jobs.dismiss("j")
    assert events.statuses("j") == ["created", "running", "waiting", "pending", "concluded", "null"]
    assert list(jobs) == []


def test_a_job_that_fails_tells_why_once_it_has_concluded() -> None:
    jobs, job, events = made()
    job.start()
    before = job.error
    job.fail("There is no room")
    assert (before, job.error) == (None, "There is no room")
    jobs.dismiss("j")
    assert events.statuses("j") == ["created", "running", "aborting", "concluded", "null"]


def test_a_job_whose_command_failed_is_forgotten() -> None:
    jobs, job, events = made()
    jobs.withdraw(job)
    assert events.statuses("j") == ["created", "null"]
    assert list(jobs) == []


def test_the_progress_of_a_job_that_has_ended_stays() -> None:
    done = [3]
    _, job, _ = made(progress=lambda: (done[0], 7))
    job.start()
    assert job.progress() == (3, 7)
    done[0] = 7
    job.succeed()
    done[0] = 0
    assert job.progress() == (7, 7)


def test_the_table_has_no_way_into_states_that_no_job_here_has() -> None:
    reached = {after for steps in STEPS.values() for after in steps}
    assert set(STATUSES) - reached == {"undefined", "paused", "ready", "standby"}
    assert STEPS.keys() <= set(STATUSES)


@pytest.mark.parametrize("again", ["start", "succeed", "fail"])
def test_a_step_that_is_not_in_the_table_is_a_bug(again: str) -> None:
    _, job, _ = made()
    job.start()
    job.succeed()
    arguments = ("x",) if again == "fail" else ()
    with pytest.raises(RuntimeError, match=r"job j: concluded does not lead to "):
        getattr(job, again)(*arguments)


class Lives(RuleBasedStateMachine):
    """Jobs that come, go on and end in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.events = Events()
        self.jobs = Jobs(self.events.emit)

    @rule(name=st.sampled_from(["a", "b", "c"]))
    def create(self, name: str) -> None:
        try:
            self.jobs.create(name, "migrate", progress=lambda: (0, 1))
        except NameTaken:
            assert name in [job.name for job in self.jobs]

    @precondition(lambda self: any(self.jobs))
    @rule(data=st.data(), how=st.sampled_from(["start", "succeed", "fail", "withdraw", "dismiss"]))
    def go_on(self, data: st.DataObject, how: str) -> None:
        job = data.draw(st.sampled_from(list(self.jobs)))
        if how == "start" and job.status == "created":
            job.start()
        elif how == "succeed" and job.status == "running":
            job.succeed()
        elif how == "fail" and job.status == "running":
            job.fail("why")
        elif how == "withdraw" and job.status == "created":
            self.jobs.withdraw(job)
        elif how == "dismiss":
            try:
                self.jobs.dismiss(job.name)
            except InvalidState:
                assert job.status in ("created", "running")

    @invariant()
    def every_job_has_gone_from_state_to_state_as_the_table_has_it(self) -> None:
        for name in ("a", "b", "c"):
            last = "undefined"
            for status in self.events.statuses(name):
                assert status in STEPS[last], (last, status)  # type: ignore[index]
                last = "undefined" if status == "null" else str(status)


TestLives = Lives.TestCase


# --- the registry -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "migrate0", "A.b-c_d9", "x" * 127])
def test_a_name_is_well_formed(name: str) -> None:
    Jobs(Events().emit).check(name)


@pytest.mark.parametrize("name", ["", "0a", "-a", "a b", "a/b", "ä", "x" * 128, "a\n"])
def test_a_name_that_is_not_well_formed_is_refused(name: str) -> None:
    with pytest.raises(OptionInvalid) as caught:
        Jobs(Events().emit).check(name)
    assert str(caught.value) == (
        f"job-id: {name!r} is not a name: a letter, then letters, digits, '-', '_' and '.', at most 127 in all"
    )


def test_a_name_is_given_once_until_it_is_dismissed() -> None:
    jobs, job, _ = made()
    with pytest.raises(NameTaken) as caught:
        jobs.create("j", "snapshot-save", progress=lambda: (0, 1))
    assert str(caught.value) == "Job 'j' exists already; choose another name"
    job.start()
    job.succeed()
    jobs.dismiss("j")
    jobs.create("j", "snapshot-save", progress=lambda: (0, 1))


def test_what_is_not_there_and_what_has_not_concluded_is_not_dismissed() -> None:
    jobs, job, _ = made()
    with pytest.raises(BackendNotFound) as missing:
        jobs.dismiss("k")
    assert str(missing.value) == "Job 'k' does not exist; there are: j"
    job.start()
    with pytest.raises(InvalidState) as early:
        jobs.dismiss("j")
    assert str(early.value) == (
        "job-dismiss of 'j' is not possible while it is running; "
        "wait until it has concluded, which event JOB_STATUS_CHANGE tells"
    )


def test_a_job_that_cannot_be_cancelled_says_why() -> None:
    _, job, _ = made(no_cancel=("here", "do it there"))
    with pytest.raises(InvalidState) as caught:
        job.require_cancellable()
    assert str(caught.value) == "job-cancel of 'j' is not possible here; do it there"
    _, other, _ = made()
    other.require_cancellable()
    other.start()
    other.require_cancellable()
    other.succeed()
    with pytest.raises(InvalidState) as late:
        other.require_cancellable()
    assert str(late.value) == "job-cancel of 'j' is not possible once it is concluded; job-dismiss forgets it"
