"""What a process does beside its machine and after it, looked at closely."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import closing, suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, final

import attrs
import pytest
import trio

from tests.phases.machine import start_of
from vmm.cpr.berth import Berth
from vmm.cpr.channel import CprChannel
from vmm.host_sockets import connected_pair
from vmm.phases.afterwards import BecomeProgram, StandBy
from vmm.phases.predecessor import Predecessor
from vmm.process import _run
from vmm.roles import GuestNotTaken, StandingBy, TakingBack

if TYPE_CHECKING:
    from vmm.phases.foundation import Host
    from vmm.phases.start import Start

pytestmark = pytest.mark.usefixtures("no_leaks")


def stand_by() -> StandBy:
    ours, theirs = connected_pair()
    theirs.close()
    return StandBy(Berth.bind(), ours.detach())


@final
@attrs.frozen
class Left:
    """The guest has gone, clients and all, and a signal comes as the machine ends."""

    plan: StandBy
    signal: bool

    def prepare(self, start: Start) -> Start:
        return start

    async def serve(self, host: Host) -> None:
        host.ending.afterwards = self.plan
        host.end_without_clients("")
        if self.signal:
            host.ending.end("host-signal")

    def close(self) -> None:
        """Do nothing."""


@pytest.mark.parametrize("signal", [False, True])
async def test_a_signal_that_comes_as_the_machine_ends_by_itself_counts(*, signal: bool) -> None:
    with closing(stand_by()) as plan:
        status, afterwards = await _run(start_of(), Left(plan, signal))
        assert (status, afterwards) == (0, None if signal else plan)
        assert (plan.leash < 0) == signal


def test_why_a_guest_came_back_once_is_not_said_of_the_next_time() -> None:
    became = BecomeProgram(["x"], 1, -1)
    with closing(TakingBack.after_failure(became, "Cannot execute x: why")) as role:
        back = role.prepare(start_of())
        assert back.failure == "Cannot execute x: why"
        with closing(stand_by()) as plan:
            kept = StandingBy(plan).prepare(back)
        assert kept.failure == ""
    for start in (back, kept):
        for step in start.recipe:
            for channel in step.arguments["channels"]:
                os.close(int(channel["addr"]["str"]))  # of whoever carries that out


@pytest.mark.parametrize(
    ("answers", "here", "said"),
    [
        # Its phases are closing: it has let the guest go.
        ([{}, None], True, ""),
        ([{}, {"status": "failed", "error-desc": "why"}], True, ""),
        ([{}, {"status": "failed", "error-desc": "why"}], False, "did not hand it over: why; the guest goes on there"),
        ([None], False, "did not hand it over: migrate: no; the guest goes on there"),
        ([], False, "did not hand it over: it ended; the guest ended with it"),
    ],
)
async def test_who_has_taken_the_guest_back_does_not_end_for_what_the_caretaker_says(
    answers: list[Any], here: bool, said: str
) -> None:
    ours, theirs = connected_pair()
    caretaker = subprocess.Popen(["true"])  # noqa: ASYNC220 - which takes a moment
    became = BecomeProgram(["x"], caretaker.pid, ours.detach())
    host: Any = SimpleNamespace(complain=lambda text: None)
    arrival = SimpleNamespace(over=trio.Event())
    host.tree = SimpleNamespace(view=lambda kind: SimpleNamespace(arrival=arrival if here else None))
    if here:
        arrival.over.set()

    async def answer() -> None:
        with trio.socket.from_stdlib_socket(theirs) as sock:
            await sock.send(b'{"QMP": {}}\n')
            for value in [{}, *answers]:
                request = json.loads(await sock.recv(4096))
                body = {"error": {"class": "GenericError", "desc": "no"}} if value is None else {"return": value}
                await sock.send(json.dumps({**body, "id": request["id"]}).encode() + b"\n")

    with closing(TakingBack.after_failure(became, "why")) as role:
        for step in role.prepare(start_of()).recipe:
            for channel in step.arguments["channels"]:
                os.close(int(channel["addr"]["str"]))
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(answer)
                if said:
                    with pytest.raises(GuestNotTaken) as caught:
                        await role.serve(host)
                    assert str(caught.value).endswith(said)
                else:
                    await role.serve(host)
    with suppress(ChildProcessError):
        caretaker.wait()


UNIX: dict[str, Any] = {"transport": "socket", "type": "unix", "path": "/a", "abstract": True}


@pytest.mark.parametrize(
    "other",
    [
        {"transport": "socket", "type": "fd", "str": "2"},
        {"transport": "socket", "type": "inet", "host": "127.0.0.1", "port": "1"},
        {"transport": "file", "filename": "/a", "offset": 0},
    ],
)
@pytest.mark.parametrize("kind", ["main", "cpr"])
async def test_a_guest_goes_back_to_where_a_path_leads_alone(kind: str, other: dict[str, Any]) -> None:
    ours, theirs = trio.socket.socketpair()
    theirs.close()
    with closing(CprChannel(ours, side="destination", peer="source")) as channel:
        for addr in (UNIX, other):
            addresses = {"main": UNIX, "cpr": UNIX, kind: addr}
            channels = [{"channel-type": name, "addr": address} for name, address in addresses.items()]
            found = Predecessor.of({"channels": channels, "program": "x"}, channel)
            assert (found is None) == (addr is other)
            if found is not None:
                found.close()
