"""Each side of a migration meets each fault in each state; docs/migration-faults.md says what comes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import pytest
import trio

from tests.phases import migration_matrix, postcopy_matrix
from tests.phases.fault_table import MIGRATION_PAGE, observed, write, written
from tests.phases.migration_matrix import FAULTS, LOST
from tests.phases.zygote import Zygote, open_zygote

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.phases.fault_matrix import Seen

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

STATES: Final = {
    **dict.fromkeys(migration_matrix.STATES, migration_matrix.observe),
    **dict.fromkeys(postcopy_matrix.STATES, postcopy_matrix.observe),
}
"""How what comes of a fault is seen there."""

AT_ONCE: Final = 4
"""Pairs of processes; more would wait for a processor."""


@pytest.fixture
def zygote(no_leaks: None) -> Iterator[Zygote]:
    with open_zygote() as it:
        yield it


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_leaves_the_guest_with_one_owner_or_dead_with_it_and_tells_why(
    zygote: Zygote, fault: str
) -> None:
    seen: dict[str, Seen] = {}
    limiter = trio.CapacityLimiter(AT_ONCE)

    async def at(state: str) -> None:
        async with limiter:
            try:
                seen[state] = await STATES[state](zygote, state, fault)
            except Exception as error:
                error.add_note(f"{fault} in {state}")
                raise

    async with trio.open_nursery() as nursery:
        for state in STATES:
            nursery.start_soon(at, state)
    for state, it in seen.items():
        # Whatever the table says, this holds: before the switchover only an end of the source costs the guest.
        assert it.owner != "nobody" or fault in ("source killed", "source told to quit"), (state, it)
        assert LOST not in it.owner or state in ("head", "device", "completed"), (state, it)
        assert it.told or it.owner != "source" or state == "postcopy-device", (state, it)
    table = observed({state: seen[state] for state in STATES}, "state")
    if os.environ.get("VMM_WRITE_FAULTS") == "1":
        write(fault, table, MIGRATION_PAGE)
    assert table == written(fault, MIGRATION_PAGE)
