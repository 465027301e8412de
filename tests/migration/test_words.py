from __future__ import annotations

import array
import os
import socket
import tempfile
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from vmm.errors import MigrationPeerGone, StreamCorrupt
from vmm.migration.words import Ear, Word, say, say_with_descriptor, written

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

EXPECTED = "expected one of ready, acknowledged, prepared, loaded, refused, yours"

Pair = tuple[trio.SocketStream, trio.SocketStream]


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    left, right = trio.socket.socketpair()
    with left, right:
        yield trio.SocketStream(left), trio.SocketStream(right)


@pytest.mark.parametrize(
    "word",
    [
        Word("ready"),
        Word("loaded"),
        Word("loaded", at=1 << 60),
        Word("yours"),
        Word("refused", 'no \N{SNOWMAN}\n"room"'),
    ],
)
async def test_what_is_said_is_heard(word: Word, pair: Pair) -> None:
    await say(pair[0], word)
    assert await Ear(pair[1], "source", "nothing happens").hear() == word


async def test_a_reason_of_any_length_is_cut_to_what_a_line_holds(pair: Pair) -> None:
    await say(pair[0], Word("refused", "\N{SNOWMAN}" * 10_000))
    assert await Ear(pair[1], "source", "nothing happens").hear() == Word("refused", "\N{SNOWMAN}" * 2048)


async def test_silence_is_told_with_what_it_leads_to(pair: Pair) -> None:
    await pair[0].aclose()
    with pytest.raises(MigrationPeerGone) as caught:
        await Ear(pair[1], "source", "nothing happens").hear()
    assert str(caught.value) == "The source closed the connection; nothing happens"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"ready\n", f"the source says b'ready\\n', {EXPECTED}"),
        (b"[]\n", f"the source says b'[]\\n', {EXPECTED}"),
        (b'{"word": 7}\n', f"the source says b'{{\"word\": 7}}\\n', {EXPECTED}"),
        (
            b'{"word": "refused", "reason": 7}\n',
            f'the source says b\'{{"word": "refused", "reason": 7}}\\n\', {EXPECTED}',
        ),
        (b'{"word": "loaded", "at": -1}\n', f'the source says b\'{{"word": "loaded", "at": -1}}\\n\', {EXPECTED}'),
        (b'{"word": "loaded", "at": 0.5}\n', f'the source says b\'{{"word": "loaded", "at": 0.5}}\\n\', {EXPECTED}'),
        (
            b'{"word": "loaded", "at": 1' + b"0" * 400 + b"}\n",
            f'the source says b\'{{"word": "loaded", "at": 1{"0" * 14}\', {EXPECTED}',
        ),
        (b"[" * 9000 + b"\n", "the source says b'" + "[" * 40 + f"', {EXPECTED}"),
    ],
)
async def test_what_is_no_word_is_quoted(line: bytes, reason: str, pair: Pair) -> None:
    await pair[0].send_all(line)
    with pytest.raises(StreamCorrupt) as caught:
        await Ear(pair[1], "source", "nothing happens").hear()
    assert str(caught.value) == f"State stream: {reason}"


async def test_words_that_come_together_are_heard_one_by_one(pair: tuple[trio.SocketStream, trio.SocketStream]) -> None:
    await pair[0].send_all(written(Word("ready")) + written(Word("acknowledged")) + written(Word("loaded"))[:5])
    ear = Ear(pair[1], "source", "nothing happens")
    assert [(await ear.hear()).name for _ in range(2)] == ["ready", "acknowledged"]
    await pair[0].send_all(written(Word("loaded"))[5:])
    assert (await ear.hear()).name == "loaded"


@pytest.mark.usefixtures("no_leaks")
async def test_a_descriptor_is_heard_with_its_word() -> None:
    left, right = trio.socket.socketpair()
    with left, right, tempfile.TemporaryFile() as file:
        file.write(b"here")
        file.flush()
        await say_with_descriptor(trio.SocketStream(left), Word("prepared"), file.fileno())
        word, fd = await Ear(trio.SocketStream(right), "destination", "nothing happens").hear_with_descriptor()
        assert word == Word("prepared")
        assert fd is not None
        assert not os.get_inheritable(fd)
        assert os.pread(fd, 16, 0) == b"here"
        os.close(fd)


async def test_a_word_goes_without_the_descriptor_that_may_not_go() -> None:
    left, right = trio.socket.socketpair()
    with left, right:
        # No descriptor of this process: the kernel refuses it, as it does where too many are under way.
        await say_with_descriptor(trio.SocketStream(left), Word("prepared"), 1 << 20)
        heard = await Ear(trio.SocketStream(right), "destination", "nothing happens").hear_with_descriptor()
        assert heard == (Word("prepared"), None)
        right.close()
        with pytest.raises(trio.BrokenResourceError):
            await say_with_descriptor(trio.SocketStream(left), Word("prepared"), 1 << 20)


@pytest.mark.usefixtures("no_leaks")
async def test_a_word_is_heard_without_a_descriptor_too_and_in_pieces(pair: Pair) -> None:
    line = written(Word("refused", "no room"))
    ear = Ear(pair[1], "destination", "nothing happens")
    async with trio.open_nursery() as nursery:

        async def hear() -> None:
            assert await ear.hear_with_descriptor() == (Word("refused", "no room"), None)

        nursery.start_soon(hear)
        for at in range(len(line)):
            await trio.testing.wait_all_tasks_blocked()
            await pair[0].send_all(line[at : at + 1])


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("line", [b"nonsense\n", b"", b"x" * 20000])
async def test_descriptors_that_nobody_asked_for_are_closed(line: bytes, pair: Pair) -> None:
    left = pair[0].socket
    with tempfile.TemporaryFile() as file:
        rights = array.array("i", [file.fileno()] * 3)
        for piece in (b"{", line):
            if piece:
                await left.sendmsg([piece], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    if line:
        left.shutdown(socket.SHUT_WR)
    else:
        left.close()
    with pytest.raises((StreamCorrupt, MigrationPeerGone)):
        await Ear(pair[1], "destination", "nothing happens").hear_with_descriptor()
