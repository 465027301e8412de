"""The QMP client of this package's own commands."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

from tests.phases.machine import bare
from vmm import host_sockets
from vmm.errors import OptionInvalid
from vmm.qmp_client import CommandFailed, qmp_over

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("no_leaks")

HANGS: Final = 30.0
NO_UTF8: Final = "a\udcff"
"""As Python has bytes of a command line that are no UTF-8."""


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"tag": NO_UTF8}, "tag"),
        ({"job_id": "a", "devices": ["b", NO_UTF8]}, "devices"),
        ({"channels": [{"addr": {"filename": NO_UTF8}}]}, "channels"),
        ({"options": {NO_UTF8: 1}}, "options"),
    ],
)
async def test_what_is_no_utf8_is_named_and_not_sent(arguments: dict[str, Any], name: str, tmp_path: Path) -> None:
    async with bare(tmp_path) as (_, client):
        with trio.fail_after(HANGS):
            with pytest.raises(OptionInvalid) as caught:
                await client.execute("snapshot-save", **arguments)
            assert str(caught.value) == f"snapshot-save: {name}: 'a\\udcff' is not UTF-8, as all of QMP is"
            assert not (await client.execute("query-status"))["running"]


async def test_an_error_without_a_number_is_the_answer_to_what_was_sent_last() -> None:
    ours, theirs = host_sockets.connected_pair()
    with theirs:
        answers: tuple[dict[str, Any], ...] = (
            {"QMP": {}},
            {"return": {}, "id": 1},
            {"event": "STOP"},
            {"error": {"class": "GenericError", "desc": "of another one"}, "id": 1},
            {"error": {"class": "GenericError", "desc": "invalid JSON"}},
        )
        for answer in answers:
            theirs.sendall(json.dumps(answer).encode() + b"\n")
        async with qmp_over(ours, "a socket") as client:
            with trio.fail_after(HANGS), pytest.raises(CommandFailed, match="query-status: invalid JSON"):
                await client.execute("query-status")
            assert [event["event"] for event in client.events] == ["STOP"]
