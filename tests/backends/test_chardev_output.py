"""The buffer between vCPU threads and the loop, and the bell."""

from __future__ import annotations

import threading

import pytest
import trio
import trio.testing

from vmm.backends.chardev_output import OutputBuffer
from vmm.backends.chardev_state import BUFFER_LIMIT, ChardevState
from vmm.backends.chardev_watch import Watch


@pytest.fixture
def rings() -> list[None]:
    return []


@pytest.fixture
def output(rings: list[None]) -> OutputBuffer:
    return OutputBuffer(lambda: rings.append(None))


def test_the_bell_rings_when_there_is_something_where_there_was_nothing(
    output: OutputBuffer, rings: list[None]
) -> None:
    assert [output.put(b"a"), output.put(b"b")] == [1, 1]
    assert len(rings) == 1
    output.sent(2)
    output.put(b"c")
    assert len(rings) == 2


def test_putting_nothing_rings_nothing(output: OutputBuffer, rings: list[None]) -> None:
    assert output.put(b"") == 0
    assert rings == []


def test_while_output_gathers_the_bell_rings_only_when_the_buffer_is_full(
    output: OutputBuffer, rings: list[None]
) -> None:
    with output.gathering():
        output.put(b"a")
        assert rings == []
        output.put(bytes(BUFFER_LIMIT - 1))
        assert len(rings) == 1


def test_a_full_buffer_takes_what_fits_and_tells_when_there_is_room(output: OutputBuffer) -> None:
    assert output.put(bytes(BUFFER_LIMIT - 1)) == BUFFER_LIMIT - 1
    assert output.room() == 1
    assert output.put(b"ab") == 1
    assert output.put(b"b") == 0
    assert output.sent(1), "the producer was short"
    assert not output.sent(1), "and has been told"
    assert output.room() == 2


def test_who_asks_for_room_and_finds_none_is_told(output: OutputBuffer) -> None:
    output.put(bytes(BUFFER_LIMIT))
    assert output.room() == 0
    assert output.sent(1)


def test_what_is_peeked_at_stays(output: OutputBuffer) -> None:
    output.put(b"abc")
    assert output.peek(2) == b"ab"
    output.sent(1)
    assert output.peek(10) == b"bc"
    assert output.held == 2


def test_dropping_forgets_what_is_held_and_takes_all(output: OutputBuffer, rings: list[None]) -> None:
    output.put(bytes(BUFFER_LIMIT))
    output.put(b"x")
    assert output.drop()
    assert (output.put(bytes(BUFFER_LIMIT * 2)), output.held, output.room()) == (BUFFER_LIMIT * 2, 0, BUFFER_LIMIT)
    output.keep()
    assert output.put(b"y") == 1
    assert output.held == 1
    assert len(rings) == 2


def test_refusing_keeps_what_is_held_and_takes_nothing(output: OutputBuffer) -> None:
    output.put(b"held")
    output.refuse()
    assert (output.put(b"more"), output.room(), output.peek(100)) == (0, 0, b"held")
    output.keep()
    assert output.sent(0), "the producer was short while nothing was taken"


def test_what_a_predecessor_held_comes_first(output: OutputBuffer) -> None:
    output.put(b" world")
    output.load(b"hello")
    assert output.peek(100) == b"hello world"


async def test_threads_lose_no_byte_and_no_ring() -> None:
    watch = Watch()
    output = OutputBuffer(watch.ring)
    total = 200_000

    def produce() -> None:
        for count in range(total // 10):
            data = b"%010d" % count
            while data:
                data = data[output.put(data) :]

    thread = threading.Thread(target=produce)
    thread.start()
    taken = bytearray()
    with trio.fail_after(60):
        while len(taken) < total:
            chunk = output.peek(1000)
            if not chunk:
                await watch.wait()
            taken += chunk
            output.sent(len(chunk))
    thread.join()
    watch.close()
    assert bytes(taken) == b"".join(b"%010d" % count for count in range(total // 10))


async def test_a_ring_before_the_wait_is_heard_and_one_after_the_close_is_none() -> None:
    watch = Watch()
    watch.ring()
    watch.ring()
    await watch.wait()
    with trio.move_on_after(0) as scope:
        await watch.wait()
    assert scope.cancelled_caught, "rings that were heard are over"
    watch.close()
    watch.close()
    watch.ring()


async def test_a_cancelled_wait_loses_no_ring() -> None:
    watch = Watch()
    with trio.CancelScope() as scope:
        scope.cancel()
        watch.ring()
        await watch.wait()
    with trio.fail_after(60):
        await watch.wait()
    watch.close()


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("output", bytes(BUFFER_LIMIT + 1), "65537 bytes, at most 65536 fit"),
        ("input", bytes(BUFFER_LIMIT + 1), "65537 bytes, at most 65536 fit"),
        ("terminal", b"abc", "3 bytes, 56 are a terminal's settings, or 0"),
    ],
)
def test_a_state_that_cannot_be_is_refused(field: str, value: bytes, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ChardevState(**{field: value})  # type: ignore[arg-type]
