from __future__ import annotations

import os
import re
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.monitor.fakes import VERSION, Bench, bench
from vmm.monitor.output import Bounds
from vmm.monitor.session import Session, SessionOptions
from vmm.monitor.unix import SocketTransport, qmp_monitor

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from typing import Any

    from vmm.monitor.belongings import SessionState
    from vmm.monitor.ports import Transport


async def test_the_greeting_names_version_and_capabilities() -> None:
    async with bench() as it:
        assert await it.client.line() == (
            b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 1, "major": 11}, "package": "trio-vmm-0.1"}, '
            b'"capabilities": ["oob"]}}\r\n'
        )
    async with bench(SessionOptions(VERSION, oob=False)) as it:
        assert (await it.client.receive())["QMP"]["capabilities"] == []


# The order of check: each request has every later fault too, and the reply tells the first.
ORDER: list[tuple[str, str, str]] = [
    ("[1]", "GenericError", "A request must be a JSON object with the member 'execute', not an array"),
    ("null", "GenericError", "A request must be a JSON object with the member 'execute', not null"),
    (
        '{"id":7,"execute":true,"arguments":[],"x":1}',
        "GenericError",
        "Request member 'execute' must be a string, the name of a command",
    ),
    (
        '{"id":7,"execute":"a","exec-oob":"b","x":1}',
        "GenericError",
        "Request member 'exec-oob' clashes with 'execute'; give one of them",
    ),
    ('{"id":7,"arguments":[],"x":1}', "GenericError", "Request member 'arguments' must be an object"),
    (
        '{"id":7,"x":1,"arguments":[]}',
        "GenericError",
        "Request member 'x' is unexpected; there are 'execute', 'exec-oob', 'arguments' and 'id'",
    ),
    (
        '{"id":7,"arguments":{}}',
        "GenericError",
        "The request lacks the member 'execute', the name of a command",
    ),
    (
        '{"id":7,"exec-oob":"nope"}',
        "CommandNotFound",
        "There is no command 'nope'; query-commands lists those there are",
    ),
    ('{"id":7,"exec-oob":"fail"}', "GenericError", "Command 'fail' can't be run out of band; use 'execute'"),
    ('{"id":7,"execute":"fail"}', "DeviceNotFound", "Device 'disk0' does not exist"),
]


@pytest.mark.parametrize(("request_text", "error_class", "text"), ORDER)
async def test_the_first_fault_in_the_order_of_check_is_told_and_the_id_echoed(
    request_text: str, error_class: str, text: str
) -> None:
    async with bench() as it:
        await it.client.negotiate(oob=True)
        reply = await it.client.ask(request_text.encode() + b"\n")
        expected: dict[str, Any] = {"error": {"class": error_class, "desc": text}}
        if '"id"' in request_text:
            expected["id"] = 7
        assert reply == expected


async def test_exec_oob_is_unexpected_where_it_was_not_enabled() -> None:
    async with bench() as it:
        await it.client.negotiate()
        reply = await it.client.ask({"exec-oob": "yank", "id": "x"})
        text = "Request member 'exec-oob' is unexpected: out-of-band execution was not enabled with qmp_capabilities"
        assert reply == {"error": {"class": "GenericError", "desc": text}, "id": "x"}


async def test_nothing_is_admitted_before_the_negotiation() -> None:
    async with bench() as it:
        await it.client.receive()
        for name in ("echo", "nope"):
            reply = await it.client.ask({"execute": name})
            text = f"Command '{name}' has to wait: the session begins with 'qmp_capabilities'"
            assert reply == {"error": {"class": "CommandNotFound", "desc": text}}
        assert it.executor.log == []
        reply = await it.client.ask({"execute": "qmp_capabilities", "arguments": {"enable": ["oob", "x"], "y": 1}})
        assert reply["error"]["desc"] == (
            "Command 'qmp_capabilities': 'y' is unexpected; there are 'enable'; "
            "'enable[1]' does not accept \"x\"; it accepts 'oob'"
        )
        assert await it.client.ask({"execute": "qmp_capabilities"}) == {"return": {}}
        reply = await it.client.ask({"execute": "qmp_capabilities"})
        text = "Command 'qmp_capabilities' was given already; this session is negotiated"
        assert reply == {"error": {"class": "CommandNotFound", "desc": text}}


async def test_a_capability_that_is_not_offered_is_refused_and_the_session_stays_unnegotiated() -> None:
    async with bench(SessionOptions(VERSION, oob=False)) as it:
        await it.client.receive()
        reply = await it.client.ask({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}})
        text = "Capability 'oob' is not available on this monitor, whose greeting offers none"
        assert reply == {"error": {"class": "GenericError", "desc": text}}
        assert (await it.client.ask({"execute": "echo"}))["error"]["class"] == "CommandNotFound"


@pytest.mark.parametrize("identity", [None, 0, "é", [1, {"a": []}], 2**64 - 1, 1.5, {}])
async def test_any_id_is_echoed(identity: object) -> None:
    async with bench() as it:
        await it.client.negotiate()
        reply = await it.client.ask({"execute": "echo", "arguments": {"n": 1}, "id": identity})
        assert reply == {"return": {"n": 1}, "id": identity}


async def test_an_id_deeper_than_python_recurses_is_echoed() -> None:
    async with bench() as it:
        await it.client.negotiate()
        deep = b"[" * 1023 + b"]" * 1023
        await it.client.send(b'{"execute":"echo","id":' + deep + b"}")
        assert await it.client.line() == b'{"return": {}, "id": ' + deep + b"}\r\n"


async def test_malformed_messages_are_answered_in_order_without_id() -> None:
    async with bench() as it:
        await it.client.negotiate()
        await it.client.send(b'{"execute":"echo","id":1}{"id":2,}{"execute":"echo","id":3}\n')
        replies = [await it.client.receive() for _ in range(3)]
        assert [reply.get("id") for reply in replies] == [1, None, 3]
        assert replies[1]["error"]["class"] == "GenericError"


@pytest.mark.parametrize(
    "begin", [b"POST / HTTP/1.1", b"\r\n\tGET /", b"\x16\x03\x01", b'"', b"[", b"\xef\xbb\xbf{}", b"}"]
)
async def test_who_may_be_anybody_and_begins_with_no_object_is_hung_up_on(begin: bytes) -> None:
    asked = b'\r\n{"execute": "qmp_capabilities"}\n{"execute": "echo"}\n'
    async with bench(SessionOptions(VERSION, anybody=True)) as it:
        await it.client.send(begin + asked)
        await wait_all_tasks_blocked()
        while it.monitor.sessions:
            await trio.lowlevel.checkpoint()
        assert it.executor.log == []
        (said,) = it.log
        assert said == f"qmp0/1: the client began with {(begin + asked)[:16]!r}, which is no QMP, so it was dropped"


async def test_who_may_be_anybody_may_begin_with_space_and_err_later() -> None:
    async with bench(SessionOptions(VERSION, anybody=True)) as it:
        await it.client.send(b" \r\n\t")
        await wait_all_tasks_blocked()
        await it.client.negotiate()
        assert "error" in await it.client.ask(b"POST\n")
        assert await it.client.ask({"execute": "echo"}) == {"return": {}}


@pytest.mark.parametrize(("before", "hung_up_on"), [(b"", True), (b" \n", True), (b"{", False)])
async def test_who_may_be_anybody_is_so_to_a_successor(before: bytes, hung_up_on: bool) -> None:
    options = SessionOptions(VERSION, anybody=True)
    async with bench(options) as it:
        await it.client.receive()
        await it.client.send(before)
        await wait_all_tasks_blocked()
        (session,) = it.monitor.sessions.values()
        it.monitor.quiesce()
        session.hold()
        await session.rest()
        async with successor(session, session.save(), it, options):
            await it.client.send(b"GET\n")
            said = await it.client.receive()
            assert (said is None) == hung_up_on


async def test_output_is_ascii_and_ends_in_crlf() -> None:
    async with bench() as it:
        await it.client.negotiate()
        await it.client.send({"execute": "echo", "arguments": {"n": "é\n"}})
        assert await it.client.line() == b'{"return": {"n": "\\u00e9\\n"}}\r\n'


async def test_pretty_output_is_spread_over_lines() -> None:
    async with bench(SessionOptions(VERSION, pretty=True)) as it:
        while (await it.client.line()) != b"}\r\n":
            pass
        await it.client.send({"execute": "qmp_capabilities"})
        assert [await it.client.line() for _ in range(3)] == [b"{\r\n", b'    "return": {}\r\n', b"}\r\n"]


async def test_without_oob_the_next_request_waits_for_the_reply() -> None:
    async with bench() as it:
        await it.client.negotiate()
        await it.client.send(b'{"execute":"slow","id":1}{"execute":"echo","id":2}')
        await it.executor.begun.wait()
        await wait_all_tasks_blocked()
        assert it.executor.log == ["slow"]
        it.executor.release.set()
        assert [(await it.client.receive())["id"] for _ in range(2)] == [1, 2]


async def test_out_of_band_requests_pass_those_that_wait() -> None:
    async with bench() as it:
        await it.client.negotiate(oob=True)
        await it.client.send(b'{"execute":"slow","id":1}{"execute":"echo","id":2}{"exec-oob":"yank","id":3}')
        assert (await it.client.receive())["id"] == 3
        assert await it.client.ask({"exec-oob": "fail", "id": 4}) == {
            "error": {"class": "GenericError", "desc": "Command 'fail' can't be run out of band; use 'execute'"},
            "id": 4,
        }
        it.executor.release.set()
        assert [(await it.client.receive())["id"] for _ in range(2)] == [1, 2]


async def test_with_oob_malformed_messages_keep_their_place() -> None:
    async with bench() as it:
        await it.client.negotiate(oob=True)
        await it.client.send(b'{"execute":"slow","id":1}{]\n{"execute":"echo","id":2}{"exec-oob":"yank","id":3}')
        assert (await it.client.receive())["id"] == 3
        it.executor.release.set()
        assert [(await it.client.receive()).get("id") for _ in range(3)] == [1, None, 2]


async def test_eight_requests_queue_and_then_reading_stops() -> None:
    async with bench() as it:
        await it.client.negotiate(oob=True)
        await it.client.send({"execute": "slow"})
        await it.executor.begun.wait()
        for n in range(7):
            await it.client.send({"execute": "echo", "id": n})
        assert await it.client.ask({"exec-oob": "yank", "id": "early"}) == {"return": {}, "id": "early"}
        await it.client.send({"execute": "echo", "id": 7})
        await it.client.send({"exec-oob": "yank", "id": "late"})
        await wait_all_tasks_blocked()
        assert it.executor.log == ["slow", "yank"]
        it.executor.release.set()
        replies = [await it.client.receive() for _ in range(10)]
        assert [reply["id"] for reply in replies if "id" in reply and reply["id"] != "late"] == list(range(8))
        assert {"return": {}, "id": "late"} in replies


async def test_with_oob_many_requests_are_answered_in_order() -> None:
    async with bench() as it:
        await it.client.negotiate(oob=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.client.send, b"".join(b'{"execute":"echo","id":%d}' % n for n in range(500)))
            assert [(await it.client.receive())["id"] for n in range(500)] == list(range(500))


async def test_events_go_to_every_session_in_command_mode_only() -> None:
    async with bench() as it:
        other = it.connect()
        await other.receive()
        await it.client.negotiate()
        it.hub.emit("STOP")
        event = await it.client.receive()
        assert event == {"event": "STOP", "timestamp": {"seconds": 1700000000, "microseconds": 123456}}
        assert await other.ask({"execute": "qmp_capabilities"}) == {"return": {}}
        it.hub.emit("RESUME")
        assert (await other.receive())["event"] == "RESUME"
        assert (await it.client.receive())["event"] == "RESUME"


async def test_a_command_under_way_in_one_session_does_not_hold_up_another() -> None:
    async with bench() as it:
        await it.client.negotiate()
        await it.client.send({"execute": "slow"})
        await it.executor.begun.wait()
        other = it.connect()
        await other.negotiate()
        assert await other.ask({"execute": "echo"}) == {"return": {}}


@pytest.mark.parametrize("oob", [False, True])
async def test_a_client_that_hangs_up_does_not_undo_its_command(oob: bool) -> None:
    async with bench() as it:
        await it.client.negotiate(oob=oob)
        await it.client.send({"execute": "slow"})
        await it.executor.begun.wait()
        it.client.sock.close()
        await wait_all_tasks_blocked()
        it.executor.release.set()
        while it.monitor.sessions:
            await trio.lowlevel.checkpoint()
        assert it.executor.log == ["slow", "slow  done"]


@pytest.mark.parametrize("oob", [False, True])
async def test_requests_before_the_end_of_the_input_are_all_answered(oob: bool) -> None:
    async with bench() as it:
        await it.client.negotiate(oob=oob)
        await it.client.send(b'{"execute":"slow","id":1}{"execute":"echo","id":2}{"execute":"echo","id":3}{"execute":')
        it.client.sock.shutdown(socket.SHUT_WR)
        await it.executor.begun.wait()
        await wait_all_tasks_blocked()
        it.executor.release.set()
        assert [(await it.client.receive())["id"] for _ in range(3)] == [1, 2, 3]
        assert await it.client.receive() is None


async def test_a_bug_in_a_command_goes_on_up() -> None:
    with pytest.RaisesGroup(ZeroDivisionError, flatten_subgroups=True):
        async with bench() as it:
            await it.client.negotiate()
            await it.client.send({"execute": "bug"})
            await trio.sleep_forever()


async def test_a_client_that_does_not_read_its_events_is_dropped_and_others_are_not() -> None:
    async with bench(SessionOptions(VERSION, bounds=Bounds(events=100))) as it:
        await it.client.negotiate()
        other = it.connect()
        await other.negotiate()
        emitted = 0
        while "qmp0/1" in it.monitor.sessions:
            it.hub.emit("STOP")
            emitted += 1
            assert (await other.receive())["event"] == "STOP"
        assert emitted > 100
        (line,) = it.log
        assert re.fullmatch(r"qmp0/1: the client did not read 101 events \(\d+ bytes\), so it was dropped", line)
        assert await other.ask({"execute": "echo"}) == {"return": {}}


async def test_a_client_that_does_not_read_its_replies_is_not_read() -> None:
    async with bench(SessionOptions(VERSION, bounds=Bounds(reading_stops_at=1000))) as it:
        await it.client.negotiate()
        it.executor.reply = {"x": "y" * 100_000}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.client.send, b'{"execute":"query-version"}' * 50)
            await wait_all_tasks_blocked()
            begun = len(it.executor.log)
            assert begun < 50
            for _ in range(50):
                assert len((await it.client.receive())["return"]["x"]) == 100_000
        assert len(it.executor.log) == 50


async def test_closing_waits_for_the_reply_and_its_reader() -> None:
    async with bench() as it:
        await it.client.negotiate()
        it.executor.reply = {"x": "y" * 3_000_000}
        await it.client.send({"execute": "slow"})
        await it.executor.begun.wait()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.monitor.close, 60)
            await wait_all_tasks_blocked()
            it.executor.release.set()
            assert len((await it.client.receive())["return"]["x"]) == 3_000_000
            assert await it.client.receive() is None


async def test_closing_gives_up_on_a_client_that_does_not_read(autojump_clock: trio.testing.MockClock) -> None:
    async with bench() as it:
        await it.client.negotiate()
        it.executor.reply = {"x": "y" * 3_000_000}
        await it.client.send({"execute": "query-version"})
        await wait_all_tasks_blocked()
        start = trio.current_time()
        await it.monitor.close(3)
        assert trio.current_time() - start == 3
        while it.monitor.sessions:
            await trio.lowlevel.checkpoint()


async def test_descriptors_wait_for_the_command_that_takes_them_and_newer_ones_replace_them() -> None:
    async with bench() as it:
        await it.client.negotiate()
        pipes = [os.pipe() for _ in range(3)]
        for read_end, _ in pipes:
            await it.client.sock.sendmsg(
                [b" "], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, read_end.to_bytes(4, "little"))]
            )
            await wait_all_tasks_blocked()
            os.close(read_end)
        for _, write_end in pipes[:2]:
            with pytest.raises(BrokenPipeError):
                os.write(write_end, b"x")
        assert await it.client.ask({"execute": "claim"}) == {"return": 1}
        (claimed,) = it.executor.claimed
        assert not os.get_inheritable(claimed)
        os.write(pipes[2][1], b"hello")
        assert os.read(claimed, 5) == b"hello"
        for fd in (claimed, *(write_end for _, write_end in pipes)):
            os.close(fd)


async def test_at_most_sixteen_descriptors_come_with_a_message_and_a_session_closes_its_own() -> None:
    before = _open_descriptors()
    async with bench() as it:
        await it.client.negotiate()
        read_end, write_end = os.pipe()
        rights = b"".join(read_end.to_bytes(4, "little") for _ in range(20))
        await it.client.sock.sendmsg([b'{"execute":"claim"}'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        assert await it.client.receive() == {"return": 16}
        for fd in it.executor.claimed:
            os.close(fd)
        for request in (b'{"execute":"getfd"}', b" "):
            await it.client.sock.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights[:4])])
        assert await it.client.receive() == {"return": {}}
        os.close(read_end)
        it.client.sock.close()
        while it.monitor.sessions:
            await trio.lowlevel.checkpoint()
        with pytest.raises(BrokenPipeError):
            os.write(write_end, b"x")
        os.close(write_end)
    assert _open_descriptors() == before


def _open_descriptors() -> int:
    """Count this process's descriptors, without those of trio, which it makes and closes as it likes."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue
    return sum(link.startswith(("socket:", "pipe:")) for link in links)


async def test_a_session_at_rest_goes_on_over_its_socket() -> None:
    async with bench() as it:
        await it.client.negotiate(oob=True)
        await it.client.send(b'{"execute": "ec')
        await wait_all_tasks_blocked()
        (session,) = it.monitor.sessions.values()
        it.monitor.quiesce()
        session.hold()
        state = session.save()
        assert state.stream.unparsed == b'{"execute": "ec'
        async with successor(session, state, it):
            await it.client.send(b'ho", "id": 1}{"exec-oob": "yank", "id": 2}')
            assert await it.client.receive() == {"return": {}, "id": 1}
            assert await it.client.receive() == {"return": {}, "id": 2}


async def test_a_session_at_rest_takes_unsent_output_and_waiting_requests_along() -> None:
    async with bench(SessionOptions(VERSION, bounds=Bounds(reading_stops_at=1000))) as it:
        await it.client.negotiate()
        it.executor.reply = {"x": "y" * 1_000_000}
        requests = b'{"execute":"query-version","id":1}{"execute":"echo","id":2}{]\n{"execute":"echo","id":3}'
        await it.client.send(requests)
        await wait_all_tasks_blocked()
        (session,) = it.monitor.sessions.values()
        it.monitor.quiesce()
        assert not session.busy
        session.hold()
        state = session.save()
        assert len(state.waiting) == 3
        async with successor(session, state, it):
            assert len((await it.client.receive())["return"]["x"]) == 1_000_000
            assert [(await it.client.receive()).get("id") for _ in range(3)] == [2, None, 3]


async def test_after_a_save_that_came_to_nothing_the_session_goes_on_here() -> None:
    async with bench() as it:
        await it.client.negotiate()
        (session,) = it.monitor.sessions.values()
        it.monitor.quiesce()
        session.hold()
        session.save()
        it.hub.emit("STOP")
        await it.client.send({"execute": "echo"})
        await wait_all_tasks_blocked()
        with pytest.raises(BlockingIOError):
            it.client.peek()
        it.monitor.resume()
        assert (await it.client.receive())["event"] == "STOP"
        assert await it.client.receive() == {"return": {}}


@pytest.mark.parametrize("way_out", ["close", "give_up"])
async def test_a_session_that_may_not_read_can_be_ended(way_out: str) -> None:
    async with bench() as it:
        await it.client.negotiate()
        (session,) = it.monitor.sessions.values()
        it.monitor.quiesce()
        await it.client.send({"execute": "echo"})
        await wait_all_tasks_blocked()
        if way_out == "close":
            await session.close(1)
        else:
            session.give_up()
        while it.monitor.sessions:
            await trio.lowlevel.checkpoint()
        assert it.executor.log == []


@asynccontextmanager
async def successor(
    session: Session, state: SessionState, it: Bench, options: SessionOptions | None = None
) -> AsyncGenerator[None, None]:
    """Go on with a session as another process would: over a copy of its descriptor, after it was given up."""
    assert isinstance(session.transport, SocketTransport)
    copy = socket.fromfd(session.transport.fileno(), socket.AF_UNIX, socket.SOCK_STREAM)
    session.give_up()
    monitor = qmp_monitor("qmp0", it.executor, it.hub, SessionOptions(VERSION), it.log.append)

    def make(name: str, transport: Transport) -> Session:
        made = Session(name, transport, it.executor, it.hub, options or SessionOptions(VERSION), state)
        made.take_up()
        return made

    async with trio.open_nursery() as nursery:
        nursery.start_soon(monitor.take_up(1, copy, make))
        monitor.resume()
        yield
        nursery.cancel_scope.cancel()
