"""The ownership protocol, every interleaving of it; and that the model of it is one of the real code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast, final

import pytest
import trio
import trio.testing

from tests.cpr.model import DESTINATION, MUTANTS, SOURCE, Broken, Explored, Rules, explore
from vmm.cpr.cell import Owner
from vmm.cpr.channel import Message
from vmm.cpr.handover import give, take
from vmm.cpr.steps import Steps
from vmm.errors import CprError, CprPeerGone, CprRefused

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.cpr.model import Table


def test_there_are_never_two_owners_and_one_is_always_reached() -> None:
    # As docs/live-update.md says. Another number is another protocol, or another model of it.
    assert explore(Rules()) == Explored(states=30679, steps=89450)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_protocol_that_is_wrong_is_found_out(mutant: str) -> None:
    with pytest.raises(Broken) as caught:
        explore(Rules(mutant))
    assert str(caught.value).startswith(f"{MUTANTS[mutant]}: 0: begins an attempt; ")


# --- the tables and the code ------------------------------------------------------------------------------------

Path = tuple[tuple[str, object], ...]
ROUNDS: Final = 3
"""How often a path may come by one place: a source that watches goes in a circle."""


def paths(table: Table, place: str, been: Mapping[str, int]) -> Iterator[tuple[Path, str]]:
    """Yield each way through `table` from `place`: what is done, with its result, and where it ends."""
    if place not in table:
        yield (), place
        return
    if been.get(place, 0) == ROUNDS:
        return
    what, leads = table[place]
    for result, following in leads.items():
        for rest, end in paths(table, following, {**been, place: been.get(place, 0) + 1}):
            yield ((what, result), *rest), end


@final
class Stage:
    """Stands for cell, token and channel, and lets what is done with them have the results of one path."""

    side, peer = "source", "destination"

    def __init__(self, path: Path) -> None:
        self._left = list(path)

    def _done(self, what: str) -> Any:
        assert self._left, f"{what} comes after the end"
        due, result = self._left.pop(0)
        assert what == due
        return result

    def require_over(self) -> None:
        """Fail if the path goes on."""
        assert not self._left

    def offer(self) -> None:
        self._done("offer")

    def take_back(self) -> object:
        return self._done("take_back")

    def reclaim(self) -> object:
        return self._done("reclaim")

    def take(self) -> object:
        return self._done("take")

    def run(self) -> object:
        return self._done("run")

    @property
    def owner(self) -> Owner:
        return Owner.RUNNING if self._done("owner") else Owner.TAKEN

    def peer_is_dead(self) -> object:
        return self._done("peer_is_dead")

    async def peer_died(self) -> None:
        await trio.sleep_forever()

    async def send(self, kind: str, body: object) -> None:
        await self._come(self._done(f"send {kind}"))

    async def receive(self, kind: str) -> Message:
        await self._come(self._done(f"receive {kind}"))
        return Message(kind, {})

    async def _come(self, result: str) -> None:
        await trio.lowlevel.checkpoint()
        match result:
            case "late":
                await trio.sleep_forever()
            case "closed":
                raise CprPeerGone(peer=self.peer, what="closed the channel", step="a test", outcome="so be it")
            case "refused":
                raise CprRefused(side=self.peer, step="a test", reason="so be it")


async def gives(stage: Stage) -> str:
    part = cast("Any", stage)
    try:
        await give(part, part, part, Steps("source"), within=1)
    except CprError:
        return "kept"
    return "given"


async def takes(stage: Stage) -> str:
    part = cast("Any", stage)
    try:
        await take(part, part, Steps("destination"))
    except CprError:
        return "ended"
    return "owns"


@pytest.mark.parametrize(
    ("table", "first", "act", "count"), [(SOURCE, "offer", gives, 91), (DESTINATION, "await offer", takes, 9)]
)
def test_the_model_does_what_the_code_does(table: Table, first: str, act: Any, count: int) -> None:
    found = list(paths(table, first, {}))
    assert len(found) == count
    for path, end in found:
        stage = Stage(path)
        assert trio.run(act, stage, clock=trio.testing.MockClock(autojump_threshold=0)) == end, path
        stage.require_over()
