"""Change inputs of a target's corpus for some minutes; fail at the first one that it does not take well."""

from __future__ import annotations

import argparse
import resource
import sys
import time

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.channel_targets import CHANNEL_TARGETS
from tests.fuzz.mutation import CASES, Case
from tests.fuzz.targets import TARGETS as STREAM_TARGETS
from tests.fuzz.targets import corpus_of

TARGETS = {**STREAM_TARGETS, **CHANNEL_TARGETS}

_ROUND = 2000
"""Inputs between two looks at the clock."""
_ROOM = 1 << 30
"""Bytes of address space that may be asked for, beyond what is in use at the beginning."""


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=time.time_ns() & 0xFFFF_FFFF, help="of the first round")
    options = parser.parse_args()
    corpus = corpus_of(options.target)
    with TARGETS[options.target]() as target:
        target.take(corpus[0], [corpus[0]])
        _limit_memory()
        begun = time.monotonic()
        rounds, slowest = 0, 0.0
        while time.monotonic() - begun < options.minutes * 60:

            @seed(options.seed + rounds)
            @settings(
                max_examples=_ROUND, deadline=None, database=None, suppress_health_check=list(HealthCheck),
                phases=(Phase.generate, Phase.shrink),
            )  # fmt: skip
            @given(CASES)
            def round_of_inputs(case: Case) -> None:
                nonlocal slowest
                data = case.build(corpus, target.repair)
                at = time.monotonic()
                target.take(data, case.cut(data))
                slowest = max(slowest, time.monotonic() - at)

            round_of_inputs()
            rounds += 1
    took = time.monotonic() - begun
    taken, refused = target.taken, target.refused
    print(
        f"{options.target}: {taken + refused} inputs in {took:.0f} s, {refused} of them refused; seed {options.seed}; "
        f"the slowest took {slowest * 1000:.0f} ms; nothing found"
    )
    return 0


def _limit_memory() -> None:
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + _ROOM,) * 2)


if __name__ == "__main__":
    sys.exit(main())
