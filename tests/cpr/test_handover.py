"""The two sides against each other, and each against a peer that does what it should not. On a clock that jumps."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from typing import TYPE_CHECKING, Final, Literal

import pytest
import trio

from tests.cpr.peer import Peer, channel_and_peer, frame
from vmm.capabilities import MayReleaseGuest, Mint
from vmm.cpr.cell import Owner, OwnershipCell
from vmm.cpr.handover import Given, give, take
from vmm.cpr.steps import Steps
from vmm.errors import CprError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from trio.testing import MockClock

    from vmm.cpr.channel import CprChannel

pytestmark = [
    pytest.mark.usefixtures("no_leaks"),
    # Children of Python 3.12 and later; they do nothing that a thread could have locked.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

LIMIT: Final = 1.0


@pytest.fixture
def cell() -> Iterator[OwnershipCell]:
    with closing(OwnershipCell.create()) as cell:
        yield cell


@pytest.fixture
def theirs(cell: OwnershipCell) -> Iterator[OwnershipCell]:
    with closing(OwnershipCell.adopt(os.dup(cell.fd))) as theirs:
        yield theirs


@pytest.fixture
async def source() -> AsyncIterator[tuple[CprChannel, Peer]]:
    """The source's channel, and a peer that plays the destination."""
    channel, peer = channel_and_peer("source")
    with closing(peer.sock):
        yield channel, peer
        channel.close()


@pytest.fixture
async def destination() -> AsyncIterator[tuple[CprChannel, Peer]]:
    """The destination's channel, and a peer that plays the source."""
    channel, peer = channel_and_peer("destination")
    with closing(peer.sock):
        yield channel, peer
        channel.close()


async def given(cell: OwnershipCell, channel: CprChannel) -> Given:
    may = Mint("test")(MayReleaseGuest, cell)
    return await give(may, cell, channel, Steps("source"), within=LIMIT)


async def kept(cell: OwnershipCell, channel: CprChannel) -> str:
    """Let `channel` give, which must fail; return why."""
    with pytest.raises(CprError) as caught:
        await given(cell, channel)
    assert (cell.owner, cell.ours) == (Owner.SOURCE, True)
    return str(caught.value)


async def not_taken(cell: OwnershipCell, channel: CprChannel) -> str:
    """Let `channel` take, which must fail; return why."""
    with pytest.raises(CprError) as caught:
        await take(cell, channel, Steps("destination"))
    assert not cell.ours
    return str(caught.value)


async def test_what_one_side_gives_the_other_takes(cell: OwnershipCell, theirs: OwnershipCell) -> None:
    from tests.cpr.test_channel import channels

    source, destination = channels()

    async def take_and_say_so() -> None:
        await take(theirs, destination, Steps("destination"))
        assert theirs.ours
        await destination.send("running", {"resumed-ns": 77})

    with closing(source), closing(destination):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take_and_say_so)
            assert await given(cell, source) == Given(77)
    assert (cell.owner, cell.ours) == (Owner.RUNNING, False)


# --- the source -------------------------------------------------------------------------------------------------


async def test_an_offer_that_nobody_takes_is_taken_back(
    autojump_clock: MockClock, cell: OwnershipCell, source: tuple[CprChannel, Peer]
) -> None:
    channel, peer = source
    began = trio.current_time()
    assert await kept(cell, channel) == (
        "The destination did not take the guest within 1 s at step 'offered'; the guest goes on in the source"
    )
    assert trio.current_time() - began == LIMIT
    assert peer.received() == [{"kind": "offered", "body": {}, "descriptors": []}]


async def test_an_offer_to_a_peer_that_closed_is_taken_back(
    cell: OwnershipCell, source: tuple[CprChannel, Peer]
) -> None:
    channel, peer = source
    peer.sock.close()
    text = "The destination closed the channel at step 'hello'; the guest stays where it was"
    assert await kept(cell, channel) == text


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (
            b"garbage!",
            "Live update refused by the source at step 'hello': a frame begins with b'garb', not with b'TVCP'",
        ),
        (
            frame("loaded"),
            "Live update refused by the source at step 'hello': message 'loaded' came where running was due",
        ),
        (
            frame("refused", {"step": "loading", "reason": "no room"}),
            "Live update refused by the destination at step 'loading': no room",
        ),
        (
            frame("running", {"resumed-ns": 1}),
            "Live update refused by the source at step 'offered': "
            "it said that it runs the guest, and the ownership cell says OFFERED",
        ),
    ],
)
async def test_an_offer_to_a_peer_that_talks_nonsense_is_taken_back(
    cell: OwnershipCell, source: tuple[CprChannel, Peer], data: bytes, text: str
) -> None:
    channel, peer = source
    peer.send(data)
    assert await kept(cell, channel) == text


@pytest.mark.parametrize(
    ("data", "moment"),
    [
        (frame("running", {"resumed-ns": 5}), 5),
        (frame("running", {"resumed-ns": "soon"}), None),
        (frame("running"), None),
        (frame("refused", {"reason": "after all not"}), None),
        (b"garbage!", None),
        (b"", None),
    ],
)
async def test_a_guest_that_runs_there_is_gone_whatever_the_peer_says(
    autojump_clock: MockClock,
    cell: OwnershipCell,
    theirs: OwnershipCell,
    source: tuple[CprChannel, Peer],
    data: bytes,
    moment: int | None,
) -> None:
    channel, peer = source
    peer.hello("destination")
    await channel.hello("a test")
    peer.received()

    async def take_it() -> None:
        await trio.lowlevel.wait_readable(peer.sock)
        assert theirs.take()
        assert theirs.run()
        if data:
            peer.send(data)
        else:
            trio.lowlevel.notify_closing(peer.sock)
            peer.sock.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take_it)
        assert await given(cell, channel) == Given(moment)
    assert not cell.ours


def player(peer: Peer, theirs: OwnershipCell, then: Literal["die", "run", "run and die"]) -> int:
    """Start a process that says hello as the destination, takes what is offered, and then does one thing more.

    It pauses before that, until SIGUSR1 comes.
    """
    child = os.fork()
    if child:
        return child
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    peer.hello("destination")
    while peer.sock.recv(1 << 16).find(b"offered") < 0:
        pass
    assert theirs.take()
    signal.sigwait({signal.SIGUSR1})
    if then != "die":
        assert theirs.run()
    if then == "run":
        signal.pause()
    os._exit(0)


def end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


async def taken(cell: OwnershipCell) -> None:
    while cell.owner is not Owner.TAKEN:  # noqa: ASYNC110 - another process's memory does not tell
        await trio.sleep(0.001)


@pytest.mark.parametrize("then", ["die", "run", "run and die"])
async def test_a_taker_is_waited_for_until_it_runs_or_is_dead(
    cell: OwnershipCell,
    theirs: OwnershipCell,
    source: tuple[CprChannel, Peer],
    then: Literal["die", "run", "run and die"],
) -> None:
    channel, peer = source
    child = player(peer, theirs, then)
    peer.sock.close()  # here; the child has its own
    await channel.hello("a test")
    answers: list[Given | str] = []

    async def give_it() -> None:
        answers.append(await (kept(cell, channel) if then == "die" else given(cell, channel)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(give_it)
        await taken(cell)
        # Longer than the offer stands. That it is still waited for shows that no time limit decides here.
        await trio.sleep(LIMIT + 0.2)
        assert not answers
        os.kill(child, signal.SIGUSR1)
    assert (
        answers
        == {
            "die": [
                "The destination died after it took the guest and before it ran it at step 'offered'; "
                "the guest goes on in the source"
            ],
            "run": [Given(None)],
            "run and die": [Given(None)],
        }[then]
    )
    assert cell.ours is (then == "die")
    channel.close()
    end(child)


async def test_a_runner_that_dies_before_it_said_so_is_told_as_dead(
    cell: OwnershipCell, theirs: OwnershipCell, source: tuple[CprChannel, Peer]
) -> None:
    channel, peer = source
    child = player(peer, theirs, "run and die")
    peer.sock.close()
    await channel.hello("a test")
    os.kill(child, signal.SIGUSR1)
    lost = "The destination died when it had begun to run the guest at step 'offered'; the guest died with it"
    assert await given(cell, channel) == Given(None, lost)
    assert (cell.owner, cell.ours) == (Owner.RUNNING, False)
    channel.close()
    end(child)


async def test_a_cancel_that_is_asked_for_before_the_offer_prevents_it(
    cell: OwnershipCell, source: tuple[CprChannel, Peer]
) -> None:
    channel, peer = source
    with trio.CancelScope() as scope:
        scope.cancel()
        await given(cell, channel)
    assert scope.cancelled_caught
    assert (cell.owner, cell.ours) == (Owner.SOURCE, True)
    assert peer.received() == []


async def test_a_cancel_while_it_is_offered_waits_until_it_is_decided(
    autojump_clock: MockClock, cell: OwnershipCell, source: tuple[CprChannel, Peer]
) -> None:
    channel, _ = source
    with trio.move_on_after(LIMIT / 2) as scope:
        text = await kept(cell, channel)
        assert text.startswith("The destination did not take the guest within 1 s")
    assert trio.current_time() >= scope.deadline + LIMIT / 2
    assert (cell.owner, cell.ours) == (Owner.SOURCE, True)


async def test_a_cancel_once_it_is_taken_leaves_it_to_the_taker(
    autojump_clock: MockClock, cell: OwnershipCell, theirs: OwnershipCell, source: tuple[CprChannel, Peer]
) -> None:
    channel, peer = source
    peer.hello("destination")
    await channel.hello("a test")  # this process itself, which does not die

    async def take_it() -> None:
        while not theirs.take():  # noqa: ASYNC110 - another process's memory does not tell
            await trio.sleep(0.01)

    with trio.move_on_after(LIMIT * 10) as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take_it)
            await given(cell, channel)
    assert scope.cancelled_caught
    assert (cell.owner, cell.ours) == (Owner.TAKEN, False)
    assert theirs.run()
    channel.close()


# --- the destination --------------------------------------------------------------------------------------------


async def test_a_guest_that_is_offered_is_taken(
    cell: OwnershipCell, theirs: OwnershipCell, destination: tuple[CprChannel, Peer]
) -> None:
    channel, peer = destination
    cell.offer()
    peer.send(frame("offered"))
    await take(theirs, channel, Steps("destination"))
    assert (theirs.owner, theirs.ours) == (Owner.RUNNING, True)


@pytest.mark.parametrize("data", [b"", b"garbage!", frame("paused"), frame("refused", {"reason": "no"})])
async def test_a_guest_that_is_offered_is_taken_whatever_its_source_says_next(
    cell: OwnershipCell, theirs: OwnershipCell, destination: tuple[CprChannel, Peer], data: bytes
) -> None:
    """A source that died right after its offer has left the guest to whoever takes it."""
    channel, peer = destination
    cell.offer()
    if data:
        peer.send(data)
    peer.sock.close()
    await take(theirs, channel, Steps("destination"))
    assert theirs.ours


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "The source closed the channel at step 'hello'; nothing was taken over"),
        (
            b"garbage!",
            "Live update refused by the destination at step 'hello': a frame begins with b'garb', not with b'TVCP'",
        ),
        (
            frame("paused"),
            "Live update refused by the destination at step 'hello': message 'paused' came where offered was due",
        ),
        (
            frame("refused", {"step": "handing over", "reason": "it was cancelled"}),
            "Live update refused by the source at step 'handing over': it was cancelled",
        ),
        (frame("offered"), "The source took the guest back at step 'offer-seen'; nothing was taken over"),
    ],
)
async def test_a_guest_that_is_not_offered_is_not_taken_whatever_its_source_says(
    cell: OwnershipCell, theirs: OwnershipCell, destination: tuple[CprChannel, Peer], data: bytes, text: str
) -> None:
    channel, peer = destination
    if data:
        peer.send(data)
    peer.sock.close()
    assert await not_taken(theirs, channel) == text
    assert (cell.owner, cell.ours) == (Owner.SOURCE, True)


async def test_a_guest_that_was_taken_back_is_not_taken(
    cell: OwnershipCell, theirs: OwnershipCell, destination: tuple[CprChannel, Peer]
) -> None:
    channel, peer = destination
    cell.offer()
    peer.send(frame("offered"))
    assert cell.take_back()
    assert await not_taken(theirs, channel) == (
        "The source took the guest back at step 'offer-seen'; nothing was taken over"
    )


async def test_a_silent_source_is_waited_for(
    autojump_clock: MockClock, cell: OwnershipCell, theirs: OwnershipCell, destination: tuple[CprChannel, Peer]
) -> None:
    channel, peer = destination
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take, theirs, channel, Steps("destination"))
        await trio.sleep(86400)
        assert theirs.owner is Owner.SOURCE
        cell.offer()
        peer.send(frame("offered"))
    assert theirs.ours


async def test_a_cancel_before_the_offer_takes_nothing(
    cell: OwnershipCell, theirs: OwnershipCell, destination: tuple[CprChannel, Peer]
) -> None:
    channel, _ = destination
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take, theirs, channel, Steps("destination"))
            await trio.testing.wait_all_tasks_blocked()
            cell.offer()
            scope.cancel()
    assert (theirs.owner, theirs.ours) == (Owner.OFFERED, False)
    assert cell.take_back()
