from __future__ import annotations

import array
import errno
import os
import signal
import socket
import stat
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.cpr.peer import HEADER, Peer, channel_and_peer, frame, no_descriptor_left, packed
from vmm import host_sockets
from vmm.cpr import versions
from vmm.cpr.channel import CprChannel
from vmm.cpr.frames import MAGIC, MAX_FRAME
from vmm.errors import CprError, CprHostFailed, CprPeerGone, CprRefused, DescriptorMissing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [
    pytest.mark.usefixtures("no_leaks"),
    # Children of Python 3.12 and later; they do nothing that a thread could have locked.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

CLOSED = "The source closed the channel at step 'hello'; nothing was taken over"


@pytest.fixture
async def pair() -> AsyncIterator[tuple[CprChannel, Peer]]:
    channel, peer = channel_and_peer()
    with closing(peer.sock):
        yield channel, peer
        channel.close()


def channels() -> tuple[CprChannel, CprChannel]:
    one, two = socket.socketpair()
    return (
        CprChannel(trio.socket.from_stdlib_socket(one), side="source", peer="destination"),
        CprChannel(trio.socket.from_stdlib_socket(two), side="destination", peer="source"),
    )


def pipes(count: int) -> list[int]:
    found: list[int] = []
    for _ in range(count):
        found += os.pipe()
    return found


def close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def reap(child: int) -> None:
    os.waitpid(child, 0)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


async def refusal(channel: CprChannel, *kinds: str) -> str:
    with pytest.raises(CprError) as caught:
        await channel.receive(*(kinds or ("machine",)))
    channel.close()
    return str(caught.value)


async def test_a_message_arrives_with_its_descriptors() -> None:
    source, destination = channels()
    with closing(source), closing(destination):
        fds = pipes(1)
        await source.send("machine", {"name": "maschine ß"}, {"a": fds[0], "b": fds[1]})
        message = await destination.receive("machine")
        assert (message.kind, message.body) == ("machine", {"name": "maschine ß"})
        assert list(message.descriptors) == ["a", "b"]
        with closing(message):
            for name, fd in zip("ab", fds, strict=True):
                arrived = message.descriptors[name]
                assert os.fstat(arrived).st_ino == os.fstat(fd).st_ino
                assert not os.get_inheritable(arrived)
        close(fds)


async def test_a_descriptor_is_claimed_once_and_the_rest_is_closed() -> None:
    source, destination = channels()
    with closing(source), closing(destination):
        fds = pipes(1)
        await source.send("machine", {}, {"a": fds[0], "b": fds[1]})
        message = await destination.receive("machine")
        mine = message.claim("a")
        with pytest.raises(DescriptorMissing, match=r"The source sent no descriptor named 'a'"):
            message.claim("a")
        message.close()
        os.close(mine)
        close(fds)


async def test_more_descriptors_than_one_call_carries_arrive_all() -> None:
    source, destination = channels()
    with closing(source), closing(destination):
        fds = pipes(100)
        await source.send("machine", {}, {f"fd{n}": fd for n, fd in enumerate(fds)})
        message = await destination.receive("machine")
        with closing(message):
            for n, fd in enumerate(fds):
                assert os.fstat(message.descriptors[f"fd{n}"]).st_ino == os.fstat(fd).st_ino
        close(fds)


async def test_messages_that_arrive_together_keep_their_own_descriptors(pair: tuple[CprChannel, Peer]) -> None:
    channel, peer = pair
    fds = pipes(2)
    peer.send(frame("first"))
    peer.send(frame("second", names=["a"]), fds[0])
    peer.send(frame("third", names=["b", "c"]), fds[1], fds[2])
    with closing(channel):
        first, second, third = [await channel.receive(kind) for kind in ("first", "second", "third")]
        assert (first.descriptors, list(second.descriptors), list(third.descriptors)) == ({}, ["a"], ["b", "c"])
        assert os.fstat(third.descriptors["c"]).st_ino == os.fstat(fds[2]).st_ino
        second.close()
        third.close()
    close(fds)


@pytest.mark.parametrize("size", [1, 3, 7, 8, 9, 20])
async def test_a_message_may_come_in_pieces_of_any_size(pair: tuple[CprChannel, Peer], size: int) -> None:
    channel, peer = pair
    fds = pipes(1)
    data = frame("machine", {"text": "long enough for several pieces"}, ["a"])

    async def send() -> None:
        peer.send(data[:size], fds[0])
        for at in range(size, len(data), size):
            await trio.testing.wait_all_tasks_blocked()
            peer.send(data[at : at + size])

    with closing(channel):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            message = await channel.receive("machine")
        assert message.body == {"text": "long enough for several pieces"}
        message.close()
    close(fds)


async def test_a_cancelled_wait_loses_nothing(pair: tuple[CprChannel, Peer]) -> None:
    channel, peer = pair
    data = frame("machine", {"a": 1})
    peer.send(data[:10])
    with closing(channel):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.receive, "machine")
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        peer.send(data[10:])
        assert (await channel.receive("machine")).body == {"a": 1}


def nested(depth: int) -> dict[str, Any]:
    """Return a body in which arrays nest so deep."""
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return {"props": value}


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"HTTP/1.1", "a frame begins with b'HTTP', not with b'TVCP'"),
        (b"\0" * 8, "a frame begins with b'\\x00\\x00\\x00\\x00', not with b'TVCP'"),
        (HEADER.pack(MAGIC, MAX_FRAME + 1), "a frame of 8388609 bytes is larger than the 8388608 admitted"),
        (HEADER.pack(MAGIC, 0xFFFFFFFF), "a frame of 4294967295 bytes is larger than the 8388608 admitted"),
        (packed(b""), "a frame does not hold a message"),
        (packed(b"{"), "a frame does not hold a message"),
        (packed(b"\xff\xfe"), "a frame does not hold a message"),
        (packed(b"[" * 100_000), "a frame does not hold a message"),
        (packed(b"[]"), "a frame does not hold a message"),
        (packed(b"7"), "a frame does not hold a message"),
        (packed(b'{"kind": "machine"}'), "a frame does not hold a message"),
        (packed(b'{"kind": 1, "body": {}, "descriptors": []}'), "a frame does not hold a message"),
        (packed(b'{"kind": "machine", "body": [], "descriptors": []}'), "a frame does not hold a message"),
        (packed(b'{"kind": "machine", "body": {}, "descriptors": {}}'), "a frame does not hold a message"),
        (packed(b'{"kind": "machine", "body": {}, "descriptors": [1]}'), "a frame does not hold a message"),
        (
            packed(b'{"kind": "machine", "body": %s, "descriptors": []}' % (b"1" * 5000)),
            "a frame does not hold a message",
        ),
        (frame("machine", nested(63)), "a frame nests deeper than the 64 arrays and objects admitted"),
        (frame("machine", nested(700)), "a frame nests deeper than the 64 arrays and objects admitted"),
        (frame("else"), "message 'else' came where machine was due"),
        (frame("machine", names=["ram"]), "descriptor 'ram' was announced and not sent"),
    ],
)
async def test_what_is_no_message_is_refused(pair: tuple[CprChannel, Peer], data: bytes, text: str) -> None:
    channel, peer = pair
    peer.send(data)
    assert await refusal(channel) == f"Live update refused by the destination at step 'hello': {text}"


async def test_what_nests_as_deep_as_is_admitted_arrives(pair: tuple[CprChannel, Peer]) -> None:
    channel, peer = pair
    peer.send(frame("machine", nested(62)))
    assert (await channel.receive("machine")).body == nested(62)


@pytest.mark.parametrize(
    ("names", "count", "text"),
    [
        ([], 1, "1 descriptors came without a name"),
        (["a"], 2, "1 descriptors came without a name"),
        (["a", "b"], 1, "descriptor 'b' was announced and not sent"),
        (["a", "a"], 2, "descriptor 'a' was sent twice"),
    ],
)
async def test_descriptors_and_names_must_be_as_many(
    pair: tuple[CprChannel, Peer], names: list[str], count: int, text: str
) -> None:
    channel, peer = pair
    fds = pipes(1)
    peer.send(frame("machine", names=names), *fds[:count])
    peer.send(frame("next"))  # does not make up for it
    assert await refusal(channel) == f"Live update refused by the destination at step 'hello': {text}"
    close(fds)


async def test_a_descriptor_in_the_middle_of_a_frame_is_one_without_a_name(pair: tuple[CprChannel, Peer]) -> None:
    channel, peer = pair
    fds = pipes(1)
    data = frame("machine", names=[])
    peer.send(data[:12])
    peer.send(data[12:], fds[0])
    text = "1 descriptors came without a name"
    assert await refusal(channel) == f"Live update refused by the destination at step 'hello': {text}"
    close(fds)


async def test_the_same_name_in_two_frames_of_a_message_is_refused(pair: tuple[CprChannel, Peer]) -> None:
    channel, peer = pair
    fds = pipes(1)
    peer.send(frame("more", names=["a"]), fds[0])
    peer.send(frame("machine", names=["a"]), fds[1])
    assert await refusal(channel) == (
        "Live update refused by the destination at step 'hello': descriptor 'a' was sent twice"
    )
    close(fds)


async def test_there_is_a_limit_to_the_descriptors_of_a_message(pair: tuple[CprChannel, Peer]) -> None:
    channel, peer = pair
    fds = pipes(1)
    for part in range(17):
        peer.send(frame("more", names=[f"{part}-{n}" for n in range(64)]), *[fds[0]] * 64)
    assert await refusal(channel) == (
        "Live update refused by the destination at step 'hello': more than 1024 descriptors were sent"
    )
    close(fds)


async def test_more_descriptors_than_there_is_room_for_are_not_lost_silently(pair: tuple[CprChannel, Peer]) -> None:
    channel, peer = pair
    fds = pipes(1)
    peer.send(frame("machine", names=[f"{n}" for n in range(200)]), *[fds[0]] * 200)
    text = "descriptors were lost: more were sent than this process may open"
    assert await refusal(channel) == f"Live update refused by the destination at step 'hello': {text}"
    close(fds)


@pytest.mark.parametrize("sent", [0, 1, 8, 20])
async def test_an_end_is_told(pair: tuple[CprChannel, Peer], sent: int) -> None:
    channel, peer = pair
    peer.send(frame("machine")[:sent])
    peer.sock.close()
    assert await refusal(channel) == CLOSED


async def test_a_refusal_of_the_peer_is_told_in_its_words(pair: tuple[CprChannel, Peer]) -> None:
    channel, peer = pair
    peer.send(frame("refused", {"step": "building", "reason": "there is no KVM"}))
    assert await refusal(channel) == "Live update refused by the source at step 'building': there is no KVM"


async def test_while_nothing_is_due_a_message_is_an_error(pair: tuple[CprChannel, Peer]) -> None:
    channel, peer = pair
    peer.send(frame("machine"))
    with pytest.raises(CprRefused) as caught:
        await channel.watch()
    assert str(caught.value) == (
        "Live update refused by the destination at step 'hello': message 'machine' came where none was due"
    )
    channel.close()


async def test_who_sends_to_a_peer_that_closed_is_told_why(pair: tuple[CprChannel, Peer]) -> None:
    channel, peer = pair
    peer.send(frame("machine"))
    peer.send(frame("refused", {"step": "hello", "reason": "another version"}))
    peer.sock.close()
    with pytest.raises(CprRefused) as caught:
        await channel.send("ready", {})
    assert str(caught.value) == "Live update refused by the source at step 'hello': another version"
    channel.close()


async def test_who_sends_to_a_peer_that_closed_without_a_word_is_told_that(pair: tuple[CprChannel, Peer]) -> None:
    channel, peer = pair
    peer.sock.close()
    with pytest.raises(CprPeerGone) as caught:
        await channel.send("ready", {})
    assert str(caught.value) == CLOSED
    channel.close()


# --- who is there -----------------------------------------------------------------------------------------------


async def test_both_sides_learn_who_the_other_is() -> None:
    source, destination = channels()
    with closing(source), closing(destination):
        assert not source.peer_is_dead()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(source.hello, "one")
            nursery.start_soon(destination.hello, "two")
        assert source.peer_pid == destination.peer_pid == os.getpid()
        assert not source.peer_is_dead()


async def hello(channel: CprChannel, peer: Peer) -> tuple[str, list[dict[str, Any]]]:
    """Let `channel` say hello to a peer that has; return the error, and what the peer was told."""
    with pytest.raises(CprRefused) as caught:
        await channel.hello("a test")
    channel.close()
    _, *answers = peer.received()
    return str(caught.value), answers


OLDER = "the older program is this one: update it first"


@pytest.mark.parametrize(
    ("changes", "there"),
    [
        ({"version": 0}, "version 0, not 1"),
        ({"version": 2}, f"version 2, not 1; {OLDER}"),
        ({"version": "1"}, "version '1', not 1"),
        ({"version": None}, "version None, not 1"),
        ({"version": True}, "version True, not 1"),
        ({"version": 1, "versions": [2, 3]}, f"versions 2 to 3, not 1; {OLDER}"),
        ({"version": 1, "versions": [2, 1]}, "version [2, 1], not 1"),
        ({"version": 1, "versions": [True, True]}, "version [True, True], not 1"),
        ({"version": 1, "versions": [1, 2, 3]}, "version [1, 2, 3], not 1"),
        ({"version": 1, "versions": {}}, "version {}, not 1"),
    ],
)
async def test_another_version_is_refused_and_told_so(
    pair: tuple[CprChannel, Peer], changes: dict[str, Any], there: str
) -> None:
    channel, peer = pair
    peer.hello(**changes)
    text, answers = await hello(channel, peer)
    reason = f"the source speaks CPR protocol {there}"
    assert text == f"Live update refused by the destination at step 'hello': {reason}"
    assert answers == [{"kind": "refused", "body": {"step": "hello", "reason": reason}, "descriptors": []}]


@pytest.mark.parametrize("changes", [{}, {"versions": [1, 1]}, {"version": 7, "versions": [1, 9]}])
async def test_of_the_versions_that_both_speak_the_newest_is_spoken(
    pair: tuple[CprChannel, Peer], changes: dict[str, Any]
) -> None:
    channel, peer = pair
    peer.hello(**changes)
    await channel.hello("a test")
    assert channel.version == 1


def test_two_ranges_have_their_newest_common_version_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "OLDEST", 3)
    monkeypatch.setattr(versions, "NEWEST", 5)
    assert versions.spoken() == {"version": 3, "versions": [3, 5]}
    ranges = {(1, 3): 3, (4, 4): 4, (1, 9): 5, (5, 9): 5, (1, 2): None, (6, 7): None}
    assert {range_: versions.agreed({"version": 1, "versions": list(range_)}) for range_ in ranges} == ranges
    said = (
        "the destination speaks CPR protocol versions 1 to 2, not 3 to 5; the older program is that of the destination"
    )
    assert versions.disagreement({"version": 1, "versions": [1, 2]}, "destination") == f"{said}: update it first"


async def test_without_a_pidfd_a_peer_is_refused(pair: tuple[CprChannel, Peer]) -> None:
    channel, peer = pair
    peer.send(frame("hello", {"version": 1}))
    text, _ = await hello(channel, peer)
    assert text == (
        "Live update refused by the destination at step 'hello': The source sent no descriptor named 'pidfd'"
    )


async def test_a_pidfd_that_is_none_is_refused(pair: tuple[CprChannel, Peer]) -> None:
    channel, peer = pair
    fds = pipes(1)
    peer.send(frame("hello", {"version": 1}, ["pidfd"]), fds[0])
    text, _ = await hello(channel, peer)
    assert text == (
        "Live update refused by the destination at step 'hello': Descriptor 'pidfd' is something else, not a pidfd"
    )
    close(fds)


async def test_the_pidfd_of_another_process_is_refused(pair: tuple[CprChannel, Peer]) -> None:
    channel, peer = pair
    fd = os.pidfd_open(1)
    peer.send(frame("hello", {"version": 1}, ["pidfd"]), fd)
    os.close(fd)
    text, _ = await hello(channel, peer)
    assert text == (
        "Live update refused by the destination at step 'hello': "
        f"the pidfd sent is of process 1, but process {os.getpid()} sent it"
    )


@pytest.mark.skipif(os.getuid() != 0, reason="another user's process can only be had by root")
async def test_a_process_of_another_user_is_refused(pair: tuple[CprChannel, Peer]) -> None:
    channel, peer = pair
    child = os.fork()
    if not child:
        os.setgroups([])
        os.setgid(12345)
        os.setuid(12345)
        peer.hello()
        os._exit(0)
    reap(child)
    # This test's process is root; what root admits is its own.
    text, answers = await hello(channel, peer)
    reason = "the source runs as uid 12345; only uid 0 and root are admitted"
    assert text == f"Live update refused by the destination at step 'hello': {reason}"
    assert [answer["kind"] for answer in answers] == ["refused"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize(("uids", "admitted"), [((), False), ((12345,), True), ((12346,), False)])
async def test_who_connects_as_another_user_is_refused_before_a_byte_is_read_unless_that_user_is_admitted(
    tmp_path: Path, uids: tuple[int, ...], admitted: bool
) -> None:
    path = str(tmp_path / "cpr")
    with host_sockets.listen_unix(path) as listener:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        # What root's own mode keeps out, for the sake of what is behind it.
        os.chmod(path, 0o666)
        os.chmod(tmp_path, 0o711)
        child = os.fork()
        if not child:
            try:
                os.chdir(tmp_path)
                os.setgid(12345)
                os.setuid(12345)
                with socket.socket(socket.AF_UNIX) as other:
                    other.connect("cpr")
                    os._exit(0 if b"refused" in other.recv(4096) else 1)
            finally:
                os._exit(2)
        with trio.fail_after(20):
            await trio.lowlevel.wait_readable(listener)
        sock = trio.socket.from_stdlib_socket(listener.accept()[0])
        with closing(CprChannel(sock, side="destination", peer="source", uids=uids)) as channel:
            if admitted:
                await channel.admit()
            else:
                with pytest.raises(CprRefused) as caught:
                    await channel.admit()
                others = "".join(f", uid {uid}" for uid in uids)
                assert str(caught.value) == (
                    "Live update refused by the destination at step 'hello': "
                    f"the source runs as uid 12345; only uid 0{others} and root are admitted"
                )
        assert ended(child) == int(admitted)
        os.unlink(path)


async def test_the_death_of_a_peer_shows_and_can_be_awaited(pair: tuple[CprChannel, Peer]) -> None:
    channel, peer = pair
    child = os.fork()
    if not child:
        peer.hello()
        signal.pause()
    with closing(channel):
        await channel.hello("a test")
        assert channel.peer_pid == child
        assert not channel.peer_is_dead()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.peer_died)
            os.kill(child, signal.SIGKILL)
        assert channel.peer_is_dead()
    reap(child)


async def test_a_hello_that_is_refused_leaves_no_descriptor(pair: tuple[CprChannel, Peer]) -> None:
    channel, peer = pair
    fds = pipes(1)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    peer.sock.sendmsg([frame("hello", {"version": 9}, ["pidfd", "ram"])], ancillary)
    await hello(channel, peer)
    close(fds)


async def test_refusing_a_peer_that_has_refused_and_left_tells_ones_own_reason(pair: tuple[CprChannel, Peer]) -> None:
    channel, peer = pair
    peer.send(frame("refused", {"step": "hello", "reason": "another version"}))
    peer.sock.close()
    assert str(await channel.refuse("too late")) == ("Live update refused by the destination at step 'hello': too late")
    channel.close()


# --- what the host refuses --------------------------------------------------------------------------------------


async def test_without_a_descriptor_left_a_side_says_that_it_cannot_prove_who_it_is(
    pair: tuple[CprChannel, Peer],
) -> None:
    channel, _ = pair
    with no_descriptor_left(), pytest.raises(CprHostFailed) as caught:
        await channel.hello("a test")
    assert str(caught.value) == (
        "The destination cannot go on at step 'hello': a pidfd cannot be opened: Too many open files"
    )


async def test_a_descriptor_that_cannot_be_sent_is_no_sign_of_a_peer_that_went(pair: tuple[CprChannel, Peer]) -> None:
    channel, _ = pair
    with pytest.raises(CprHostFailed) as caught:
        await channel.send("ready", {}, {"closed": 1 << 20})
    assert str(caught.value) == (
        "The destination cannot go on at step 'hello': 1 descriptors cannot be sent: Bad file descriptor"
    )


@pytest.mark.parametrize(
    ("errors", "text"),
    [
        (
            [OSError(errno.ENOSPC, "No space left on device")],
            "The destination cannot go on at step 'hello': No space left on device",
        ),
        ([MemoryError()], "The destination cannot go on at step 'hello': no memory is left"),
        ([MemoryError(), DescriptorMissing(name="ram")], "The source sent no descriptor named 'ram'"),
    ],
)
async def test_whoever_gives_up_says_why_in_a_sentence(
    pair: tuple[CprChannel, Peer], errors: list[Exception], text: str
) -> None:
    channel, _ = pair
    assert str(channel.blame(ExceptionGroup("all that went wrong", errors))) == text
