"""More descriptors than some limit admits, over a CPR channel."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
import trio

from tests.cpr.crowd import many
from tests.cpr.peer import channel_and_peer, frame
from vmm.cpr.channel import CprChannel
from vmm.cpr.room import make_room
from vmm.errors import CprRefused, TooManyDescriptors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

pytestmark = pytest.mark.usefixtures("no_leaks")

COUNT = 1500
"""More than may come unannounced."""


@pytest.fixture(autouse=True)
def limits() -> Iterator[tuple[int, int]]:
    """Put this process's limit back."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        yield before
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
async def channel_and_socket() -> AsyncIterator[tuple[CprChannel, socket.socket]]:
    """A destination's end of a channel, and a socket for another process to be its source."""
    ours, theirs = socket.socketpair()
    channel = CprChannel(trio.socket.from_stdlib_socket(ours), side="destination", peer="source")
    with closing(channel), theirs:
        yield channel, theirs


def started(role: str, sock: socket.socket, limit: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.cpr.crowd", role, str(sock.fileno()), str(COUNT), str(limit)]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, pass_fds=[sock.fileno()], text=True
    )
    sock.close()
    return process


def said(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return output.strip()


async def send_until_refused(source: CprChannel) -> None:
    # All may have been sent by the time at which it is refused.
    await source.send("machine", {}, many(COUNT))
    await source.receive()


def there() -> int:
    return len(os.listdir("/proc/self/fd")) - 1


async def test_more_descriptors_go_than_may_be_in_flight(
    channel_and_socket: tuple[CprChannel, socket.socket], limits: tuple[int, int]
) -> None:
    channel, sock = channel_and_socket
    resource.setrlimit(resource.RLIMIT_NOFILE, (there() + 100, limits[1]))
    source = started("send", sock, limit=100)
    assert source.stdout is not None
    assert source.stdout.readline() == "held up\n"
    message = await channel.receive("machine")
    with closing(message):
        assert list(message.descriptors) == list(many(COUNT))
    assert said(source) == "sent"


async def test_a_source_whose_descriptors_nobody_takes_says_so(
    channel_and_socket: tuple[CprChannel, socket.socket],
) -> None:
    _, sock = channel_and_socket
    assert said(started("flood", sock, limit=100)).splitlines()[-1] == (
        "The source cannot go on at step 'hello': 64 descriptors cannot be sent: this user has as many in "
        "flight as RLIMIT_NOFILE admits (100), and nobody took one within 1.5 s; `ulimit -n` of the source must be "
        "larger"
    )


async def test_descriptors_that_the_hard_limit_does_not_admit_are_refused_before_one_comes() -> None:
    ours, theirs = socket.socketpair()
    destination = started("receive", theirs, limit=300)
    source = CprChannel(trio.socket.from_stdlib_socket(ours), side="source", peer="destination")
    with closing(source), pytest.raises(CprRefused) as caught:
        await send_until_refused(source)
    heard = str(caught.value)
    assert heard == await trio.to_thread.run_sync(said, destination)
    before, _, after = heard.partition(" are open here")
    assert before.startswith(
        f"Live update refused by the destination at step 'hello': {COUNT} descriptors cannot come: "
    )
    open_there = int(before.rpartition(" ")[2])
    needed = open_there + COUNT + 256
    assert after == f", and no more than 300 may be; start this process where `ulimit -Hn` says at least {needed}"


def test_a_limit_that_suffices_stays_as_it_is(limits: tuple[int, int]) -> None:
    make_room(0)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits


def test_a_limit_that_does_not_suffice_is_raised_to_what_is_needed(limits: tuple[int, int]) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (there() + 10, limits[1]))
    make_room(200)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (there() + 1 + 200 + 256, limits[1])


def test_a_refusal_changes_nothing(limits: tuple[int, int]) -> None:
    with pytest.raises(TooManyDescriptors, match=r"^\d+ descriptors cannot come: \d+ are open here"):
        make_room(limits[1])
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits


@pytest.mark.parametrize("announced", [-1, 65537, True, "many", None])
async def test_what_cannot_be_the_number_of_descriptors_is_refused(announced: object) -> None:
    channel, peer = channel_and_peer()
    with closing(peer.sock), closing(channel):
        peer.send(frame("more", {"announced": announced}))
        with pytest.raises(CprRefused) as caught:
            await channel.receive("machine")
        reason = f"{announced!r} descriptors are announced; at most 65536 can come"
        assert str(caught.value) == f"Live update refused by the destination at step 'hello': {reason}"
        assert peer.received()[0]["body"]["reason"] == reason


async def test_more_descriptors_than_were_announced_are_refused() -> None:
    channel, peer = channel_and_peer()
    with closing(peer.sock), closing(channel):
        peer.send(frame("more", {"announced": 1}))
        null = os.open(os.devnull, os.O_RDONLY)
        peer.send(frame("machine", names=["a", "b"]), null, null)
        os.close(null)
        with pytest.raises(CprRefused, match="more than 1 descriptors were sent"):
            await channel.receive("machine")
