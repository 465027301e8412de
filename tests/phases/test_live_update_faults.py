"""Each side of a live update meets each fault at each of its steps; docs/live-update-faults.md says what comes."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING, Final

import pytest
import trio

from tests.phases.fault_matrix import ENDS, FAULTS, NOT_YET, Seen, observe
from tests.phases.fault_table import comparable, observed, write, written
from tests.phases.update_kit import hung_up, open_bench
from tests.phases.zygote import Zygote, open_zygote
from vmm.cpr.steps import STEPS

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

AT_ONCE: Final = 5
"""Pairs of processes. Some wait for a limit to pass; more would wait for a processor."""

OWNS: Final = frozenset(
    f"source:{step}"
    for step in (
        "begun", "connected", "greeted", "described", "ready", "main-connected", "paused", "state-sent", "loaded"
    )
) | {"destination:running"}  # fmt: skip
"""Where the side that is at the step has the guest. At `source:offered` nobody has, and at `destination:taken` the
destination does, but the source gets it back if that dies."""


@pytest.fixture
def zygote(no_leaks: None) -> Iterator[Zygote]:
    with open_zygote() as it:
        yield it


async def all_steps(zygote: Zygote, fault: str) -> dict[str, Seen]:
    """Let `fault` strike at every step."""
    found: dict[str, Seen] = {}
    limiter = trio.CapacityLimiter(AT_ONCE)

    async def at(step: str) -> None:
        async with limiter:
            try:
                found[step] = await observe(zygote, step, fault)
            except Exception as error:
                error.add_note(f"{fault} at {step}")
                raise

    async with trio.open_nursery() as nursery:
        steps = [step for step in STEPS if (step, fault) not in NOT_YET]
        for step in steps:
            nursery.start_soon(at, step)
    return {step: found[step] for step in steps}


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_leaves_the_guest_with_one_owner_or_dead_with_it_and_tells_why(
    zygote: Zygote, fault: str
) -> None:
    if fault == "ENOSPC" and not may_mount():
        pytest.skip("to fill a file system takes the right to mount one")
    seen = await all_steps(zygote, fault)
    for step, it in seen.items():
        # Whatever the table says, this holds.
        assert it.owner != "nobody" or fault in ENDS, (step, it)
        assert it.owner != "nobody" or fault != "killed" or step in OWNS, (step, it)
        assert it.told or it.owner != "source", (step, it)
    table = observed(seen)
    if os.environ.get("VMM_WRITE_FAULTS") == "1":
        write(fault, table)
    assert comparable(table) == comparable(written(fault))


def may_mount() -> bool:
    return os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], check=False).returncode == 0


async def test_a_source_whose_clients_went_with_a_guest_that_died_says_so_and_fails() -> None:
    async with open_bench() as bench:
        console = bench.console()
        source = bench.machine(console)
        await console.beats(1)
        destination = bench.destination("--x-cpr-stop-at", "destination:running")
        await bench.listening(destination)
        async with bench.session(bench.qmp) as client:
            parameters = {"mode": "cpr-transfer", "migrate-sessions": True}
            await client.execute("migrate", channels=bench.channels(destination), parameters=parameters)
            await destination.stopped()
            destination.kill()
            await hung_up(client)
        assert await source.ended() == 1
        (said,) = source.said()
        assert said == (
            "trio-vmm: The destination died when it had begun to run the guest at step 'offered'; "
            "the guest died with it"
        )
