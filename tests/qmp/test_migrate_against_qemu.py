"""What `query-migrate` replies in each state, to QEMU's client: the members that QEMU's reply has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

from tests.qmp.kit import HALT, PATIENCE, flat_guest, machine
from tests.qmp.test_against_qemu import QEMU, qemu, shape

if TYPE_CHECKING:
    from pathlib import Path

    from tests.qmp.kit import Raw

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.skipif(not QEMU, reason="there is no qemu-system-x86_64 to compare with"),
]

GONE: Final = {"skipped"}
"""Members of `ram` in QEMU 7.2 that later releases have dropped."""

NEW: Final = {"remaining"}
"""Members of later releases than 7.2."""


async def in_status(client: Raw, *wanted: str) -> dict[str, Any]:
    """Return what `query-migrate` replies in one of these states."""
    with trio.fail_after(PATIENCE):
        while True:
            reply: dict[str, Any] = (await client.ask({"execute": "query-migrate"}))["return"]
            if reply.get("status") in wanted:
                return reply
            await trio.sleep(0.01)  # events come in between to the one that has them on


async def done(client: Raw, command: str, **arguments: Any) -> None:
    wired = {name.replace("_", "-"): value for name, value in arguments.items()}
    assert await client.ask({"execute": command, "arguments": wired}) == {"return": {}}


async def states(client: Raw) -> dict[str, dict[str, Any]]:
    """Go through a migration that is called off, and one that completes; return what was replied in each state."""
    seen = {}
    assert await client.ask({"execute": "qmp_capabilities"}) == {"return": {}}
    await done(client, "migrate-set-parameters", max_bandwidth=1)
    await done(client, "migrate", uri="exec:cat >/dev/null")
    seen["active"] = await in_status(client, "active")
    await done(client, "migrate_cancel")
    seen["cancelled"] = await in_status(client, "cancelled")
    await done(client, "migrate-set-parameters", max_bandwidth=1 << 30)
    await done(client, "migrate", uri="exec:cat >/dev/null")
    seen["completed"] = await in_status(client, "completed", "failed")
    return seen


async def test_each_state_s_reply_has_the_members_of_qemus(tmp_path: Path) -> None:
    options = ("-m", "16", "-nodefaults", "-kernel", flat_guest(tmp_path, HALT))
    async with machine(tmp_path, *options) as m, qemu(tmp_path) as theirs, await m.raw() as ours:
        await m.until_running()
        for client in (theirs, ours):
            await client.message()
        their, our = await states(theirs), await states(ours)
    for status, reply in their.items():
        expected, found = shape(reply), shape(our[status])
        for name in GONE:
            expected.get("ram", {}).pop(name, None)
        if "ram" in expected:
            expected["ram"]["mbps"] = "float"  # whose 0 it writes without a point
        for name in NEW - set(expected):
            found.pop(name, None)
        assert found == expected, status
    assert our["completed"]["ram"]["total"] == 16 << 20
    assert our["completed"]["ram"]["remaining"] == 0
