"""The websocket of the WHATWG standard, which browsers have, as a client. Node.js has it too."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.monitor.websocket_kit import TOKEN, serving

if TYPE_CHECKING:
    from tests.monitor.websocket_kit import Kit

NODE = shutil.which("node") or ""

PROGRAM = """
const [url, ...protocols] = process.argv.slice(1);
const socket = new WebSocket(url, protocols);
const questions = [{execute: "qmp_capabilities"}, {execute: "echo", arguments: {n: "\\u{1f427}"}}];
const found = {protocol: null, messages: []};
socket.onopen = () => { found.protocol = socket.protocol; };
socket.onmessage = (event) => {
    found.messages.push(JSON.parse(event.data));
    if (questions.length) socket.send(JSON.stringify(questions.shift()));
    else socket.close(1000, "enough");
};
socket.onclose = (event) => {
    found.closed = [event.code, event.wasClean];
};
process.on("exit", () => console.log(JSON.stringify(found)));
"""


def command(*arguments: str) -> list[str]:
    return [NODE, "--no-warnings", "--experimental-websocket", "-e", PROGRAM, "--", *arguments]


def has_websocket() -> bool:
    if not NODE:
        return False
    test = [NODE, "--no-warnings", "--experimental-websocket", "-p", "typeof WebSocket"]
    return subprocess.run(test, capture_output=True, text=True, check=False).stdout == "function\n"


pytestmark = [
    pytest.mark.usefixtures("no_leaks"),
    pytest.mark.skipif(not has_websocket(), reason="there is no node with a WebSocket"),
]


async def run(kit: Kit, *protocols: str) -> dict[str, Any]:
    done = await trio.run_process(command(f"ws://{kit.authority}/", *protocols), capture_stdout=True)
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


async def test_a_page_s_client_shows_its_token_as_a_subprotocol() -> None:
    async with serving(token=TOKEN) as kit:
        found = await run(kit, "qmp", f"bearer.{TOKEN}")
        greeting, *replies = found["messages"]
        assert "QMP" in greeting
        assert replies == [{"return": {}}, {"return": {"n": "\U0001f427"}}]
        assert (found["protocol"], found["closed"]) == ("qmp", [1000, True])
        assert kit.log == []


async def test_a_page_s_client_with_a_wrong_token_gets_no_websocket() -> None:
    async with serving(token=TOKEN) as kit:
        found = await run(kit, "qmp", "bearer.not-the-token-at-all")
        assert (found["protocol"], found["messages"]) == (None, [])
        assert kit.log == ["ws0: a client was refused: The token is not the one of this monitor"]


async def test_a_page_s_client_needs_no_subprotocol_where_no_token_is_asked_for() -> None:
    async with serving() as kit:
        found = await run(kit)
        assert (found["protocol"], found["closed"]) == ("", [1000, True])
