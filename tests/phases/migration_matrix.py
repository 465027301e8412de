"""The matrix of faults of a guest that is copied: each side meets each fault in each state, and it is seen what comes.

Each state lasts until something is done, so there is no clock in it. In `setup` nobody has connected yet; in `head` the
destination has not said yet that it is ready; `active` has no end, since hardly anything may be sent; in
`pre-switchover` the guest stands, and waits to be let go on; in `device` the destination has all of it, and has not
said so.
"""

from __future__ import annotations

import re
import signal
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from typing import TYPE_CHECKING, Any, Final, final

import attrs
import trio

from tests.phases.fault_matrix import Seen
from tests.phases.update_kit import Bench, Process, Ram, due, open_bench, outcome, ready
from vmm.qmp_client import CommandFailed

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from tests.phases.zygote import Zygote
    from vmm.qmp_client import QmpClient

STATES: Final = ("setup", "head", "active", "pre-switchover", "device", "completed")

FAULTS: Final = (
    "source killed", "source stalled", "source told to quit", "called off",
    "destination killed", "destination stalled", "destination told to quit",
)  # fmt: skip

GUEST: Final = ("-kernel", "builtin:heartbeat", "-append", "hz=250 region=64K pages=1", "-m", "16", "-nodefaults")
"""It writes no more than a socket takes though nobody reads from it."""

SLOW: Final = {"max-bandwidth": 4096}
FAST: Final = {"downtime-limit": 2_000_000, "max-bandwidth": 0}
LOST: Final = "nobody, or the source by `cont`"
"""Of a guest that has gone, and died where it went: it is whole where it came from."""

RACES: Final = {
    ("head", "destination told to quit"): ("source", LOST),
    ("device", "destination told to quit"): ("source", LOST),
}
"""Where a process that is woken has to do two things at a time: who can have the guest then."""


@final
@attrs.define(eq=False)
class Move:
    """A guest on its way from one process to another."""

    bench: Bench
    source: Process
    destination: Process
    here: QmpClient
    there: QmpClient
    uri: str
    aside: QmpClient | None = None
    """Another session of the source's, for what is not waited for."""

    def struck(self, fault: str) -> Process:
        """Return whom a fault strikes."""
        return self.destination if fault.startswith("destination") else self.source

    async def begin(self, *names: str, parameters: Mapping[str, int] = FAST) -> None:
        """Begin the migration, with these capabilities."""
        capabilities = [{"capability": name, "state": True} for name in ("events", *names)]
        await self.here.execute("migrate", uri=self.uri, capabilities=capabilities, parameters=parameters)

    async def says(self, status: str) -> dict[str, Any]:
        """Wait until the source says that the migration is in `status`."""
        async with due(f"status {status}"):
            while (info := await self.here.execute("query-migrate"))["status"] != status:
                assert info["status"] not in ("failed", "cancelled"), info
                await self.here.wait_event(lambda event: event["event"] == "MIGRATION")
        return dict(info)


@asynccontextmanager
async def move(zygote: Zygote) -> AsyncGenerator[Move, None]:
    """Start a machine whose guest ticks, and a destination that listens."""
    async with AsyncExitStack() as stack:
        bench = await stack.enter_async_context(open_bench(zygote.fork))
        source = bench.start(*GUEST, qmp=bench.qmp)
        uri = f"unix:{bench.folder}/main"
        destination = bench.start("-incoming", uri)
        here = await stack.enter_async_context(bench.session(source.qmp))
        there = await stack.enter_async_context(bench.session(destination.qmp))
        await ready(here)
        await bench.listening(destination)
        await ticks(source, 5)
        yield Move(bench, source, destination, here, there, uri)


async def reach(it: Move, state: str) -> None:
    """Bring the migration into `state`, in which it stays."""
    match state:
        case "head":
            await stop(it.destination)
            await it.begin()
            await it.says("active")
        case "active":
            await it.begin(parameters=SLOW)
            async with due("some of the RAM"):
                while not (await it.says("active"))["ram"]["transferred"]:  # noqa: ASYNC110 - what is sent is not told
                    await trio.sleep(0.005)
        case "pre-switchover":
            await it.begin("pause-before-switchover")
            await it.says("pre-switchover")
        case "device":
            await reach(it, "pre-switchover")
            await stop(it.destination)
            await it.here.execute("migrate-continue", state="pre-switchover")
            await it.says("device")
        case "completed":
            await it.begin()
            await it.says("completed")
            await runs(it.there)


async def stop(process: Process) -> None:
    """Stop a process, which then does nothing at all."""
    process.popen.send_signal(signal.SIGSTOP)
    await process.stopped()


async def observe(zygote: Zygote, state: str, fault: str) -> Seen:
    """Bring `fault` about in `state`, and see what comes of it. Fails where what never may happen does."""
    async with move(zygote) as it:
        await reach(it, state)
        seen = await settled(it, state, await strike(it, state, fault))
        await require_one_owner(it, seen)
        if seen.owner == "source":
            await migrate_again(it)
        if (state, fault) in RACES:
            assert seen.owner in RACES[state, fault], seen
            return Seen(" or ".join(RACES[state, fault]), "", "")
        return attrs.evolve(seen, told=without_names(seen.told, it))


async def strike(it: Move, state: str, fault: str) -> str:
    """Bring the fault about, and let go on whoever is not struck by it; return why `migrate` was refused, if it was."""
    struck = it.struck(fault)
    match fault.partition(" ")[2]:
        case "killed":
            struck.kill()
            await end_of(struck)
        case "stalled":
            if not (struck is it.destination and state in ("head", "device")):  # which is what the state is made of
                await stop(struck)
        case "told to quit":
            await (it.there if struck is it.destination else it.here).send("quit")
            struck.go_on()
            assert await end_of(struck) == 0
        case _:
            await it.here.execute("migrate_cancel")
    for process in (it.source, it.destination):
        process.go_on()
    return await go_on(it, state) if it.source.alive and state != "completed" else ""


async def go_on(it: Move, state: str) -> str:
    """Do what the migration waits for, if it does so still; return why it could not begin."""
    try:
        if state == "setup":
            await it.begin()
        elif state == "active":
            await it.here.execute("migrate-set-parameters", **FAST)
        elif state == "pre-switchover":
            await it.here.execute("migrate-continue", state="pre-switchover")
    except CommandFailed as error:
        return error.desc if state == "setup" else ""  # the others are over, and have their reason in query-migrate
    return ""


async def settled(it: Move, state: str, refused: str) -> Seen:
    """Wait until it is decided who has the guest."""
    if refused:
        return Seen("source", refused, "")
    if it.source.alive:
        info = await outcome(it.here)
        if info["status"] != "completed":
            if state != "head":  # which may not have been sent yet: then the destination listens on
                await end_of(it.destination)  # for want of a guest
            return Seen("source", info.get("error-desc", info["status"]), "")
        if not it.destination.alive:
            return Seen(LOST, "", "")
        await runs(it.there)
        return Seen("destination", "", "")
    if state == "completed":
        await runs(it.there)
        return Seen("destination", "", "")
    if state == "setup":
        assert (await it.there.execute("query-migrate"))["status"] == "setup"
        return Seen("nobody", "", "")  # the destination listens on
    if state == "head":  # which had come before the source's end or not: then the destination listens on
        async with due("a complaint"):
            while not it.destination.said():  # noqa: ASYNC110 - a file does not tell when it grows
                await trio.sleep(0.005)
        return Seen("nobody", "", "")
    assert await end_of(it.destination) == 1
    return Seen("nobody", it.destination.said()[-1], "")


async def end_of(process: Process) -> int:
    """Wait for the end of a process, which may have been seen already; return its exit status."""
    with suppress(ChildProcessError):
        await process.ended()
    status = process.popen.poll()
    assert status is not None
    return status


async def runs(client: QmpClient) -> None:
    """Wait until the guest runs."""
    async with due("the guest to run"):
        while (await client.execute("query-status"))["status"] != "running":
            await client.wait_event(lambda event: event["event"] == "RESUME")


async def require_one_owner(it: Move, seen: Seen) -> None:
    """The guest runs where it is said to, has missed nothing, and stands everywhere else."""
    owner, other = it.source, it.destination
    if seen.owner == "nobody":
        return
    if seen.owner == LOST:
        await it.here.execute("cont")
    elif seen.owner == "destination":
        owner, other = other, owner
    before = ticks_in(other)
    await ticks_on(owner)
    assert ticks_in(other) == before, "the guest runs twice"


def ticks_in(process: Process) -> int | None:
    """Return how often the guest has ticked by what is in a process's memory; None if there is none."""
    if not process.alive:
        return None
    try:
        with closing(Ram(process.pid)) as ram:
            report = ram._reader.look()
            return None if report is None else report.ticks
    except StopIteration:  # it has no memory for a guest
        return None


async def ticks(process: Process, count: int) -> None:
    """Wait until the guest has ticked so many times, with nothing lost."""
    with closing(Ram(process.pid)) as ram:
        async with due(f"{count} ticks"):
            while (report := ram._reader.look()) is None or report.ticks < count:  # noqa: ASYNC110 - it does not tell
                await trio.sleep(0.005)
        assert report.intact, str(report)


async def ticks_on(process: Process) -> None:
    """Wait until the guest has ticked some more."""
    await ticks(process, (ticks_in(process) or 0) + 5)


async def migrate_again(it: Move) -> None:
    """A guest can go once more, whatever the fault was."""
    uri = f"unix:{it.bench.folder}/again"
    third = it.bench.start("-incoming", uri)
    await it.bench.listening(third)
    it.here.events.clear()
    await it.here.execute("migrate", uri=uri, capabilities=[{"capability": "events", "state": True}], parameters=FAST)
    assert (await outcome(it.here))["status"] == "completed"
    async with it.bench.session(third.qmp) as client:
        await runs(client)
    await ticks_on(third)


def without_names(text: str, it: Move) -> str:
    """Return `text` without what is another at each run."""
    text = text.replace(f"{it.bench.folder}/", "").removeprefix("trio-vmm: ")
    return re.sub(r"\d+", "N", text)
