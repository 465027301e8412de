"""The protocol to the letter, against the real process."""

from __future__ import annotations

import array
import os
import socket
import stat
from typing import TYPE_CHECKING, Any

import pytest

from tests.qmp.kit import HALT, Raw, flat_guest, machine

if TYPE_CHECKING:
    from pathlib import Path

GENERIC, NOT_FOUND = "GenericError", "CommandNotFound"


def error(reply: dict[str, Any]) -> tuple[str, str]:
    """Return class and words of an error reply."""
    return reply["error"]["class"], reply["error"]["desc"]


async def test_the_greeting_offers_oob_and_lines_end_in_cr_lf(tmp_path: Path) -> None:
    async with machine(tmp_path) as m, await m.raw() as raw:
        data = b""
        while not data.endswith(b"\n"):
            data += await raw.sock.recv(1)
        assert data.endswith(b"\r\n")
        assert data.isascii()
        raw._data[:] = data
        greeting = (await raw.message())["QMP"]
        assert set(greeting) == {"version", "capabilities"}
        assert set(greeting["version"]) == {"qemu", "package"}
        assert set(greeting["version"]["qemu"]) == {"major", "minor", "micro"}
        assert greeting["capabilities"] == ["oob"]


async def test_before_negotiation_there_is_one_command(tmp_path: Path) -> None:
    async with machine(tmp_path) as m, await m.raw() as raw:
        await raw.message()
        for name in ("query-version", "quit", "no-such-cmd"):
            assert error(await raw.ask({"execute": name})) == (
                NOT_FOUND, f"Command {name!r} has to wait: the session begins with 'qmp_capabilities'",
            )  # fmt: skip
        bad = {"execute": "qmp_capabilities", "arguments": {"enable": ["teleport"]}}
        assert error(await raw.ask(bad)) == (
            GENERIC, "Command 'qmp_capabilities': 'enable[0]' does not accept \"teleport\"; it accepts 'oob'",
        )  # fmt: skip
        assert await raw.ask({"execute": "qmp_capabilities"}) == {"return": {}}
        assert error(await raw.ask({"execute": "qmp_capabilities"})) == (
            NOT_FOUND, "Command 'qmp_capabilities' was given already; this session is negotiated",
        )  # fmt: skip
        assert "return" in await raw.ask({"execute": "query-version"})


MALFORMED = {
    b"{]\n": GENERIC,
    b"{\xff": GENERIC,
    b"{\x01": GENERIC,
    b"{'bad \xff": GENERIC,
    b"{'execute': 'nonexistent', 'id':'\n": GENERIC,
    b"%p": GENERIC,
    b"null\n": GENERIC,
    b"[1, 2]": GENERIC,
    b"{}": GENERIC,
    b"{'execute': true}": GENERIC,
    b"{'execute': 'no-such-cmd', 'arguments': []}": GENERIC,
    b"{'execute': 'query-version', 'extra': 1}": GENERIC,
    b"{'execute': 'query-version', 'execute': 'quit'}": GENERIC,
    b"{'execute': 'query-version', 'exec-oob': 'quit'}": GENERIC,
    b"{'exec-oob': 'query-version'}": GENERIC,
    b"'\\ud800'": GENERIC,
    b"{'execute': 'no-such-cmd'}": NOT_FOUND,
}


async def test_a_bad_message_is_answered_once_and_the_session_goes_on(tmp_path: Path) -> None:
    async with machine(tmp_path) as m:
        for request, kind in MALFORMED.items():
            async with await m.raw() as raw:
                await raw.negotiate()
                reply = await raw.ask(request)
                assert set(reply) == {"error"}, request
                assert error(reply)[0] == kind, request
                assert error(reply)[1], request
                # Clients resynchronise with 0xff; where a message was left open that ends it, with an error at most.
                await raw.send(b"\xff")
                reply = await raw.ask({"execute": "no-such-cmd", "id": "after"})
                if "id" not in reply:
                    assert error(reply)[0] == GENERIC, request
                    reply = await raw.reply()
                assert (reply["error"]["class"], reply["id"]) == (NOT_FOUND, "after"), request


NO_SUCH = "There is no command 'no-such-cmd'; query-commands lists those there are"
KNOWN = "there are 'execute', 'exec-oob', 'arguments' and 'id'"

ORDER = [
    # (request, whether its id comes back, class, words)
    ("[]", False, GENERIC, "A request must be a JSON object with the member 'execute', not an array"),
    (
        "{'execute': 1, 'arguments': 1, 'x': 1, 'id': 7}", True, GENERIC,
        "Request member 'execute' must be a string, the name of a command",
    ),
    (
        "{'id': 7, 'execute': 'stop', 'exec-oob': 'stop', 'arguments': 1}", True, GENERIC,
        "Request member 'exec-oob' clashes with 'execute'; give one of them",
    ),
    (
        "{'id': 7, 'execute': 'no-such-cmd', 'arguments': 1}", True, GENERIC,
        "Request member 'arguments' must be an object",
    ),
    ("{'id': 7, 'execute': 'no-such-cmd', 'x': 1}", True, GENERIC, f"Request member 'x' is unexpected; {KNOWN}"),
    (
        "{'id': 7, 'arguments': {}}", True, GENERIC,
        "The request lacks the member 'execute', the name of a command",
    ),
    ("{'id': 7, 'execute': 'no-such-cmd'}", True, NOT_FOUND, NO_SUCH),
    ("{'id': 7, 'exec-oob': 'no-such-cmd', 'arguments': {'x': 1}}", True, NOT_FOUND, NO_SUCH),
    (
        "{'id': 7, 'exec-oob': 'accel-set', 'arguments': {'x': 1}}", True, GENERIC,
        "Command 'accel-set' can't be run out of band; use 'execute'",
    ),
    (
        "{'id': 7, 'execute': 'accel-set', 'arguments': {'x': 1}}", True, GENERIC,
        "Command 'accel-set' needs may-open-kvm, which phase boot/precreate does not grant; "
        "phases that grant it: accel (reached by machine-set)",
    ),
    (
        "{'id': 7, 'execute': 'query-version', 'arguments': {'x': 1}}", True, GENERIC,
        "Command 'query-version': 'x' is unexpected; there are none",
    ),
    (
        "{'id': 7, 'execute': 'getfd', 'arguments': {'x': 1}}", True, GENERIC,
        "Command 'getfd': 'fdname' is missing; 'x' is unexpected; there are 'fdname'",
    ),
    (
        "{'id': 7, 'execute': 'getfd', 'arguments': {'fdname': 1}}", True, GENERIC,
        "Command 'getfd': 'fdname' must be a string, not 1",
    ),
]  # fmt: skip


async def test_what_is_wrong_first_is_told_first(tmp_path: Path) -> None:
    async with machine(tmp_path) as m, await m.raw() as raw:
        await raw.negotiate(oob=True)
        for request, with_id, kind, words in ORDER:
            reply = await raw.ask(request.encode())
            assert error(reply) == (kind, words)
            assert ("id" in reply, reply.get("id", 7)) == (with_id, 7), request


async def test_any_id_comes_back(tmp_path: Path) -> None:
    values = [0, "", None, [1, {"a": 2.5}], {"x": None}, "\u00e9\U0001f600\x00", -1, 2**64 - 1, 1e300]
    async with machine(tmp_path) as m, await m.raw() as raw:
        await raw.negotiate()
        for value in values:
            assert await raw.ask({"execute": "query-name", "id": value}) == {"return": {}, "id": value}


async def test_messages_need_no_newlines(tmp_path: Path) -> None:
    async with machine(tmp_path) as m, await m.raw() as raw:
        await raw.negotiate()
        await raw.send(b"{'execute':'query-name','id':1}{'execute'\n:\n'query-name',\t'id'\r\n:2}")
        assert [await raw.reply(), await raw.reply()] == [{"return": {}, "id": 1}, {"return": {}, "id": 2}]
        for byte in b"{'execute':'query-name','id':3}":
            await raw.send(bytes([byte]))
        assert await raw.reply() == {"return": {}, "id": 3}


async def test_replies_keep_the_order_of_requests(tmp_path: Path) -> None:
    async with machine(tmp_path) as m, await m.raw() as raw:
        await raw.negotiate()
        await raw.send(b"".join(b"{'execute':'%s','id':%d}" % (name, n) for n, name in enumerate(
            [b"query-name", b"no-such-cmd", b"stop", b"query-qmp-schema", b"migrate_cancel"] * 10
        )))  # fmt: skip
        assert [(await raw.reply())["id"] for _ in range(50)] == list(range(50))


async def test_sessions_are_apart_and_events_reach_all(tmp_path: Path) -> None:
    async with machine(tmp_path) as m:
        sessions = [await m.raw() for _ in range(5)]
        for session in sessions[:4]:
            await session.negotiate()
        await sessions[4].message()
        await m.qmp.execute("x-exit-precreate")
        for session in sessions[:4]:
            while (await session.message())["event"] != "PHASE_CHANGED":
                pass
        # The one that has not negotiated sees no event.
        assert error(await sessions[4].ask({"execute": "stop"}))[0] == NOT_FOUND
        # One that leaves without a word leaves the others alone.
        sessions[0].sock.close()
        assert await sessions[1].ask({"execute": "query-name"}) == {"return": {}}
        for session in sessions[1:]:
            session.sock.close()


async def test_the_socket_is_its_owners_alone(tmp_path: Path) -> None:
    async with machine(tmp_path) as m:
        assert stat.S_IMODE(os.stat(m.path).st_mode) == 0o600


def with_descriptors(raw: Raw, data: bytes, *fds: int) -> None:
    """Send `data` with `fds`."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    with socket.fromfd(raw.sock.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(True)
        sock.sendmsg([data], ancillary)
        sock.setblocking(False)


async def test_descriptors_belong_to_a_session_or_to_a_set(tmp_path: Path) -> None:
    async with machine(tmp_path) as m, await m.raw() as one, await m.raw() as other:
        await one.negotiate()
        await other.negotiate()
        with (tmp_path / "f").open("w") as file:
            with_descriptors(one, b"{'execute':'getfd','arguments':{'fdname':'a'}}", file.fileno())
            assert await one.reply() == {"return": {}}
            with_descriptors(one, b" ", file.fileno())
            added = await one.ask({"execute": "add-fd", "arguments": {"opaque": "why"}})
        close = {"execute": "closefd", "arguments": {"fdname": "a"}}
        assert error(await other.ask(close)) == (
            GENERIC, "closefd: this session has no descriptor 'a' (it has: none)",
        )  # fmt: skip
        assert await one.ask(close) == {"return": {}}
        assert error(await one.ask(close))[0] == GENERIC
        found = added["return"]
        expected = [{"fdset-id": found["fdset-id"], "fds": [{"fd": found["fd"], "opaque": "why"}]}]
        assert (await other.ask({"execute": "query-fdsets"}))["return"] == expected
        assert (await other.ask({"execute": "remove-fd", "arguments": found}))["return"] == {}
        assert (await one.ask({"execute": "query-fdsets"}))["return"] == []


async def test_commands_that_need_a_descriptor_say_so(tmp_path: Path) -> None:
    async with machine(tmp_path) as m, await m.raw() as raw:
        await raw.negotiate()
        for request in ({"execute": "getfd", "arguments": {"fdname": "a"}}, {"execute": "add-fd"}):
            assert error(await raw.ask(request)) == (
                GENERIC,
                f"{request['execute']}: no descriptor came with the request; "
                "send one by SCM_RIGHTS, before it or with it",
            )  # fmt: skip


@pytest.mark.kvm
async def test_preconfig_as_qemus_test_has_it(tmp_path: Path) -> None:
    """QEMU's tests/qtest/qmp-test.c, test_qmp_preconfig."""
    guest = flat_guest(tmp_path, HALT)
    options = ("--preconfig", "-kernel", guest, "-m", "2", "-serial", "null")
    async with machine(tmp_path, *options) as m, await m.raw() as raw:
        await m.until_phase("preconfig")
        await raw.negotiate()
        assert "return" in await raw.ask({"execute": "query-commands"})
        assert error(await raw.ask({"execute": "query-cpus-fast"})) == (
            "DeviceNotActive", "The machine is not there before phase devices",
        )  # fmt: skip
        assert (await raw.ask({"execute": "query-status"}))["return"] == {"running": False, "status": "prelaunch"}
        assert await raw.ask({"execute": "x-exit-preconfig"}) == {"return": {}}
        await m.event("RESUME")
        assert (await raw.ask({"execute": "query-status"}))["return"] == {"running": True, "status": "running"}
        assert error(await raw.ask({"execute": "x-exit-preconfig"}))[0] == GENERIC
        assert len((await raw.ask({"execute": "query-cpus-fast"}))["return"]) == 1


@pytest.mark.kvm
async def test_preconfig_with_stopped_leads_to_a_machine_that_stands(tmp_path: Path) -> None:
    options = ("--preconfig", "-S", "-kernel", flat_guest(tmp_path, HALT), "-m", "2", "-serial", "null")
    async with machine(tmp_path, *options) as m:
        await m.until_phase("preconfig")
        await m.qmp.execute("x-exit-preconfig")
        await m.until_phase("running")
        assert await m.qmp.execute("query-status") == {"running": False, "status": "prelaunch"}
