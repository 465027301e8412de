from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from vmm.errors import MigrationPeerGone, StreamCorrupt
from vmm.migration.words import Word, hear, say

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

Pair = tuple[trio.SocketStream, trio.SocketStream]


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    left, right = trio.socket.socketpair()
    with left, right:
        yield trio.SocketStream(left), trio.SocketStream(right)


@pytest.mark.parametrize(
    "word", [Word("ready"), Word("loaded"), Word("yours"), Word("refused", "no \N{SNOWMAN}\n\"room\"")]
)  # fmt: skip
async def test_what_is_said_is_heard(word: Word, pair: Pair) -> None:
    await say(pair[0], word)
    assert await hear(pair[1], "source", "nothing happens") == word


async def test_a_reason_of_any_length_is_cut_to_what_a_line_holds(pair: Pair) -> None:
    await say(pair[0], Word("refused", "\N{SNOWMAN}" * 10_000))
    assert await hear(pair[1], "source", "nothing happens") == Word("refused", "\N{SNOWMAN}" * 2048)


async def test_silence_is_told_with_what_it_leads_to(pair: Pair) -> None:
    await pair[0].aclose()
    with pytest.raises(MigrationPeerGone) as caught:
        await hear(pair[1], "source", "nothing happens")
    assert str(caught.value) == "The source closed the connection; nothing happens"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"ready\n", "the source says b'ready\\n', expected one of ready, loaded, refused, yours"),
        (b"[]\n", "the source says b'[]\\n', expected one of ready, loaded, refused, yours"),
        (b'{"word": 7}\n', "the source says b'{\"word\": 7}\\n', expected one of ready, loaded, refused, yours"),
        (
            b'{"word": "refused", "reason": 7}\n',
            'the source says b\'{"word": "refused", "reason": 7}\\n\', expected one of ready, loaded, refused, yours',
        ),
        (b"[" * 9000 + b"\n", "the source says b'" + "[" * 40 + "', expected one of ready, loaded, refused, yours"),
    ],
)
async def test_what_is_no_word_is_quoted(line: bytes, reason: str, pair: Pair) -> None:
    await pair[0].send_all(line)
    with pytest.raises(StreamCorrupt) as caught:
        await hear(pair[1], "source", "nothing happens")
    assert str(caught.value) == f"State stream: {reason}"
