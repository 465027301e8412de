from __future__ import annotations

import os
import signal

import pytest

from vmm.cpr.limits import CprLimits
from vmm.cpr.steps import DESTINATION_STEPS, MEANING, SOURCE_STEPS, STEPS, Steps, check_step
from vmm.errors import OptionInvalid


def test_a_process_stops_itself_once_at_the_step_that_was_asked_for() -> None:
    child = os.fork()
    if not child:
        steps = Steps("source", "source:offered")
        steps.reach("loaded")
        steps.reach("offered")
        steps.reach("offered")
        os._exit(7)
    _, status = os.waitpid(child, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    os.kill(child, signal.SIGCONT)
    _, status = os.waitpid(child, os.WUNTRACED)
    assert os.waitstatus_to_exitcode(status) == 7


def test_the_steps_of_the_other_side_stop_nobody() -> None:
    steps = Steps("destination", "source:described")
    steps.reach("described")
    assert steps.current == "described"


def test_who_follows_the_steps_is_told_the_present_one_and_each_later_one() -> None:
    steps, told = Steps("source"), list[str]()
    steps.reach("begun")
    steps.follow(told.append)
    steps.reach("connected")
    steps.reach("greeted")
    assert told == ["begun", "connected", "greeted"]
    assert steps.current == "greeted"


def test_every_step_has_its_side_and_its_meaning() -> None:
    assert len(STEPS) == len(SOURCE_STEPS) + len(DESTINATION_STEPS) == len(set(STEPS))
    assert tuple(MEANING) == STEPS
    for step in ("", *STEPS):
        check_step(step)


def test_an_unknown_step_is_refused_with_those_there_are() -> None:
    with pytest.raises(OptionInvalid) as caught:
        check_step("source:nowhere")
    assert str(caught.value) == f"--x-cpr-stop-at: 'source:nowhere' is not one of {', '.join(STEPS)}"


def test_limits_that_are_not_named_stay_as_they_are() -> None:
    assert CprLimits.parse("") == CprLimits()
    assert CprLimits.parse("loading=0.5,taking=3") == CprLimits(loading=0.5, taking=3)


@pytest.mark.parametrize("text", ["loading", "loading=", "loading=soon", "loading=0", "loading=-1", "sleeping=1", "=1"])
def test_limits_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(OptionInvalid) as caught:
        CprLimits.parse(text)
    assert str(caught.value) == (
        f"--x-cpr-limits: {text!r} is not NAME=SECONDS,... with more than 0 seconds, "
        "and names of describing, checking, building, loading, taking"
    )
