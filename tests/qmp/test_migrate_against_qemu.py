"""What `query-migrate` replies once a migration has completed, to QEMU's client: the members that QEMU's reply has."""

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

GONE: Final = "skipped"
"""A member of `ram` in QEMU 7.2 that later releases have dropped."""


async def completed(client: Raw) -> dict[str, Any]:
    """Migrate to a command that takes everything; return what `query-migrate` replies then."""
    await client.message()
    assert await client.ask({"execute": "qmp_capabilities"}) == {"return": {}}
    request = {"execute": "migrate", "arguments": {"uri": "exec:cat >/dev/null"}}
    assert await client.ask(request) == {"return": {}}
    with trio.fail_after(PATIENCE):
        while True:
            reply: dict[str, Any] = (await client.ask({"execute": "query-migrate"}))["return"]
            assert reply["status"] not in ("failed", "cancelled"), reply
            if reply["status"] == "completed":
                return reply
            await trio.sleep(0.01)  # it is not told


async def test_a_completed_migration_s_reply_has_the_members_of_qemus(tmp_path: Path) -> None:
    options = ("-m", "16", "-nodefaults", "-kernel", flat_guest(tmp_path, HALT))
    async with machine(tmp_path, *options) as m, qemu(tmp_path) as theirs, await m.raw() as ours:
        await m.until_running()
        their, our = await completed(theirs), await completed(ours)
    expected, found = shape(their), shape(our)
    expected["ram"].pop(GONE, None)
    expected["ram"]["mbps"] = "float"  # whose 0 it writes without a point
    for name in found.keys() - expected.keys():
        assert name == "remaining", name  # of later releases
        found.pop(name)
    assert found == expected
    assert our["ram"]["total"] == 16 << 20
    assert our["ram"]["remaining"] == 0
