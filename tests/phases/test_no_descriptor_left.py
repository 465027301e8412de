"""A host that has no descriptor left for a running machine: its commands are refused, and its guest runs on.

Modules that are imported late count too, so the machine is of a process of its own, which has imported none of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.kvm

SCRIPT: Final = """
import json, os, resource, sys
import trio
import vmm
from vmm.errors import VmmError
from vmm.phases.machine import Machine
from vmm.phases.start import Start
from vmm.recipe import Recipe

folder, asked = sys.argv[1], json.loads(sys.argv[2])
found = {"scarce": [], "plenty": []}
chardev = {"type": "socket", "data": {"addr": {"type": "unix", "data": {"path": f"{folder}/there"}}, "wait": False}}

async def attempts(machine):
    for command, arguments in asked:
        try:
            await machine.execute(command, **arguments)
            yield "done"
        except VmmError as error:
            yield str(error)

async def main():
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)

    def allow(more):
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        free = os.open("/dev/null", os.O_RDONLY)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + more, limit[1]))

    async with vmm.machine(start=Start(Recipe("of this test"), complain=lambda text: None)) as machine:
        await machine.execute("chardev-add", id="there", backend=chardev)
        await machine.execute("machine-set", memory={"size": 16 << 20}, kernel="builtin:heartbeat")
        await machine.execute("accel-set")
        await machine.execute("cont")
        while "running" != (await machine.execute("query-status"))["status"]:
            await trio.sleep(0.005)
        allow(0)
        found["scarce"] = [text async for text in attempts(machine)]
        allow(1)
        await machine.execute("migrate", uri=f"file:{folder}/copy")
        while (info := await machine.execute("query-migrate"))["status"] not in ("completed", "failed"):
            await trio.sleep(0.005)
        found["copy"] = info.get("error-desc")
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        found["plenty"] = [text async for text in attempts(machine)]
        found["status"] = (await machine.execute("query-status"))["status"]

        from vmm.guests.heartbeat import HeartbeatReader

        reader = HeartbeatReader(machine._tree.view(Machine).memory.read)
        while (before := reader.look()) is None:
            await trio.sleep(0.005)
        while reader.look().ticks <= before.ticks:
            await trio.sleep(0.005)

trio.run(main)
print(json.dumps(found))
"""

NONE_LEFT: Final = "Too many open files"


def unix(path: str, *, server: bool) -> dict[str, Any]:
    address = {"type": "unix", "data": {"path": path}}
    return {"type": "socket", "data": {"addr": address, "server": server, "wait": False}}


def test_commands_are_refused_the_guest_runs_on_and_they_work_once_there_are_some_again(tmp_path: Path) -> None:
    there, new, file = (str(tmp_path / name) for name in ("there", "new", "file"))
    port = {"host": "127.0.0.1", "port": "0"}
    cases: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("device_add", {"driver": "virtio-rng-device"}, "Cannot create an eventfd"),
        ("object-add", {"qom_type": "rng-random", "id": "r"}, "Cannot read /dev/urandom"),
        ("chardev-add", {"id": "n", "backend": {"type": "null", "data": {}}}, "Cannot create an eventfd"),
        ("chardev-add", {"id": "f", "backend": {"type": "file", "data": {"out": file}}}, f"Cannot write {file}"),
        ("chardev-add", {"id": "p", "backend": {"type": "pty", "data": {}}}, "Cannot create a pty"),
        ("chardev-add", {"id": "s", "backend": unix(new, server=True)}, f"Cannot listen on {new}"),
        ("chardev-add", {"id": "c", "backend": unix(there, server=False)}, f"Cannot connect to {there}"),
        ("object-add", {"qom_type": "qtest", "id": "q", "chardev": "there"}, "Cannot import vmm.phases.qtest"),
        (
            "object-add",
            {"qom_type": "monitor-websocket", "id": "w", "addr": port},
            "Cannot import vmm.phases.websocket",
        ),
        ("query-qmp-schema", {}, "Cannot import vmm.monitor.schema"),
        (
            "query-cpu-model-expansion",
            {"type": "full", "model": {"name": "host"}},
            "Cannot import vmm.kvm.cpu_features",
        ),
    )
    asked = json.dumps([[command, arguments] for command, arguments, _ in cases])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), asked], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["scarce"] == [f"{refused}: {NONE_LEFT}" for _, _, refused in cases]
    assert found["copy"] == f"Cannot import cattrs: {NONE_LEFT}"
    assert found["plenty"] == ["done"] * len(cases)
    assert found["status"] == "running"
