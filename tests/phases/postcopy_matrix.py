"""The matrix of faults of a guest that runs at its destination while some of its RAM is at the source (postcopy).

Here too each state lasts until something is done: what nobody asks for is not sent, since hardly anything may be, and
the guest goes over its RAM so slowly that it lacks pages for longer than any test takes.

The destination's memory is looked at by reading its file, which leaves a page that is lacking where it is; to map it
would put zeros there.
"""

from __future__ import annotations

import os
import signal
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
import pytest
import trio

from tests.phases.fault_matrix import Seen
from tests.phases.migration_matrix import Move, end_of, runs, without_names
from tests.phases.update_kit import Process, descriptors_in, due, open_bench, outcome, ready
from vmm.guests.heartbeat import HeartbeatReader, read_header
from vmm.qmp_client import CommandFailed

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator, Iterator

    from tests.phases.zygote import Zygote
    from vmm.qmp_client import QmpClient

STATES: Final = (
    "postcopy-device", "postcopy-active", "postcopy-paused", "postcopy-recover-setup", "postcopy-recover",
)  # fmt: skip
WAITS: Final = "destination, where it waits for pages"
TORN: Final = "nobody: half of it is gone"
"""Of a guest that was in two processes when one of them died."""

GUEST: Final = ("-kernel", "builtin:heartbeat", "-append", "region=8M hz=100 pages=1", "-m", "16", "-nodefaults")
"""It looks at a hundred pages a second, all of which it has not seen before."""
SLOW: Final = {"max-bandwidth": 4096, "max-postcopy-bandwidth": 1}
FILLED: Final = (*range(0x180, 0x200), *range(0x201, 0x300), *range(0xB00, 0x1000))
"""Numbers of pages that the guest leaves alone, below and above those that it uses: more than are sent before the limit
holds, which on each new connection are up to 128."""
PAGE: Final = 4096


@asynccontextmanager
async def move(zygote: Zygote) -> AsyncGenerator[Move, None]:
    """Start a machine whose guest ticks, and a destination that says how long a vCPU has waited for pages."""
    async with AsyncExitStack() as stack:
        bench = await stack.enter_async_context(open_bench(zygote.fork))
        source = bench.start(*GUEST, qmp=bench.qmp)
        destination = bench.start("-incoming", "defer")
        here = await stack.enter_async_context(bench.session(source.qmp))
        aside = await stack.enter_async_context(bench.session(source.qmp))
        there = await stack.enter_async_context(bench.session(destination.qmp))
        uri = f"unix:{bench.folder}/main"
        await there.execute("migrate-set-capabilities", capabilities=on("events", "postcopy-blocktime"))
        await there.execute("migrate-incoming", uri=uri)
        await ready(here)
        with ram(source, os.O_RDWR) as fd:
            for page in FILLED:
                os.pwrite(fd, content(page), page * PAGE)
        yield Move(bench, source, destination, here, there, uri, aside)


def on(*names: str) -> list[dict[str, Any]]:
    """Return capabilities that are set."""
    return [{"capability": name, "state": True} for name in names]


def content(page: int) -> bytes:
    """Return what a page is filled with."""
    return page.to_bytes(2, "little") * (PAGE // 2)


@contextmanager
def ram(process: Process, how: int = os.O_RDONLY) -> Generator[int, None, None]:
    """Open the file that a process's guest has as its memory."""
    fd = os.open(next(path for path, target in descriptors_in(process.pid) if target.startswith("/memfd:ram")), how)
    try:
        yield fd
    finally:
        os.close(fd)


def ticks_in(process: Process) -> int:
    """Return how often the guest has ticked by what is in a process's memory."""
    with ram(process) as fd:
        header = read_header(lambda address, size: os.pread(fd, size, address))
        return 0 if header is None else header.head


async def until(what: str, holds: Callable[[], bool]) -> None:
    """Wait until something holds that nobody tells of."""
    async with due(what):
        while not holds():  # noqa: ASYNC110
            await trio.sleep(0.005)


async def stop(process: Process) -> None:
    """Stop a process. A vCPU that waits for a page stops only once it has that, so that is not waited for."""
    process.popen.send_signal(signal.SIGSTOP)
    await until(f"the stop of process {process.pid}", lambda: set(states_in(process)) == {"T"})


def states_in(process: Process) -> Iterator[str]:
    """Yield the state of each thread of a process but the vCPUs and KVM's own."""
    for path in Path(f"/proc/{process.pid}/task").glob("*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            name, _, rest = path.read_text().partition("(")[2].rpartition(")")
            if not name.startswith(("vcpu", "kvm")):
                yield rest.split()[0]


async def says(client: QmpClient, status: str) -> dict[str, Any]:
    """Wait until a side says that the migration is in `status`."""
    async with due(f"status {status}"):
        while (info := await client.execute("query-migrate"))["status"] != status:
            assert info["status"] not in ("failed", "cancelled"), info
            await client.wait_event(lambda event: event["event"] == "MIGRATION")
    return dict(info)


async def reach(it: Move, state: str) -> None:
    """Bring the migration into `state`, in which it stays."""
    match state:
        case "postcopy-device":
            await it.begin("postcopy-ram", parameters=SLOW)
            await says(it.here, "active")
            await until("some of the RAM", lambda: sent(it))
            await stop(it.destination)
            await it.here.execute("migrate-start-postcopy")
            await says(it.here, state)
        case "postcopy-active":
            await it.begin("postcopy-ram", parameters=SLOW)
            await says(it.here, "active")
            await it.here.execute("migrate-start-postcopy")
            await says(it.here, state)
            await says(it.there, state)
            await runs(it.there)
            # Until then nobody can tell the guest here from the guest there.
            gone = ticks_in(it.source)
            await until("ticks there", lambda: ticks_in(it.destination) > gone)
        case "postcopy-paused":
            await reach(it, "postcopy-active")
            await it.here.execute("migrate-pause")
            await says(it.here, state)
            await says(it.there, state)
        case "postcopy-recover-setup":
            await reach(it, "postcopy-paused")
            await recover(it)
        case "postcopy-recover":
            await reach(it, "postcopy-recover-setup")
            await stop(it.destination)
            await resume_aside(it)


def sent(it: Move) -> bool:
    """Whether what goes before the limit holds has come: then nothing more does."""
    if not any(target.startswith("/memfd:ram") for _, target in descriptors_in(it.destination.pid)):
        return False
    with ram(it.destination) as fd:
        return os.pread(fd, 2, FILLED[0] * PAGE) == content(FILLED[0])[:2]


def again(it: Move) -> str:
    """Return where the destination listens after a break."""
    return f"unix:{it.bench.folder}/again"


async def recover(it: Move) -> None:
    """Have the destination listen for its source."""
    await it.there.execute("migrate-recover", uri=again(it))
    await says(it.there, "postcopy-recover-setup")


async def resume_aside(it: Move) -> None:
    """Have the source connect to a destination that does not answer yet."""
    assert it.aside is not None
    await it.aside.send("migrate", uri=again(it), resume=True)
    await says(it.here, "postcopy-recover")


async def observe(zygote: Zygote, state: str, fault: str) -> Seen:
    """Bring `fault` about in `state`, and see what comes of it. Fails where what never may happen does."""
    async with move(zygote) as it:
        await reach(it, state)
        told = await strike(it, state, fault)
        early = state == "postcopy-device"
        if not it.source.alive:
            seen = await nobody_came(it) if early else await waits(it)
        elif it.destination.alive and not (early and told):
            seen = await goes_on(it, state, told)
        elif early and await has_stayed(it):
            seen = await stays(it)
        else:
            seen = await lost(it)
        if early and fault == "destination told to quit":  # who is woken has two things to do at a time
            return Seen(f"source or {TORN}", "", "")
        if early and seen.owner in ("source", "nobody") and not told:  # what is said depends on how much was sent
            return attrs.evolve(seen, told="")
        return attrs.evolve(seen, told=without_names(seen.told, it))


async def strike(it: Move, state: str, fault: str) -> str:
    """Bring the fault about; return what was said of it."""
    struck, told = it.struck(fault), ""
    match fault.partition(" ")[2]:
        case "killed":
            struck.kill()
            await end_of(struck)
        case "stalled":
            await stall(it, state, struck)
        case "told to quit":
            await (it.there if struck is it.destination else it.here).send("quit")
            struck.go_on()
            assert await end_of(struck) == 0
        case _:
            told = await called_off(it)
    for process in (it.source, it.destination):
        process.go_on()
    return told


async def stall(it: Move, state: str, struck: Process) -> None:
    """Stop a side, and have the other one wait for it."""
    if struck is it.source:
        await stop(struck)
        if state not in ("postcopy-device", "postcopy-recover"):  # in which the destination stands
            await vcpu_waits(it)
    elif state not in ("postcopy-device", "postcopy-recover"):  # which are made of that
        await stop(struck)
        if state == "postcopy-recover-setup":
            await resume_aside(it)


async def called_off(it: Move) -> str:
    """Call the migration off, if it can be; return what is said to that."""
    try:
        await it.here.execute("migrate_cancel")
    except CommandFailed as error:
        return error.desc
    return "cancelled"


async def vcpu_waits(it: Move) -> None:
    """See that a vCPU waits for a page. Of time it has waited no more is counted once pages come no more, but this."""

    def waited(info: dict[str, Any]) -> int:
        return int(info["postcopy-vcpu-blocktime"][0])

    before = waited(await it.there.execute("query-migrate"))
    async with due("a vCPU that waits"):
        while waited(await it.there.execute("query-migrate")) == before:  # noqa: ASYNC110 - nobody tells
            await trio.sleep(0.005)


async def waits(it: Move) -> Seen:
    """The guest waits at the destination, whose monitor answers, and is in nobody's way when it is to end."""
    async with due("the destination to know"):
        while (info := await it.there.execute("query-migrate"))["status"] not in (
            "postcopy-paused", "postcopy-recover-setup",
        ):  # fmt: skip
            await it.there.wait_event(lambda event: event["event"] == "MIGRATION")
    await vcpu_waits(it)
    assert (await it.there.execute("query-status"))["status"] == "running"
    await it.there.execute("quit")
    assert await end_of(it.destination) == 0
    return Seen(WAITS, info["error-desc"], "")


async def lost(it: Move) -> Seen:
    """The guest is lost, and does not run again where it came from, which answers until it is told to quit."""
    info = await says(it.here, "postcopy-paused")
    stood = ticks_in(it.source)
    for command, arguments, why in (
        ("cont", {}, "cont"),
        ("migrate", {"uri": again(it), "resume": True}, "Cannot connect to"),
        ("migrate", {"uri": again(it)}, "'resume' goes on with that after a break"),
        ("migrate_cancel", {}, "would be lost"),
        ("system_reset", {}, "system_reset"),
    ):
        with pytest.raises(CommandFailed, match=why):
            await it.here.execute(command, **arguments)
    assert (await it.here.execute("query-migrate"))["status"] == "postcopy-paused"
    await stands(it, stood)
    await it.here.execute("quit")
    assert await end_of(it.source) == 0
    return Seen(TORN, info["error-desc"], "")


async def stands(it: Move, stood: int) -> None:
    """The source does not run the guest."""
    assert (await it.here.execute("query-status"))["status"] == "postmigrate"
    assert ticks_in(it.source) == stood, "the guest runs twice"


async def goes_on(it: Move, state: str, told: str) -> Seen:
    """Let the rest of the guest come, over another connection if it takes that; none of it may be lacking."""
    stood = ticks_in(it.source)
    if state == "postcopy-paused":
        await recover(it)
    status = (await it.here.execute("query-migrate"))["status"]
    if status == "postcopy-paused":
        await it.here.execute("migrate", uri=again(it), resume=True)
    await it.here.execute("migrate-set-parameters", max_postcopy_bandwidth=0)
    for client in (it.here, it.there):
        await says(client, "completed")
    await stands(it, stood)
    await intact(it.destination)
    return Seen("destination", told, "")


async def has_stayed(it: Move) -> bool:
    """Wait until it is decided; return whether the source has not let the guest go."""
    async with due("the end of the migration"):
        while (status := (await it.here.execute("query-migrate"))["status"]) == "postcopy-device":
            await it.here.wait_event(lambda event: event["event"] == "MIGRATION")
    return bool(status in ("cancelling", "cancelled", "failed"))


async def stays(it: Move) -> Seen:
    """The guest goes on at the source."""
    info = await outcome(it.here)
    await runs(it.here)
    await intact(it.source)
    return Seen("source", info.get("error-desc", info["status"]), "")


async def nobody_came(it: Move) -> Seen:
    """The destination ends for want of a guest."""
    assert await end_of(it.destination) == 1
    return Seen("nobody", it.destination.said()[-1], "")


async def intact(process: Process) -> None:
    """The guest ticks on, has lost no tick, and its memory is what it was."""
    before = ticks_in(process)
    await until("ticks", lambda: ticks_in(process) > before + 5)
    with ram(process) as fd:
        report = HeartbeatReader(lambda address, size: os.pread(fd, size, address)).look()
        assert report is not None
        assert report.intact, str(report)
        assert all(os.pread(fd, PAGE, page * PAGE) == content(page) for page in FILLED)
