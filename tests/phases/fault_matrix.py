"""The matrix of faults: each side of a live update meets each fault at each of its steps; it is seen what comes of it.

A process stops itself at the step; the test, its parent, brings the fault about and wakes it. So there is no clock in
it, but the limits of time of whoever waits for one that stays stopped.
"""

from __future__ import annotations

import re
import signal
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from typing import TYPE_CHECKING, Final, final

import attrs
import trio

from tests.phases.conditions import (
    Condition,
    end_of_channel,
    full_disk,
    killed,
    no_descriptors,
    no_memory,
    no_passing,
    small_disk,
)
from tests.phases.update_kit import (
    OVER,
    Bench,
    Console,
    Process,
    Ram,
    answering_pid,
    due,
    hung_up,
    open_bench,
    outcome,
)
from vmm.qmp_client import CommandFailed, MonitorGone, QmpClient

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from pathlib import Path

    from tests.phases.update_kit import Child
    from tests.phases.zygote import Zygote

FAULTS: Final = (
    "killed", "stalled", "channel ended", "EMFILE", "ENOMEM", "ENOSPC", "ETOOMANYREFS", "told to quit", "SIGTERM",
    "called off",
)  # fmt: skip
"""What happens to the side that is at the step."""

ENDS: Final = ("killed", "told to quit", "SIGTERM")

NOT_YET: Final = frozenset({("source:begun", "channel ended")})
"""There is no channel."""

GUEST: Final = ("-kernel", "builtin:heartbeat", "-append", "hz=250 region=64K pages=1", "-m", "16")
"""Ten of them run at once."""

PATIENT: Final = "describing=600,building=600,loading=600,taking=600"
"""Limits of both sides, unless one is to be stalled: how long the test takes at a step changes nothing."""

LIMITS: Final = {
    "source:connected": "describing=0.5",
    "source:greeted": "describing=2",
    "destination:accepted": "building=6",
    "destination:greeted": "building=6",
    "destination:received": "building=6",
    "destination:described": "building=6",
    "destination:built": "building=6",
    "destination:paused": "loading=4",
    "destination:state-received": "loading=4",
    "destination:loaded": "taking=1",
    "destination:offer-seen": "taking=4",
    "destination:taken": "taking=4",
    "destination:running": "taking=4",
}
"""Limits of the other side, for a side that is stalled at a step. The side has come there before it is over."""

AT_REST: Final = {
    "source:connected": "accepted",
    "source:greeted": "greeted",
    "source:described": "built",
    "source:ready": "built",
    "source:main-connected": "built",
    "source:paused": "built",
    "source:state-sent": "loaded",
    "source:loaded": "loaded",
    "source:offered": "loaded",
    "source:given": "running",
    "destination:accepted": "connected",
    "destination:greeted": "described",
    "destination:received": "described",
    "destination:described": "described",
    "destination:built": "described",
    "destination:paused": "state-sent",
    "destination:state-received": "state-sent",
    "destination:loaded": "offered",
    "destination:offer-seen": "offered",
    "destination:taken": "offered",
    "destination:running": "offered",
}
"""The step at which the other side waits for the one that has stopped. It has come there before the fault strikes."""

UNDISTURBED: Final = ("source:given", "destination:taken", "destination:running")
"""Where the end of the channel changes nothing for the other side: the guest has gone over."""

SOON: Final = ("told to quit", "SIGTERM", "called off")
"""Faults that strike some turns of the loop later: at which step exactly is not told."""

EITHER: Final = {
    ("source", False): ("nobody", "destination"),
    ("source", True): ("source", "destination"),
    ("destination", False): ("source", "nobody"),
    ("destination", True): ("source", "destination"),
}
"""Who can have the guest where that is a race: the side, and whether it is called off there."""

RACES: Final = (
    "source:paused", "source:state-sent", "source:loaded",
    "destination:paused", "destination:state-received", "destination:loaded", "destination:offer-seen",
)  # fmt: skip
"""Steps at which one of `SOON` may come before the change of owner or after it."""

DECIDES: Final = ("source:connected", "source:greeted", "source:given")
"""Where the destination does not wait for a source that is stalled: it refuses it, or takes the guest."""


@final
@attrs.frozen
class Seen:
    """What came of a fault."""

    owner: str
    """Who has the guest in the end: `source`, `destination`, or `nobody`."""
    told: str
    """What the monitor says: of the source where it lives, else of the destination, else its last words."""
    step: str
    """The step that the monitor says the source reached, where it lives."""


@final
@attrs.define(eq=False)
class Pair:
    """A machine, and a destination that awaits it; one of them has stopped at the step."""

    bench: Bench
    console: Console
    source: Process
    destination: Process
    ram: Ram
    at_source: QmpClient
    at_destination: QmpClient
    other: QmpClient
    """Another session of who is at the step."""
    watch: QmpClient
    """Another session of who is not."""
    step: str
    replied: bool = False
    """Whether the reply to `migrate` has been read."""

    @property
    def side(self) -> str:
        """The side that is at the step."""
        return self.step.partition(":")[0]

    @property
    def struck(self) -> Process:
        """Who is at the step."""
        return self.source if self.side == "source" else self.destination


@asynccontextmanager
async def pair(zygote: Zygote, step: str, fault: str) -> AsyncGenerator[Pair, None]:
    """Begin an update, one side of which stops at `step`."""
    side = step.partition(":")[0]
    poor = fault == "ETOOMANYREFS"

    def spawn(arguments: Sequence[str], log: Path) -> Child:
        unprivileged = poor and f"{side}:" in " ".join(arguments)
        return zygote.fork(arguments, log, unprivileged=unprivileged)

    limits = LIMITS.get(step, PATIENT) if fault == "stalled" else PATIENT
    options: dict[str, tuple[str, ...]]
    options = {it: ("--x-cpr-limits", PATIENT if it == side else limits) for it in ("source", "destination")}
    options[side] += ("--x-cpr-stop-at", step)
    async with AsyncExitStack() as stack:
        bench = await stack.enter_async_context(open_bench(spawn))
        if fault == "ENOSPC":
            # Unmounted by the time that the folder is removed.
            stack.enter_context(small_disk(bench.folder))
            stack.callback(bench.close)
        console = bench.console()
        source = bench.machine(console, *options["source"], guest=GUEST)
        destination = bench.destination(*options["destination"])
        await bench.listening(destination)
        await console.beats(1)
        ram = stack.enter_context(closing(Ram(source.pid)))
        at_source = await stack.enter_async_context(bench.session(source.qmp))
        at_destination = await stack.enter_async_context(bench.session(destination.qmp))
        other = await stack.enter_async_context(bench.session((source if side == "source" else destination).qmp))
        watch = await stack.enter_async_context(bench.session((destination if side == "source" else source).qmp))
        made = Pair(bench, console, source, destination, ram, at_source, at_destination, other, watch, step)
        await at_source.execute("migrate-set-parameters", mode="cpr-transfer")
        events = [{"capability": "events", "state": True}]
        await at_source.execute("migrate-set-capabilities", capabilities=events)
        await at_source.send("migrate", channels=bench.channels(destination))
        await made.struck.stopped()
        yield made


async def observe(zygote: Zygote, step: str, fault: str) -> Seen:
    """Bring `fault` about at `step`, and see what comes of it. Fails where what never may happen does."""
    async with pair(zygote, step, fault) as made:
        await other_at_rest(made)
        condition = await strike(made, step, fault)
        if fault == "stalled":
            late = await stall(made, step)
            if late is not None:
                return attrs.evolve(late, told=without_names(late.told, made))
        elif fault == "channel ended":
            await noticed(made)
            made.struck.go_on()
        elif fault != "killed":
            made.struck.go_on()
        seen = await settled(made)
        if fault in ("told to quit", "SIGTERM"):
            if made.struck.alive:
                await made.struck.ended()
            assert made.struck.popen.poll() == 0
            if seen.owner == made.side:
                seen = attrs.evolve(seen, owner="nobody")
        condition.lift()
        await require_one_owner(made, seen)
        if seen.owner != "nobody" and fault not in ENDS:
            await update_again(made, seen.owner)
        seen = attrs.evolve(seen, told=without_names(seen.told, made))
        return as_a_class(seen, step, fault) if fault in SOON else seen


def as_a_class(seen: Seen, step: str, fault: str) -> Seen:
    """Return what is the same at each run of a fault that strikes soon."""
    if step in RACES or (step, fault) == ("source:begun", "called off"):  # which `migrate` may not have answered yet
        possible = EITHER[step.partition(":")[0], fault == "called off"]
        assert seen.owner in possible, seen
        return Seen(" or ".join(possible), "", "")
    if seen.owner == "nobody" and step.startswith("destination:"):
        return Seen("nobody", "", "")  # It may have said before its end that it runs the guest.
    return Seen(seen.owner, re.sub(r" at step '[^']*'", "", seen.told), "")


async def other_at_rest(made: Pair) -> None:
    """Wait until the side that has not stopped waits for the one that has."""
    due_step = AT_REST.get(made.step)
    if due_step is None:
        return
    async with due(f"the other side at {due_step}"):
        while True:
            with suppress(CommandFailed):  # Its phase has ended just now.
                if (await made.watch.execute("query-migrate")).get("x-step") == due_step:
                    return
            await trio.sleep(0.01)


async def noticed(made: Pair) -> None:
    """Wait until the side that has not stopped has noticed the end of the channel.

    Else it is a race which of the two is at the cell first, the other that gives up or the one that wakes.
    """
    if made.step in UNDISTURBED:
        return
    if made.step == "source:offered":
        async with due("the destination to take the guest"):
            while True:
                with suppress(CommandFailed):  # Its phase has ended just now.
                    if (await made.watch.execute("query-migrate")).get("x-step") == "running":
                        return
                await trio.sleep(0.01)
    if made.side == "source":
        await quiet(made.destination)
        return
    async with due("the source to notice"):
        while (await made.watch.execute("query-migrate"))["status"] not in OVER:  # noqa: ASYNC110 - it has phases to leave
            await trio.sleep(0.01)


def without_names(text: str, made: Pair) -> str:
    """Return `text` without what is another at each run."""
    text = text.replace(f"{made.bench.folder}/", "").removeprefix("trio-vmm: ")
    text = re.sub(r"cancelled by [^\s]+", "cancelled by SESSION", text)
    return re.sub(r"\b\d+ descriptors cannot", "N descriptors cannot", text)


async def strike(made: Pair, step: str, fault: str) -> Condition:
    struck = made.struck
    match fault:
        case "killed":
            return killed(struck)
        case "channel ended":
            cpr = made.bench.channels(made.destination)[1]["addr"]["path"]
            return end_of_channel(struck, cpr)
        case "EMFILE":
            return no_descriptors(struck)
        case "ENOMEM":
            return no_memory(struck)
        case "ENOSPC":
            return full_disk(made.bench.folder)
        case "ETOOMANYREFS":
            return no_passing(struck)
        case "told to quit":
            await made.other.send("quit")  # It waits in the socket.
        case "SIGTERM":
            struck.popen.send_signal(signal.SIGTERM)
        case "called off":
            await made.other.send("migrate_cancel")
    return Condition()


async def stall(made: Pair, step: str) -> Seen | None:
    """Wake who stalls once the other side has decided; where that moved on, once a second attempt has completed.

    Return what was seen if there was such an attempt.
    """
    if made.side == "source" and step not in DECIDES:
        made.source.go_on()  # It owns the guest, which stands with it, and the other side waits for it.
        return None
    if step == "destination:taken":
        # The guest is the destination's: for the source to wait, however long it takes.
        await made.at_source.reply("migrate")
        made.replied = True
        async with due("the offer's time to be over"):
            while (await made.at_source.execute("query-migrate"))["x-step"] != "offered":  # noqa: ASYNC110 - no event
                await trio.sleep(0.01)
        made.destination.go_on()
        return None
    if step == "destination:running":
        made.destination.go_on()
        return None
    if step in ("source:connected", "source:greeted"):
        async with due("the destination to give up"):
            while not made.destination.said():  # noqa: ASYNC110 - a file does not tell when it grows
                await trio.sleep(0.01)
        made.source.go_on()
        return None
    if made.side == "destination":
        seen = await settled(made)
        await require_one_owner(made, seen)
    else:
        await completed(made.at_destination)
        seen = Seen("destination", "", "")
    third = await update_again(made, seen.owner)
    # What it wakes to: another process has what it knew of, by another hand-over.
    path = made.bench.folder / "machine"
    before = path.stat().st_ino
    made.struck.go_on()
    if made.side == "source":
        info = await outcome(made.at_source)
        seen = Seen("destination", info.get("error-desc", ""), info["x-step"])
        assert (await made.at_source.execute("query-status"))["status"] == "postmigrate"
    elif seen.owner == "source":
        await quiet(made.destination)
    await made.console.new_beats(2)
    made.ram.require_intact()
    assert await answering_pid(made.bench.qmp) == third.pid
    assert path.stat().st_ino == before
    return seen


async def quiet(process: Process) -> None:
    """Wait until a destination that lost has said so: it has ended then, or awaits the next source."""
    async with due("last words"):
        while process.alive and not process.said():  # noqa: ASYNC110 - a file does not tell when it grows
            await trio.sleep(0.01)


async def completed(client: QmpClient) -> None:
    async with due("the destination to have the guest"):
        while (await client.execute("query-migrate"))["status"] != "completed":  # noqa: ASYNC110 - it has no events
            await trio.sleep(0.01)


async def settled(made: Pair) -> Seen:
    """Wait until it is decided who has the guest."""
    if made.source.alive:
        try:
            return await settled_at_source(made.at_source, replied=made.replied)
        except MonitorGone:
            await made.source.ended()
    if made.step == "source:begun":
        return Seen("nobody", "", "")  # Of which no other process has heard.
    # A destination that finds an offer takes it. One that does not ends, or awaits the next source.
    with suppress(MonitorGone):
        async with due("the destination to know"):
            while not made.destination.said():
                with suppress(CommandFailed):  # It is about to end.
                    if (await made.at_destination.execute("query-migrate"))["status"] == "completed":
                        return Seen("destination", "", "")
                await trio.sleep(0.01)
    await quiet(made.destination)
    return Seen("nobody", made.destination.said()[-1], "")


async def settled_at_source(client: QmpClient, *, replied: bool = False) -> Seen:
    """Return what a source that lives says of it in the end. Raises `MonitorGone`."""
    try:
        if not replied:
            async with due("the reply to migrate"):
                await client.reply("migrate")
    except CommandFailed as error:
        if "was cut short" not in error.desc:
            return Seen("source", error.desc, "")
        await hung_up(client)
        raise MonitorGone(path="of a source that ends") from error
    try:
        info = await outcome(client)
    except CommandFailed as error:
        # It is at its end, and has unwound most of its phases.
        await hung_up(client)
        raise MonitorGone(path="of a source that ends") from error
    told = info.get("error-desc", "cancelled" if info["status"] == "cancelled" else "")
    lost = "nobody" if told else "destination"
    return Seen(lost if "x-pause" in info else "source", told, info["x-step"])


async def require_one_owner(made: Pair, seen: Seen) -> None:
    """The guest runs where it is said to, and has missed nothing; its monitor answers there, and nowhere else."""
    if seen.owner == "nobody":
        await made.console.ended()
        ticks = made.ram.look().ticks
        assert made.ram.look().ticks == ticks
        return
    owner = made.source if seen.owner == "source" else made.destination
    await made.console.new_beats(2)
    made.ram.require_intact()
    assert await answering_pid(made.bench.qmp) == owner.pid


async def update_again(made: Pair, owner: str) -> Process:
    """A guest can move again, whatever the fault was, with a new destination and a new cell."""
    third = made.bench.destination()
    await made.bench.listening(third)
    async with made.bench.session(made.bench.qmp) as client:
        await client.execute("migrate-set-parameters", mode="cpr-transfer")
        await client.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        await client.send("migrate", channels=made.bench.channels(third))
        if owner == made.side == "source":
            await made.source.stopped()  # It does so in each attempt.
            made.source.go_on()
        seen = await settled_at_source(client)
        assert (seen.owner, seen.told) == ("destination", ""), seen
    await made.console.new_beats(2)
    made.ram.require_intact()
    assert await answering_pid(made.bench.qmp) == third.pid
    return third
