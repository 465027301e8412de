"""Sessions over websockets: real sockets on loopback, with trio-websocket's client, and one that breaks rules."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from trio_websocket import ConnectionClosed
from wsproto.events import BytesMessage, CloseConnection, TextMessage

from tests.monitor.fakes import VERSION
from tests.monitor.websocket_kit import Ping, Pong, ask, request, serving
from vmm.capabilities import OBSERVE
from vmm.monitor.json_stream import Limits
from vmm.monitor.output import Bounds
from vmm.monitor.session import SessionOptions
from vmm.monitor.websocket import CLOSING, GOING_AWAY, RESTART

if TYPE_CHECKING:
    from trio_websocket import WebSocketConnection

    from tests.monitor.websocket_kit import Kit

pytestmark = pytest.mark.usefixtures("no_leaks")

SMALL = SessionOptions(VERSION, framed=True, limits=Limits(size=1000))


async def end_of(client: WebSocketConnection) -> tuple[int, str | None]:
    """Read to the end; return code and reason."""
    try:
        while True:
            await client.get_message()
    except ConnectionClosed as closed:
        reason = closed.reason
    return (reason.code, reason.reason) if reason is not None else (0, None)


async def none_left(kit: Kit) -> None:
    while kit.monitor.sessions:
        await trio.lowlevel.checkpoint()


# --- messages and frames ------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_each_frame_is_one_message_without_a_line_end(host: str) -> None:
    async with serving(host=host) as kit, kit.client() as client:
        await client.send_message('{"execute":"echo","arguments":{"n":1},"id":"a"}')
        assert await client.get_message() == '{"return": {"n": 1}, "id": "a"}'
        kit.hub.emit("STOP")
        kit.hub.emit("RESUME")
        for name in ("STOP", "RESUME"):
            frame = await client.get_message()
            assert isinstance(frame, str)
            assert frame == frame.strip()
            assert json.loads(frame)["event"] == name
        assert list(kit.monitor.sessions) == ["ws0/1"]


async def test_several_clients_are_served_at_the_same_time() -> None:
    async with serving() as kit, kit.client() as one, kit.client(oob=True) as other:
        for client, n in ((one, 1), (other, 2), (one, 3)):
            assert await ask(client, {"execute": "echo", "arguments": {"n": n}}) == {"return": {"n": n}}
        kit.hub.emit("STOP")
        for client in (one, other):
            assert json.loads(await client.get_message())["event"] == "STOP"


async def test_oob_overtakes_as_it_does_on_every_monitor() -> None:
    async with serving() as kit, kit.client(oob=True) as client:
        await client.send_message('{"execute":"slow","id":1}')
        await kit.executor.begun.wait()
        assert await ask(client, '{"exec-oob":"yank","id":2}') == {"return": {}, "id": 2}
        kit.executor.release.set()
        assert json.loads(await client.get_message()) == {"return": {}, "id": 1}


async def test_a_message_may_come_in_several_frames() -> None:
    async with serving() as kit, kit.upgraded() as raw:
        await raw.send(
            TextMessage('{"execute":', message_finished=False),
            TextMessage('"echo", "arguments":', message_finished=False),
            Ping(b"in between"),
            TextMessage('{"n": "\u00e4\U0001f427"}}'),
        )
        assert await raw.event() == Pong(b"in between")
        assert await raw.message() == {"return": {"n": "\u00e4\U0001f427"}}


@pytest.mark.parametrize(
    ("frame", "desc"),
    [
        ('{"execute":"echo"}{"execute":"echo"}', "A frame must hold one message, and this one holds more"),
        ("", "A frame must hold one message, and this one holds none"),
        (" \r\n", "A frame must hold one message, and this one holds none"),
        ('{"execute":"ec', "Malformed JSON: the frame ends inside the message"),
        ("null", "A request must be a JSON object with the member 'execute', not null"),
    ],
)
async def test_a_frame_that_is_not_one_message_is_answered_and_does_no_harm(frame: str, desc: str) -> None:
    async with serving() as kit, kit.client() as client:
        assert await ask(client, frame) == {"error": {"class": "GenericError", "desc": desc}}
        assert await ask(client, {"execute": "echo"}) == {"return": {}}
        assert kit.executor.log == ["echo"]


async def test_a_session_has_the_grant_of_its_monitor() -> None:
    async with serving(options=SessionOptions(VERSION, framed=True, grant=OBSERVE)) as kit, kit.client():
        assert kit.monitor.sessions["ws0/1"].grant is OBSERVE


async def test_a_message_larger_than_any_buffer_comes_and_goes_whole() -> None:
    text = "x" * (4 << 20)
    async with serving() as kit, kit.client() as client:
        assert await ask(client, {"execute": "echo", "arguments": {"n": text}}) == {"return": {"n": text}}


# --- what is refused ----------------------------------------------------------------------------------------


async def test_binary_frames_are_refused_after_what_came_before_them_was_answered() -> None:
    async with serving() as kit, kit.client() as client:
        await client.send_message('{"execute":"echo","id":1}')
        await client.send_message(b'{"execute":"echo","id":2}')
        assert json.loads(await client.get_message()) == {"return": {}, "id": 1}
        assert await end_of(client) == (1003, "QMP is text; send text frames")
        await none_left(kit)
        assert kit.executor.log == ["echo"]


async def test_a_message_that_is_too_big_ends_its_own_connection_only() -> None:
    async with serving(options=SMALL) as kit, kit.client() as other, kit.client() as client:
        assert await ask(client, {"execute": "echo", "arguments": {"n": "x" * 900}}) == {"return": {"n": "x" * 900}}
        await client.send_message("x" * 1001)
        assert await end_of(client) == (1009, "Exceeded maximum message size: 1000 bytes")
        assert await ask(other, {"execute": "echo"}) == {"return": {}}
        while len(kit.monitor.sessions) > 1 or not kit.log:
            await trio.lowlevel.checkpoint()
        assert kit.log == ["ws0/2: the client sent a message of more than 1000 characters, so it was dropped"]


async def test_a_client_may_send_the_whole_of_what_is_too_big_before_it_reads_so(mock_clock: MockClock) -> None:
    async with serving(options=SMALL) as kit, kit.upgraded() as raw:
        size = 32 << 20  # more than all buffers hold
        await raw.stream.send_all(struct.pack("!BBQI", 0x81, 0xFF, size, 0) + bytes(size))
        event = await raw.event()
        assert isinstance(event, CloseConnection)
        assert (event.code, event.reason) == (1009, "Exceeded maximum message size: 1000 bytes")


@pytest.mark.parametrize(
    "frames",
    [
        b"\x81\x02{}",  # not masked
        b"\x83\x80\0\0\0\0",  # an opcode that there is not
        b"\xc1\x80\0\0\0\0",  # a bit of an extension
        b"\x09\x80\0\0\0\0",  # a ping in parts
        b"\x89\xfe\x00\x7e\0\0\0\0",  # a ping of 126 bytes
        b"\x80\x80\0\0\0\0",  # goes on with nothing
        b"\x81\x81\0\0\0\0\xff",  # not UTF-8
    ],
)
async def test_who_breaks_the_protocol_is_hung_up_on(frames: bytes) -> None:
    async with serving() as kit, kit.client() as other:
        async with kit.upgraded() as raw:
            await raw.stream.send_all(frames)
            assert await raw.closed() is None
        while len(kit.monitor.sessions) > 1:
            await trio.lowlevel.checkpoint()
        assert await ask(other, {"execute": "echo"}) == {"return": {}}


async def test_what_the_library_does_not_expect_of_a_client_ends_its_connection_only() -> None:
    """More that is too big, and a ping, once the closing has begun: both end the library's reader with an error."""
    async with serving(options=SMALL) as kit, kit.client() as other:
        async with kit.upgraded() as raw:
            await raw.send(TextMessage("x" * 1500, message_finished=False), TextMessage("y" * 1500), Ping(b"late"))
            assert (await raw.closed() or (0, ""))[0] == 1009
        async with kit.upgraded() as raw:
            await raw.send(BytesMessage(b"no"))
            closing = await raw.event()
            assert isinstance(closing, CloseConnection)
            await raw.stream.send_all(b"\x89\x80\0\0\0\0" * 2)  # pings in place of an agreement
            assert await raw.closed() is None
        while len(kit.monitor.sessions) > 1 or len(kit.log) < 2:
            await trio.lowlevel.checkpoint()
        assert "ws0/2: the client sent a message of more than 1000 characters, so it was dropped" in kit.log
        assert any(line.startswith("ws0/3: the client broke the websocket protocol (") for line in kit.log)
        assert await ask(other, {"execute": "echo"}) == {"return": {}}


# --- clients that are slow, or leave ------------------------------------------------------------------------


async def test_a_ping_is_answered_also_while_a_command_is_under_way() -> None:
    async with serving() as kit, kit.client() as client:
        await client.ping(b"idle")
        await client.send_message('{"execute":"slow"}')
        await kit.executor.begun.wait()
        await client.ping(b"busy")
        kit.executor.release.set()
        assert json.loads(await client.get_message()) == {"return": {}}


FEW = SessionOptions(VERSION, framed=True, bounds=Bounds(events=20))


async def flood(kit: Kit, reader: WebSocketConnection, until: str) -> int:
    """Tell large events, which `reader` reads, until session `until` is dropped; return how many."""
    slow = kit.monitor.sessions[until]
    for n in range(1, 10_000):
        kit.hub.emit("VSERPORT_CHANGE", {"id": str(n), "open": "x" * 65536})
        assert json.loads(await reader.get_message())["data"]["id"] == str(n)
        await wait_all_tasks_blocked()
        if slow.dropped:
            return n
    raise AssertionError("never dropped")


async def test_a_client_that_does_not_read_is_dropped_and_nobody_else_is_held_up(mock_clock: MockClock) -> None:
    async with serving(options=FEW) as kit, kit.client() as reader, kit.upgraded(small=True) as slow:
        told = await flood(kit, reader, "ws0/2")
        assert told > 20
        assert await ask(reader, {"execute": "echo"}) == {"return": {}}
        mock_clock.jump(CLOSING)
        while len(kit.monitor.sessions) > 1:
            await trio.lowlevel.checkpoint()
        (line,) = kit.log
        assert line.startswith("ws0/2: the client did not read 21 events (")
        assert line.endswith(" bytes), so it was dropped")
        assert await slow.closed() is None
        assert await ask(reader, {"execute": "echo"}) == {"return": {}}


async def test_a_client_that_does_not_read_is_hung_up_on_although_its_command_goes_on(mock_clock: MockClock) -> None:
    async with serving(options=FEW) as kit, kit.client() as reader, kit.upgraded(small=True) as slow:
        await slow.send(TextMessage('{"execute":"slow"}'))
        await kit.executor.begun.wait()
        await flood(kit, reader, "ws0/2")
        mock_clock.jump(CLOSING)
        assert await slow.closed() is None
        assert kit.executor.log == ["slow"]
        kit.executor.release.set()
        while len(kit.monitor.sessions) > 1:
            await trio.lowlevel.checkpoint()
        assert kit.executor.log == ["slow", "slow  done"]


async def test_a_client_that_reads_again_just_after_it_was_dropped_learns_why(mock_clock: MockClock) -> None:
    async with serving(options=FEW) as kit, kit.client() as reader, kit.upgraded(small=True) as slow:
        await flood(kit, reader, "ws0/2")
        code, reason = await slow.closed() or (0, "")
        assert code == 1008
        assert str(reason).startswith("the client did not read 21 events (")


async def test_a_client_that_does_not_read_replies_is_not_read_either() -> None:
    options = SessionOptions(VERSION, framed=True, bounds=Bounds(reading_stops_at=100_000))
    async with serving(options=options) as kit, kit.upgraded() as slow:
        question = TextMessage(json.dumps({"execute": "echo", "arguments": {"n": "x" * 50_000}}))

        async def write() -> None:
            while True:
                await slow.send(question)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            before = -1
            while before != len(kit.executor.log):  # as long as buffers fill
                before = len(kit.executor.log)
                assert before < 2000
                for _ in range(50):
                    await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        for _ in range(before):
            assert len((await slow.message())["return"]["n"]) == 50_000


async def test_a_client_that_vanishes_ends_its_session_only() -> None:
    async with serving() as kit, kit.client() as other:
        async with kit.upgraded() as raw:
            await raw.send(TextMessage('{"execute":"slow"}'))
            await kit.executor.begun.wait()
            raw.stream.setsockopt(1, 13, struct.pack("ii", 1, 0))  # SO_LINGER of 0 s: a reset
        kit.executor.release.set()
        while len(kit.monitor.sessions) > 1:
            await trio.lowlevel.checkpoint()
        assert kit.executor.log == ["slow", "slow  done"]
        assert await ask(other, {"execute": "echo"}) == {"return": {}}


async def test_what_was_sent_before_the_client_closed_is_carried_out() -> None:
    async with serving() as kit:
        async with kit.client() as client:
            await client.send_message('{"execute":"echo","arguments":{"n":7}}')
        await none_left(kit)
        assert kit.executor.log == ["echo 7"]


# --- the end, and a live update -----------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "reason"), [(RESTART, "connect again"), (GOING_AWAY, "the monitor ends")])
async def test_at_the_end_clients_get_their_replies_and_then_the_reason(code: int, reason: str) -> None:
    async with serving() as kit, kit.client() as idle, kit.client() as busy:
        await busy.send_message('{"execute":"slow"}')
        await kit.executor.begun.wait()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kit.monitor.close, 60.0, code, reason)
            assert await end_of(idle) == (code, reason)
            kit.executor.release.set()
            assert json.loads(await busy.get_message()) == {"return": {}}
            assert await end_of(busy) == (code, reason)


async def test_a_client_that_does_not_agree_to_the_end_does_not_put_it_off(mock_clock: MockClock) -> None:
    async with serving() as kit, kit.upgraded() as raw:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kit.monitor.close, 60.0, RESTART, "connect again")
            event = await raw.event()
            assert isinstance(event, CloseConnection)
            assert (event.code, event.reason) == (RESTART, "connect again")
            await wait_all_tasks_blocked()
            mock_clock.jump(CLOSING)
        assert await raw.event() is None


async def test_a_command_without_end_does_not_put_off_the_end(mock_clock: MockClock) -> None:
    async with serving() as kit, kit.client() as client:
        await client.send_message('{"execute":"slow"}')
        await kit.executor.begun.wait()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kit.monitor.close, 1.0, GOING_AWAY, "the monitor ends")
            await wait_all_tasks_blocked()
            mock_clock.jump(1.0)
            assert await end_of(client) == (GOING_AWAY, "the monitor ends")


async def test_while_it_is_held_clients_wait_for_this_process_or_the_next() -> None:
    async with serving() as kit, kit.client() as old:
        kit.monitor.hold()
        async with kit.raw() as first, kit.raw() as second:
            await first.stream.send_all(request(kit.port))
            await second.stream.send_all(request(kit.port))
            assert await ask(old, {"execute": "echo"}) == {"return": {}}
            await wait_all_tasks_blocked()
            assert len(kit.monitor.sessions) == 1
            # What a successor with the same listener would find: clients that wait.
            taken, _ = kit.listener.accept()
            taken.close()
            kit.monitor.go_on()
            assert (await second.response()).status == 101


async def test_after_the_end_nobody_is_accepted() -> None:
    async with serving() as kit:
        await kit.monitor.close(1.0, GOING_AWAY, "the monitor ends")
        async with kit.raw() as raw:
            await raw.stream.send_all(request(kit.port))
            await wait_all_tasks_blocked()
            assert not kit.monitor.sessions
