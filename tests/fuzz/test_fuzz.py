"""A fixed number of changed inputs for each target, always the same ones; `python -m tests.fuzz` has no end of them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz import seeds, targets
from tests.fuzz.__main__ import TARGETS
from tests.fuzz.channel_targets import CHANNEL_TARGETS
from tests.fuzz.mutation import CASES, Case
from tests.fuzz.targets import CprMessages, Target, TooSlow, corpus_of, in_time

if TYPE_CHECKING:
    from pathlib import Path

INPUTS: Final = 300


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("name", sorted(TARGETS))
def test_a_target_takes_whatever_comes(name: str) -> None:
    corpus = corpus_of(name)
    with TARGETS[name]() as target:

        @settings(
            max_examples=INPUTS, deadline=None, database=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(CASES)
        def some(case: Case) -> None:
            data = case.build(corpus, target.repair)
            target.take(data, case.cut(data))

        some()
        assert target.taken + target.refused >= INPUTS // 2
        assert target.refused


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("name", sorted(TARGETS))
def test_each_input_of_a_corpus_is_dealt_with(name: str) -> None:
    with TARGETS[name]() as target:
        for data in corpus_of(name):
            target.take(data, [data])
        assert target.taken or isinstance(target, CprMessages)  # a channel ends by an error, whatever came


def test_a_stream_whose_checksums_are_right_is_left_as_it_is() -> None:
    for name in ("stream-header", "device-section", "ram", "saved-file", *CHANNEL_TARGETS):
        with TARGETS[name]() as target:
            for data in corpus_of(name):
                assert target.repair(data) == data


def test_what_takes_too_long_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "SLOW", 0.01)
    with pytest.raises(TooSlow), in_time():
        time.sleep(60)


def test_an_error_that_was_not_declared_is_a_finding() -> None:
    class Careless(Target):
        refusals = (ValueError,)

        def deal_with(self, data: bytes, pieces: object) -> None:
            raise KeyError(data)

    with Careless() as target, pytest.raises(KeyError):
        target.take(b"x", [b"x"])


def test_the_corpus_can_be_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(seeds, "CORPUS", tmp_path)
    seeds.main()
    for name in TARGETS:
        made = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        kept = {path.name: path.read_bytes() for path in (targets.CORPUS / name).iterdir()}
        assert made.items() <= kept.items()
