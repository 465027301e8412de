"""What a start does not import: all that a monitor can answer without. Time itself is measured in bench/."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, os, socket, sys
import trio
import vmm.cli, vmm.cli_options, vmm.cli_recipe, vmm.process

ours, theirs = socket.socketpair()
ours.setblocking(False)
seen = {}

async def main():
    async with trio.open_nursery() as nursery:
        options = parser.parse_args(["-qmp", f"fd:{theirs.detach()}"])
        start = Start(vmm.cli_recipe.recipe_of(options).ordered(rank))
        nursery.start_soon(run_machine, start)
        client = trio.SocketStream(trio.socket.from_stdlib_socket(ours))

        async def line():
            data = b""
            while not data.endswith(b"\\n"):
                data += await client.receive_some(1)
            return json.loads(data)

        assert "QMP" in await line()
        seen["greeting"] = sorted(sys.modules)
        await client.send_all(b"{'execute': 'qmp_capabilities'}{'execute': 'query-status'}")
        assert await line() == {"return": {}}
        assert "return" in await line()
        seen["answer"] = sorted(sys.modules)
        nursery.cancel_scope.cancel()

parser = vmm.cli_options.Parser()
vmm.cli_options.add_run_options(parser)
from vmm.phases.boot import run_machine
from vmm.phases.catalog import rank
from vmm.phases.start import Start
trio.run(main)
print(json.dumps(seen))
"""

HEAVY = (
    "asyncio", "cattrs", "cffi", "hypothesis", "pdb", "trio_websocket", "unittest", "vmm.cli_machine",
    "vmm.cli_values", "vmm.cpr.cell", "vmm.cpr.channel", "vmm.guests", "vmm.hw", "vmm.kvm", "vmm.migration.connect",
    "vmm.migration.registry", "vmm.migration.stream", "vmm.monitor.schema", "vmm.phases.accel",
    "vmm.phases.assembly", "vmm.phases.fd_receive", "vmm.phases.machine", "vmm.phases.running",
    "vmm.phases.commands_migration", "vmm.phases.commands_monitor",
)  # fmt: skip


@pytest.fixture(scope="module")
def imported() -> dict[str, list[str]]:
    """The modules there are when the monitor greets, and when it has answered its first command."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, check=True)
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("moment", ["greeting", "answer"])
@pytest.mark.parametrize("module", HEAVY)
def test_a_monitor_alone_does_not_import(imported: dict[str, list[str]], moment: str, module: str) -> None:
    assert not [name for name in imported[moment] if name == module or name.startswith(f"{module}.")]


def test_the_commands_of_the_machine_are_imported_when_one_is_used(imported: dict[str, list[str]]) -> None:
    assert "vmm.phases.commands_machine" not in imported["greeting"]
    assert "vmm.phases.commands_machine" in imported["answer"]
