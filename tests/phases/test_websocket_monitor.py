"""Websocket monitors of whole machines: who may what, how they are made and ended, and what a live update does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio_websocket import ConnectionClosed, ConnectionRejected, wrap_client_stream

import vmm
from tests.monitor.websocket_kit import TOKEN, ask
from tests.phases.update_kit import GUEST, PROGRAM, begin_update, open_bench, outcome
from vmm.capabilities import ADMIN, MIGRATE, OBSERVE, OPERATE
from vmm.errors import BackendInUse, VmmError
from vmm.phases.catalog import COMMANDS
from vmm.phases.start import Start
from vmm.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from trio_websocket import WebSocketConnection

    from vmm.capabilities import Grant
    from vmm.embedding import EmbeddedMachine
    from vmm.monitor.command import Need

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
def token(tmp_path: Path) -> str:
    path = tmp_path / "token"
    path.touch(mode=0o600)
    path.write_text(f"{TOKEN}\n")
    return str(path)


async def url_of(machine: EmbeddedMachine, name: str) -> str:
    (url,) = [it["url"] for it in await machine.execute("query-monitors") if it["id"] == name]
    assert isinstance(url, str)
    return url


async def add(machine: EmbeddedMachine, name: str = "ws", **arguments: Any) -> str:
    """Add a websocket monitor at any port; return where it is."""
    addr = {"host": "127.0.0.1", "port": "0"}
    await machine.execute("object-add", qom_type="monitor-websocket", id=name, **{"addr": addr} | arguments)
    return await url_of(machine, name)


@asynccontextmanager
async def opened(url: str, token: str | None = TOKEN) -> AsyncGenerator[WebSocketConnection, None]:
    """Connect to a websocket monitor, show the token, and negotiate."""
    authority = url.removeprefix("ws://").removesuffix("/")
    host, _, port = authority.rpartition(":")
    headers = [] if token is None else [(b"Authorization", f"Bearer {token}".encode())]
    async with await trio.open_tcp_stream(host.strip("[]"), int(port)) as stream, trio.open_nursery() as nursery:
        client = await wrap_client_stream(nursery, stream, authority, "/", extra_headers=headers)
        async with client:
            assert "QMP" in json.loads(await client.get_message())
            assert await ask(client, {"execute": "qmp_capabilities"}) == {"return": {}}
            yield client


async def answer(client: WebSocketConnection, command: str, **arguments: Any) -> dict[str, Any]:
    """Execute a command; return the reply, past all events."""
    reply = await ask(client, {"execute": command, "arguments": arguments})
    while "event" in reply:
        reply = json.loads(await client.get_message())
    assert isinstance(reply, dict)
    return reply


async def end_of(client: WebSocketConnection) -> tuple[int, str | None]:
    try:
        while True:
            await client.get_message()
    except ConnectionClosed as closed:
        reason = closed.reason
    return (reason.code, reason.reason) if reason is not None else (0, None)


# --- who may what -------------------------------------------------------------------------------------------


def lacks(need: Need, grant: Grant) -> bool:
    return grant.kinds.isdisjoint(need.kinds)


async def require_refused(client: WebSocketConnection, grant: Grant) -> list[str]:
    """Try every command that `grant` does not cover; return their names."""
    tried = []
    for command in COMMANDS:
        missing = next((need for need in command.signature.needs if lacks(need, grant)), None)
        if missing is None:
            continue
        kind = missing.kinds[0].wire_name + (f":{missing.scope}" if missing.scope else "")
        why = f"Command {command.name!r} needs {kind}, which this session (grant {grant.name}) may not be lent"
        assert await answer(client, command.name) == {"error": {"class": "GenericError", "desc": why}}
        tried.append(command.name)
    return tried


def queries() -> list[str]:
    """The commands that only look. What else there is changes something, whatever it is called."""
    return [it.name for it in COMMANDS if all(need.kinds[0] in OBSERVE.kinds for need in it.signature.needs)]


async def test_who_may_observe_is_refused_each_command_that_does_more() -> None:
    async with vmm.machine() as machine:
        async with opened(await add(machine), token=None) as client:
            tried = await require_refused(client, OBSERVE)
            assert sorted([*tried, *queries()]) == sorted(it.name for it in COMMANDS)
            assert {"quit", "stop", "cont", "system_reset", "object-add", "migrate", "machine-set", "getfd"} <= set(
                tried
            )
            others = {"device-list-properties", "x-query-snapshots"}
            assert all(name.startswith("query-") or name in others for name in queries())
            for name in queries():
                assert "may not be lent" not in json.dumps(await answer(client, name))
            listed = (await answer(client, "query-commands", extended=True))["return"]
            assert [it["name"] for it in listed if it["admitted"]] == sorted(queries())
        assert machine.path == "boot/precreate"
        assert [step.execute for step in machine.recipe] == ["object-add"]


@pytest.mark.kvm
@pytest.mark.parametrize("grant", [OBSERVE, OPERATE, MIGRATE], ids=lambda grant: grant.name)
async def test_a_running_machine_does_for_a_client_what_its_grant_names(grant: Grant, token: str) -> None:
    recipe: list[dict[str, Any]] = [
        {"execute": "machine-set", "arguments": {"memory": {"size": 16 << 20}, "kernel": "builtin:heartbeat"}},
        {"execute": "accel-set", "arguments": {"accel": "kvm"}},
        {"execute": "cpu-model-set", "arguments": {"model": "host"}},
        {"execute": "finish-machine-init"},
        {"execute": "cont"},
    ]
    async with vmm.machine(recipe) as machine:
        url = await add(machine, grant=grant.name, token_file=token)
        async with opened(url) as client:
            await require_refused(client, grant)
            assert (await answer(client, "query-status"))["return"]["status"] == "running"
            if grant is not OBSERVE:
                assert await answer(client, "stop") == {"return": {}}
                assert (await machine.execute("query-status"))["status"] == "paused"
            capabilities = [{"capability": "events", "state": True}]
            reply = await answer(client, "migrate-set-capabilities", capabilities=capabilities)
            assert ("return" in reply) == (grant is MIGRATE)


async def test_who_may_all_can_end_the_machine_and_is_told_of_its_end(token: str) -> None:
    async with vmm.machine() as machine, opened(await add(machine, grant="admin", token_file=token)) as client:
        assert await require_refused(client, ADMIN) == []
        assert await answer(client, "quit") == {"return": {}}
        event: dict[str, Any] = {}
        while event.get("event") != "SHUTDOWN":
            event = json.loads(await client.get_message())
        assert await end_of(client) == (1001, "the monitor ends")


# --- made and ended -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"addr": {"host": "0.0.0.0", "port": "0"}},
            "object-add, addr.host: '0.0.0.0' is not a loopback address; "
            "a websocket monitor listens on 127.0.0.1 or ::1 only",
        ),
        (
            {"addr": {"host": "localhost", "port": "0"}},
            "object-add, addr.host: 'localhost' is not a loopback address; "
            "a websocket monitor listens on 127.0.0.1 or ::1 only",
        ),
        *(
            (
                {"addr": {"host": "::1", "port": port}},
                f"object-add, addr.port: {port!r} is not a port from 1 to 65535, or 0 for any that is free",
            )
            for port in ("65536", "-1", "http", "")
        ),
        (
            {"addr": None},
            "Command 'object-add': 'addr' is missing",
        ),
        (
            {"chardev": "serial0"},
            "Command 'object-add': 'chardev' is unexpected; there are 'qom-type', 'id', 'addr', 'token-file', 'grant'",
        ),
        *(
            (
                {"grant": grant},
                f"object-add, grant: {grant!r} is not possible without a token-file: "
                "everybody on this machine can connect; only observe is",
            )
            for grant in ("operate", "migrate", "admin")
        ),
        (
            {"grant": "root"},
            "Command 'object-add': 'grant' does not accept \"root\"; "
            "it accepts 'observe', 'operate', 'migrate', 'admin'",
        ),
        ({"token_file": "/nowhere/token"}, "Cannot read /nowhere/token: No such file or directory"),
        (
            {"qom_type": "monitor-qmp", "addr": None, "grant": "observe", "chardev": "x"},
            "Command 'object-add': 'grant' is unexpected; there are 'qom-type', 'id', 'chardev', 'fd'",
        ),
        (
            {"qom_type": "monitor-hmp"},
            "Command 'object-add': 'qom-type' does not accept \"monitor-hmp\"; "
            "it accepts 'memory-backend-file', 'memory-backend-memfd', 'monitor-qmp', 'monitor-websocket', 'qtest', "
            "'rng-builtin', 'rng-random', 'snapshot-directory', 'tls-creds-x509'",
        ),
    ],
)
async def test_what_can_be_no_websocket_monitor_is_refused(arguments: dict[str, Any], text: str) -> None:
    async with vmm.machine() as machine:
        wanted = {"qom_type": "monitor-websocket", "id": "ws", "addr": {"host": "127.0.0.1", "port": "0"}} | arguments
        with pytest.raises(VmmError) as caught:
            await machine.execute("object-add", **{name: value for name, value in wanted.items() if value is not None})
        assert str(caught.value) == text
        assert await machine.execute("query-monitors") == []


async def test_a_token_that_others_can_read_or_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(TOKEN)
    async with vmm.machine() as machine:
        for mode, content, text in (
            (0o644, TOKEN, "its mode is 0644, so others than its owner have access; use chmod 600"),
            (0o600, "short", "is not a file with a token of 16 to 256 letters"),
        ):
            path.write_text(content)
            path.chmod(mode)
            with pytest.raises(VmmError) as caught:
                await add(machine, token_file=str(path))
            assert text in str(caught.value)
        assert await machine.execute("query-monitors") == []


async def test_the_real_port_is_said_on_standard_error_and_by_query_monitors_and_is_recorded(token: str) -> None:
    said: list[str] = []
    async with vmm.machine(start=Start(Recipe("of a test"), complain=said.append)) as machine:
        url = await add(machine, token_file=token, grant="operate")
        port = url.removeprefix("ws://127.0.0.1:").removesuffix("/")
        assert said == [f"monitor ws is at ws://127.0.0.1:{port}/ (grant operate)"]
        async with opened(url):
            assert await machine.execute("query-monitors") == [
                {"id": "ws", "grant": "operate", "clients": 1, "url": url}
            ]
        (step,) = machine.recipe
        assert step.arguments == {
            "qom-type": "monitor-websocket", "id": "ws", "addr": {"host": "127.0.0.1", "port": port},
            "token-file": token, "grant": "operate",
        }  # fmt: skip
        addr = {"host": "127.0.0.1", "port": port}
        with pytest.raises(VmmError, match=f"Cannot listen on 127.0.0.1 port {port}: Address already in use"):
            await add(machine, "second", addr=addr)
        await machine.execute("object-del", id="ws")
        # The port is free as soon as the reply is there, and one that was named is not said.
        assert await add(machine, "second", addr=addr) == url
        assert len(said) == 1
        assert (await add(machine, "third", addr={"host": "::1", "port": "0"})).startswith("ws://[::1]:")


async def test_a_session_cannot_end_its_own_monitor_and_another_can(token: str) -> None:
    async with vmm.machine() as machine:
        async with opened(await add(machine, token_file=token, grant="admin")) as client:
            refused = BackendInUse(what="Monitor", name="ws", user="this session; use another one")
            assert (await answer(client, "object-del", id="ws"))["error"]["desc"] == str(refused)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: machine.execute("object-del", id="ws"))
                assert await end_of(client) == (1001, "the monitor ends")
        assert await machine.execute("query-monitors") == []
        assert list(machine.recipe) == []


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, "run", *options], capture_output=True, text=True, check=False, timeout=60)


def test_the_option_stands_for_a_command() -> None:
    done = run("--print-recipe", "-websocket", "127.0.0.1:0", "-websocket", "[::1]:1234,token-file=/t,grant=admin")
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {
            "execute": "object-add",
            "arguments": {
                "qom-type": "monitor-websocket", "id": "websocket0", "addr": {"host": "127.0.0.1", "port": "0"},
            },
        },
        {
            "execute": "object-add",
            "arguments": {
                "qom-type": "monitor-websocket", "id": "websocket1", "addr": {"host": "::1", "port": "1234"},
                "token-file": "/t", "grant": "admin",
            },
        },
    ]  # fmt: skip


@pytest.mark.parametrize("value", ["", "1234", ":1234", "::1:1234", "127.0.0.1:1,tls=on"])
def test_an_option_that_is_none_is_refused(value: str) -> None:
    done = run("-websocket", value)
    wanted = "ADDR:PORT[,token-file=PATH][,grant=observe|operate|migrate|admin], with ADDR 127.0.0.1 or [::1]"
    assert done.stderr == f"trio-vmm: -websocket: {value!r} is not {wanted}\n"
    assert done.returncode == 1


def test_any_other_address_is_refused_by_name() -> None:
    done = run("-websocket", "192.0.2.1:80")
    text = "'192.0.2.1' is not a loopback address; a websocket monitor listens on 127.0.0.1 or ::1 only"
    assert text in done.stderr
    assert done.returncode == 1


def test_a_machine_without_a_websocket_does_not_import_the_library() -> None:
    code = (
        "import sys\n"
        "import vmm.process, vmm.cli_options\n"
        "from vmm.phases.catalog import COMMANDS\n"
        "for command in COMMANDS:\n    command.signature\n"
        "print([name for name in ('trio_websocket', 'wsproto', 'h11') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- live update --------------------------------------------------------------------------------------------


@pytest.mark.kvm
async def test_a_live_update_sends_clients_to_the_successor_at_the_same_port(token: str) -> None:
    async with open_bench() as bench:
        console = bench.console()
        option = f"127.0.0.1:0,token-file={token},grant=admin"
        source = bench.machine(console, "-websocket", option, guest=GUEST)
        async with bench.session(bench.qmp) as qmp:
            await console.beats(2)
            (url,) = [it["url"] for it in await qmp.execute("query-monitors") if it["id"] == "websocket0"]
            assert f"trio-vmm: monitor websocket0 is at {url} (grant admin)" in source.said()
            # The successor has the file's descriptor: it neither can nor need open it again.
            os.unlink(token)
            destination = bench.destination()
            await bench.listening(destination)
            async with opened(url) as client:
                await begin_update(qmp, bench.channels(destination))
                assert (await outcome(qmp))["status"] == "completed"
                assert await end_of(client) == (1012, "the machine goes on in another process; connect again")
        async with opened(url) as client:
            assert (await answer(client, "query-status"))["return"]["status"] == "running"
            monitors = (await answer(client, "query-monitors"))["return"]
            assert {"id": "websocket0", "grant": "admin", "clients": 1, "url": url} in monitors
            await console.new_beats(2)
            with pytest.RaisesGroup(ConnectionRejected, flatten_subgroups=True):
                async with opened(url, token="wrong"):
                    pass
            assert await answer(client, "quit") == {"return": {}}
            assert (await end_of(client))[0] == 1001
        assert await destination.ended() == 0
        assert source.alive
        source.kill()


@pytest.mark.kvm
async def test_a_live_update_that_fails_leaves_the_port_and_its_clients_where_they_are() -> None:
    async with open_bench() as bench:
        console = bench.console()
        source = bench.machine(console, "-websocket", "127.0.0.1:0")
        async with bench.session(bench.qmp) as qmp:
            await console.beats(2)
            (url,) = [it["url"] for it in await qmp.execute("query-monitors") if it["id"] == "websocket0"]
            destination = bench.destination("--x-cpr-stop-at", "destination:state-received")
            await bench.listening(destination)
            async with opened(url, token=None) as client:
                await begin_update(qmp, bench.channels(destination))
                await destination.stopped()
                destination.kill()
                assert (await outcome(qmp))["status"] == "failed"
                assert (await answer(client, "query-status"))["return"]["status"] == "running"
                async with opened(url, token=None) as other:
                    assert (await answer(other, "query-status"))["return"]["status"] == "running"
            await console.new_beats(2)
        assert source.alive
