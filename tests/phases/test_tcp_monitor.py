"""A QMP monitor, and qtest, on a TCP port: of this machine alone."""

from __future__ import annotations

import socket
from contextlib import asynccontextmanager
from http.client import BadStatusLine, HTTPConnection
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.phases.machine import bare, failure
from vmm.qmp_client import QmpClient

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("no_leaks")


def tcp(host: str, port: int = 0, *, server: bool = True) -> dict[str, Any]:
    address = {"type": "inet", "data": {"host": host, "port": str(port)}}
    return {"type": "socket", "data": {"addr": address, "server": server, "wait": False}}


@asynccontextmanager
async def session(sock: trio.socket.SocketType) -> AsyncGenerator[QmpClient, None]:
    """Negotiate with the monitor at the other end of `sock`."""
    with sock:
        client = QmpClient(sock, "a port")
        assert "QMP" in await client.read()
        await client.execute("qmp_capabilities")
        yield client


async def filename(client: QmpClient, label: str) -> str:
    (found,) = [item for item in await client.execute("query-chardev") if item["label"] == label]
    return str(found["filename"])


@pytest.mark.parametrize(("host", "written"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]"), ("localhost", None)])
async def test_a_monitor_on_loopback_answers_at_the_port_that_query_chardev_shows(
    tmp_path: Path, host: str, written: str | None
) -> None:
    async with bare(tmp_path) as (_, first):
        await first.execute("chardev-add", id="m", backend=tcp(host))
        await first.execute("object-add", **{"qom-type": "monitor-qmp", "id": "q", "chardev": "m"})
        shown = await filename(first, "m")
        place = shown.removeprefix("disconnected:tcp:").removesuffix(",server=on")
        where, _, port = place.rpartition(":")
        assert written in (where, None)
        stream = await trio.open_tcp_stream(host, int(port))
        async with session(stream.socket) as second:
            assert await filename(second, "m") == f"tcp:{place},server=on"
        await first.execute("quit")


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::"])
@pytest.mark.parametrize("kind", ["monitor-qmp", "qtest"])
async def test_a_monitor_that_other_machines_could_reach_is_refused_by_name(
    tmp_path: Path, host: str, kind: str
) -> None:
    async with bare(tmp_path) as (_, client):
        await client.execute("chardev-add", id="m", backend=tcp(host))
        shown = await filename(client, "m")
        place = shown.removeprefix("disconnected:tcp:").removesuffix(",server=on")
        said = await failure(client, "object-add", **{"qom-type": kind, "id": "q", "chardev": "m"})
        assert said == (
            f"Monitor over a socket that listens on {place!r} is not supported here; whoever connects there would be "
            "the machine's administrator; use 127.0.0.1, ::1 or a unix socket"
        )
        # Nothing was taken: it serves as a chardev.
        async with await trio.open_tcp_stream("::1" if ":" in host else "127.0.0.1", int(place.rpartition(":")[2])):
            while (await filename(client, "m")).startswith("disconnected:"):
                pass
        await client.execute("chardev-remove", id="m")
        await client.execute("quit")


async def test_a_browser_that_a_page_has_send_requests_is_hung_up_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = b'{"execute":"qmp_capabilities"}\r\n{"execute":"quit"}\r\n'
    async with bare(tmp_path) as (_, first):
        await first.execute("chardev-add", id="m", backend=tcp("127.0.0.1"))
        await first.execute("object-add", **{"qom-type": "monitor-qmp", "id": "q", "chardev": "m"})
        port = int((await filename(first, "m")).removesuffix(",server=on").rpartition(":")[2])

        def post() -> None:
            http = HTTPConnection("127.0.0.1", port)
            http.request("POST", "/", asked, {"Content-Type": "text/plain"})
            try:
                http.getresponse()
            finally:
                http.close()

        with pytest.raises((BadStatusLine, ConnectionError)):
            await trio.to_thread.run_sync(post)
        said = ""
        with trio.fail_after(20):
            while not said.endswith("\n"):
                await trio.lowlevel.checkpoint()
                said += capsys.readouterr().err
        assert said.endswith("q/1: the client began with b'POST / HTTP/1.1\\r', which is no QMP, so it was dropped\n")
        async with session((await trio.open_tcp_stream("127.0.0.1", port)).socket) as second:
            await second.execute("query-status")  # it is there still
        await first.execute("quit")


async def test_a_monitor_may_connect_to_its_client(tmp_path: Path) -> None:
    async with bare(tmp_path) as (running, first):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            await first.execute("chardev-add", id="m", backend=tcp("127.0.0.1", port, server=False))
            await first.execute("object-add", **{"qom-type": "monitor-qmp", "id": "q", "chardev": "m"})
            async with session(trio.socket.from_stdlib_socket(listener.accept()[0])) as second:
                await second.execute("query-status")
        assert [step.execute for step in running.host.recorder.recipe()].count("chardev-add") == 1, "it stays behind"
        await first.execute("quit")
