"""Each side is killed, stalled, told to quit or called off at each named step of the hand-over.

A process stops itself at a step (`--x-cpr-stop-at`). So there is no clock in it: its parent, the test, sees it stop and
does to it what it likes, and the other side reacts.
"""

from __future__ import annotations

import signal
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Final, Literal, final

import attrs
import pytest

from tests.phases.update_kit import (
    Bench,
    Console,
    Process,
    Ram,
    answering_pid,
    begin_update,
    due,
    hung_up,
    open_bench,
    outcome,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from vmm.qmp_client import QmpClient

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

Side = Literal["source", "destination"]

SOURCE_STEPS: Final = ("connected", "described", "ready", "paused", "state-sent", "loaded", "offered", "given")
DESTINATION_STEPS: Final = (
    "accepted", "described", "built", "state-received", "loaded", "offer-seen", "taken", "running",
)  # fmt: skip


@final
@attrs.frozen
class Fate:
    """What must come of a fault."""

    owner: Side | None
    """Who has the guest in the end; None if its owner died with it."""
    monitor: str = ""
    """What `query-migrate` on the source says went wrong; empty for a hand-over that completed."""
    last_words: str = ""
    """What a destination that ends says on standard error; it then ends with exit status 1. With OR: it builds
    meanwhile, and may find out either way."""
    waits: str = ""
    """What one says that goes on waiting for a source."""


def broke(text: str) -> str:
    return f"trio-vmm: {text}"


CLOSED: Final = "The source closed the channel at step {!r}; nothing was taken over"
STAYS: Final = "The destination closed the channel at step {!r}; the guest stays where it was"

KILLED: Final = {
    "source:connected": Fate(None, waits=CLOSED.format("hello")),
    "source:described": Fate(None, last_words=f"{CLOSED.format('building')} OR {CLOSED.format('loading')}"),
    "source:ready": Fate(None, last_words=CLOSED.format("loading")),
    "source:paused": Fate(None, last_words=CLOSED.format("loading")),
    "source:state-sent": Fate(None, last_words=CLOSED.format("loading")),
    "source:loaded": Fate(None, last_words=CLOSED.format("loading")),
    # An offer stands, whoever dies after making it.
    "source:offered": Fate("destination"),
    "source:given": Fate("destination"),
    "destination:accepted": Fate("source", STAYS.format("hello")),
    "destination:described": Fate("source", STAYS.format("building")),
    "destination:built": Fate("source", STAYS.format("building")),
    "destination:state-received": Fate("source", STAYS.format("loading")),
    "destination:loaded": Fate("source", STAYS.format("handing over")),
    "destination:offer-seen": Fate("source", STAYS.format("handing over")),
    "destination:taken": Fate(
        "source",
        "The destination died after it took the guest and before it ran it at step 'offered'; "
        "the guest goes on in the source",
    ),
    "destination:running": Fate(
        None,
        "The destination died when it had begun to run the guest at step 'offered'; the guest died with it",
    ),
}

NO_ANSWER: Final = "The destination did not answer within 3 s at step {!r}; the guest was not paused"
NOT_LOADED: Final = (
    "The destination did not load the state within 1 s at step 'state-sent'; the guest goes on in the source"
)
NOT_TAKEN: Final = (
    "The destination did not take the guest within 1 s at step 'offered'; the guest goes on in the source"
)
REFUSED: Final = "Live update refused by the source at step {!r}: {}"
TAKEN_BACK: Final = "The source took the guest back at step 'offer-seen'; nothing was taken over"
SILENT: Final = (
    "Live update refused by the destination at step 'hello': the source did not describe its machine within 0.4 s"
)

LIMITS: Final = {
    "source:connected": "describing=0.4",
    "destination:accepted": "building=3",
    "destination:described": "building=3",
    "destination:built": "building=3",
    "destination:state-received": "loading=1",
    "destination:loaded": "taking=1",
    "destination:offer-seen": "taking=1",
    "destination:running": "taking=1",
}
"""Limits of the other side, for a side that is stalled at a step."""

STALLED: Final = {
    "source:connected": Fate("source", SILENT, waits=SILENT),
    "source:described": Fate("destination"),
    "source:ready": Fate("destination"),
    "source:paused": Fate("destination"),
    "source:state-sent": Fate("destination"),
    "source:loaded": Fate("destination"),
    "source:offered": Fate("destination"),
    "source:given": Fate("destination"),
    "destination:accepted": Fate(
        "source", NO_ANSWER.format("hello"), waits=REFUSED.format("hello", NO_ANSWER.format("hello"))
    ),
    "destination:described": Fate(
        "source", NO_ANSWER.format("building"), REFUSED.format("building", NO_ANSWER.format("building"))
    ),
    "destination:built": Fate(
        "source", NO_ANSWER.format("building"), REFUSED.format("building", NO_ANSWER.format("building"))
    ),
    "destination:state-received": Fate("source", NOT_LOADED, REFUSED.format("loading", NOT_LOADED)),
    "destination:loaded": Fate("source", NOT_TAKEN, TAKEN_BACK),
    "destination:offer-seen": Fate("source", NOT_TAKEN, TAKEN_BACK),
    # From here on it owns the guest, and goes on when it wakes.
    "destination:taken": Fate("destination"),
    "destination:running": Fate("destination"),
}


@final
@attrs.frozen
class Pair:
    """A machine, and a destination that awaits it; one of them will stop at a step."""

    bench: Bench
    console: Console
    source: Process
    destination: Process
    ram: Ram
    stopping: Process
    client: QmpClient
    """A session of the source."""
    destination_client: QmpClient


@asynccontextmanager
async def pair(step: str, *, limits: str = "") -> AsyncGenerator[Pair, None]:
    """Begin an update, one side of which stops at `step`; `limits` are for the other side."""
    side = step.partition(":")[0]
    async with open_bench() as bench:
        console = bench.console()
        options = {side: ("--x-cpr-stop-at", step)}
        usual = ("--x-cpr-limits", limits) if limits else ()
        source = bench.machine(console, *options.get("source", usual))
        destination = bench.destination(*options.get("destination", usual))
        await bench.listening(destination)
        await console.beats(1)
        stopping = source if side == "source" else destination
        with closing(Ram(source.pid)) as ram:
            async with bench.session(source.qmp) as client, bench.session(destination.qmp) as destination_client:
                await start_stopping(bench, client, destination, stopping)
                yield Pair(bench, console, source, destination, ram, stopping, client, destination_client)


async def start_stopping(bench: Bench, client: QmpClient, destination: Process, stopping: Process) -> None:
    await client.execute("migrate-set-parameters", mode="cpr-transfer")
    await client.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    client.events.clear()
    # Its reply comes when the source has connected and phase migrating is open: not if it stops before that.
    await client.send("migrate", channels=bench.channels(destination))
    await stopping.stopped()


async def require(pair: Pair, fate: Fate, dead: Process | None) -> None:
    """Check that the fault had this fate, and that nothing else came of it."""
    source, destination, client = pair.source, pair.destination, pair.client
    alive = [process for process in (source, destination) if process is not dead]
    if source in alive:
        info = await outcome(client)
        assert (info["status"], info.get("error-desc", "")) == (
            ("failed", fate.monitor) if fate.monitor else ("completed", "")
        )
    if destination in alive:
        if fate.last_words:
            assert await destination.ended() == 1
            (line,) = destination.said()
            assert line in [broke(words) for words in fate.last_words.split(" OR ")]
        elif fate.waits:
            await destination.says(broke(fate.waits))
            async with pair.bench.session(destination.qmp) as waiting:
                assert (await waiting.execute("query-migrate"))["status"] == "setup"
                assert (await waiting.execute("query-status"))["status"] == "prelaunch"
        else:
            assert fate.owner == "destination"
            assert destination.said() == []
    match fate.owner:
        case "source":
            owner = source
            assert (await client.execute("query-status")) == {"running": True, "status": "running"}
        case "destination":
            owner = destination
            if source in alive:
                await require_given_away(client)
        case None:
            await require_no_guest(pair, alive)
            return
    await pair.console.new_beats(3)
    pair.ram.require_intact()
    assert await answering_pid(pair.bench.qmp) == owner.pid
    if owner is destination:
        await require_update_again(pair)


async def require_given_away(client: QmpClient) -> None:
    """The source answers its old sessions, and can do nothing to the guest."""
    assert (await client.execute("query-status")) == {"running": False, "status": "postmigrate"}
    (cpu,) = await client.execute("query-cpus-fast")
    assert cpu["thread-id"] == 0
    for command in ("cont", "system_reset", "stop"):
        with pytest.raises(Exception, match="needs may-run-vcpus"):
            await client.execute(command)


async def require_no_guest(pair: Pair, alive: list[Process]) -> None:
    """Its owner died with it: nobody runs it, prints for it or answers for it."""
    if pair.source in alive:  # and the destination had it
        await require_given_away(pair.client)
        await pair.client.send("quit")
        assert await pair.source.ended() == 0
    await pair.console.ended()
    ticks = pair.ram.look().ticks
    assert pair.ram.look().ticks == ticks
    with pytest.raises(Exception, match="is a machine running with"):
        await answering_pid(pair.bench.qmp)


async def require_update_again(pair: Pair) -> None:
    """A guest that has moved can move again: whatever the fault was, it is over."""
    third = pair.bench.destination()
    await pair.bench.listening(third)
    async with pair.bench.session(pair.bench.qmp) as client:
        await begin_update(client, pair.bench.channels(third))
        assert (await outcome(client))["status"] == "completed"
    await pair.console.beats(2)
    pair.ram.require_intact()
    assert await answering_pid(pair.bench.qmp) == third.pid


@pytest.mark.parametrize("step", KILLED)
async def test_a_side_that_is_killed_at_a_step_costs_no_more_than_what_it_owned(step: str) -> None:
    async with pair(step) as made:
        made.stopping.kill()
        await made.stopping.ended()
        await require(made, KILLED[step], made.stopping)


@pytest.mark.parametrize("step", [f"source:{step}" for step in SOURCE_STEPS])
async def test_a_source_that_stalls_at_a_step_goes_on_when_it_wakes(step: str) -> None:
    async with pair(step, limits=LIMITS.get(step, "")) as made:
        fate = STALLED[step]
        if fate.waits:
            await made.destination.says(broke(fate.waits))
        elif step == "source:given":
            # The new owner does not wait for anybody.
            await made.console.new_beats(3)
        made.source.go_on()
        await require(made, fate, None)


@pytest.mark.parametrize("step", [f"destination:{step}" for step in DESTINATION_STEPS])
async def test_a_destination_that_stalls_at_a_step_finds_out_what_has_become_of_the_guest(step: str) -> None:
    async with pair(step, limits=LIMITS.get(step, "")) as made:
        fate = STALLED[step]
        if fate.owner == "source":
            # The source has decided, and goes on; the destination wakes to find that it lost.
            assert (await outcome(made.client))["status"] == "failed"
            await made.console.beats(3)
        elif step == "destination:running":
            assert (await outcome(made.client))["status"] == "completed"
        else:
            # Taken: for the source to wait, however long it takes.
            async with due("the guest to be given"):
                while (await made.client.execute("query-machine-phase")).get("phase") != "machine-ready":
                    pass
            assert (await made.client.execute("query-status"))["status"] == "finish-migrate"
        made.destination.go_on()
        await require(made, fate, None)


@pytest.mark.parametrize("how", ["quit", "SIGTERM"])
@pytest.mark.parametrize("step", [f"source:{step}" for step in SOURCE_STEPS])
async def test_a_source_that_is_told_to_end_at_a_step_ends_and_takes_no_more_with_it_than_it_owned(
    step: str, how: str
) -> None:
    async with pair(step) as made:
        if how == "quit":
            await made.client.send("quit")  # It is stopped: the command waits in the socket until it wakes.
        else:
            made.source.popen.send_signal(signal.SIGTERM)
        made.source.go_on()
        assert await made.source.ended() == 0
        assert made.source.said() == []
        if await made.console.goes_on():
            assert step in ("source:state-sent", "source:loaded", "source:offered", "source:given")
            await made.console.beats(2)
            made.ram.require_intact()
            assert await answering_pid(made.bench.qmp) == made.destination.pid
            assert made.destination.said() == []
            return
        assert step not in ("source:offered", "source:given")
        assert not made.bench.is_there(made.bench.qmp)
        if step == "source:connected":
            async with made.bench.session(made.destination.qmp) as waiting:
                assert (await waiting.execute("query-migrate"))["status"] == "setup"
        else:
            assert await made.destination.ended() == 1
        (line,) = made.destination.said()
        assert line.startswith(broke("The source closed the channel at step "))


@pytest.mark.parametrize("how", ["quit", "SIGTERM"])
@pytest.mark.parametrize("step", [f"destination:{step}" for step in DESTINATION_STEPS])
async def test_a_destination_that_is_told_to_end_at_a_step_ends_and_takes_no_more_with_it_than_it_owned(
    step: str, how: str
) -> None:
    async with pair(step) as made:
        if how == "quit":
            await made.destination_client.send("quit")
        else:
            made.destination.popen.send_signal(signal.SIGTERM)
        made.destination.go_on()
        assert await made.destination.ended() == 0
        assert made.destination.said() == []
        info = await outcome(made.client)
        if (await made.client.execute("query-status"))["status"] == "postmigrate":
            # It took the guest before it heard of its end, or had it.
            assert step not in ("destination:accepted", "destination:described", "destination:built")
            lost = "The destination died when it had begun to run the guest at step 'offered'; the guest died with it"
            assert info.get("error-desc", lost) == lost
            assert not await made.console.goes_on()
            await require_given_away(made.client)
            assert not made.bench.is_there(made.bench.qmp)
            return
        assert step not in ("destination:taken", "destination:running")
        assert info["status"] == "failed"
        assert info["error-desc"].startswith("The destination closed the channel at step ")
        assert (await made.client.execute("query-status"))["status"] == "running"
        await made.console.new_beats(3)
        made.ram.require_intact()
        assert await answering_pid(made.bench.qmp) == made.source.pid


@pytest.mark.parametrize("step", [f"source:{step}" for step in SOURCE_STEPS if step != "connected"])
async def test_an_update_that_is_called_off_at_a_step_has_one_owner(step: str) -> None:
    async with pair(step) as made:
        await made.client.send("migrate_cancel")
        made.source.go_on()
        info = await outcome(made.client)
        if info["status"] == "completed":
            owner = made.destination
            await require_given_away(made.client)
        else:
            assert info["status"] == "cancelled"
            owner = made.source
            assert (await made.client.execute("query-status"))["status"] == "running"
            assert await made.destination.ended() == 1
            (line,) = made.destination.said()
            assert line.startswith(broke("Live update refused by the source at step "))
            assert ": The migration was cancelled by compat_monitor0/" in line or "qmp_compat_monitor0/" in line
        await made.console.new_beats(3)
        made.ram.require_intact()
        assert await answering_pid(made.bench.qmp) == owner.pid


@pytest.mark.parametrize("step", [f"destination:{step}" for step in DESTINATION_STEPS])
async def test_an_update_that_the_destination_calls_off_at_a_step_has_one_owner(step: str) -> None:
    async with pair(step) as made:
        await made.destination_client.send("migrate_cancel")
        made.destination.go_on()
        info = await outcome(made.client)
        if info["status"] == "completed":
            assert step in ("destination:loaded", "destination:offer-seen", "destination:taken", "destination:running")
            owner = made.destination
            await require_given_away(made.client)
            assert await made.destination_client.reply("migrate_cancel") == {}
        else:
            owner = made.source
            assert info["status"] == "failed"
            assert info["error-desc"].startswith("Live update refused by the destination at step '")
            assert ": The migration was cancelled by " in info["error-desc"]
            assert info["x-step"] in ("connected", "described", "state-sent", "offered")
            assert (await made.client.execute("query-status"))["status"] == "running"
            if step == "destination:accepted":
                async with made.bench.session(made.destination.qmp) as waiting:
                    assert (await waiting.execute("query-migrate"))["status"] == "setup"
            else:
                assert await made.destination.ended() == 1
            (line,) = made.destination.said()
            assert "The migration was cancelled by " in line
        await made.console.new_beats(3)
        made.ram.require_intact()
        assert await answering_pid(made.bench.qmp) == owner.pid


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
        assert source.said() == [f"trio-vmm: {KILLED['destination:running'].monitor}"]
