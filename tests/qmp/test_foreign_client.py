"""The real process driven by `qemu.qmp`, the client of QEMU's own test suite, in a process of its own."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest
import trio

from tests.qmp.kit import machine

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.kvm

SCRIPT = """
import asyncio, json, os, sys
from qemu.qmp import ExecuteError, QMPClient

async def failure(coroutine):
    try:
        await coroutine
    except ExecuteError as error:
        return [error.error_class, str(error)]

async def main():
    path = sys.argv[1]
    found = {}
    one, other = QMPClient("one"), QMPClient("other")
    await one.connect(path)
    await other.connect(path)
    found["greeting"] = [one.greeting.QMP.capabilities, sorted(one.greeting.QMP.version)]
    found["before"] = await one.execute("query-status")
    found["unknown"] = await failure(one.execute("no-such-cmd"))
    found["arguments"] = await failure(one.execute("machine-set", {"memory": {"size": "much"}}))

    with one.listener("RESUME") as resumed, other.listener(("STOP", "RESUME", "RESET")) as heard:
        await one.execute("chardev-add", {"id": "c", "backend": {"type": "null", "data": {}}})
        await one.execute("machine-set", {"kernel": "builtin:heartbeat", "memory": {"size": 64 << 20}, "serial": ["c"]})
        await one.execute("accel-set", {"accel": "kvm"})
        await one.execute("cpu-model-set", {"model": "host"})
        await one.execute("finish-machine-init")
        await one.execute("cont")
        found["event"] = (await resumed.get())["event"]
        await one.execute("stop")
        await one.execute("system_reset")
        await one.execute("cont")
        found["heard"] = [(await heard.get())["event"] for _ in range(4)]
    found["running"] = await other.execute("query-status")

    read_end, write_end = os.pipe()
    one.send_fd_scm(read_end)
    found["getfd"] = await one.execute("getfd", {"fdname": "pipe"})
    closed = await one.execute("closefd", {"fdname": "pipe"})
    found["closefd"] = [closed, await failure(one.execute("closefd", {"fdname": "pipe"}))]
    one.send_fd_scm(write_end)
    found["add-fd"] = sorted(await one.execute("add-fd", {"fdset-id": 3}))
    found["fdsets"] = [entry["fdset-id"] for entry in await other.execute("query-fdsets")]

    names = ["query-name", "query-version", "query-cpus-fast", "query-chardev", "query-migrate-parameters"]
    many = await asyncio.gather(*[client.execute(name) for client in (one, other) for name in names * 10])
    found["many"] = [many[:50] == many[50:], len(many)]
    found["oob"] = await failure(one.execute("query-status", oob=True))
    found["oob other"] = await other.execute("query-name")

    with other.listener("SHUTDOWN") as ending:
        await one.execute("quit")
        found["end"] = (await ending.get())["data"]
    for client in (one, other):
        try:
            await client.disconnect()
        except EOFError:
            pass  # the server hung up first
    print(json.dumps(found))

asyncio.run(main())
"""


async def test_qemu_qmp_builds_runs_and_ends_a_machine(tmp_path: Path) -> None:
    async with machine(tmp_path) as m:
        done = await trio.run_process([sys.executable, "-c", SCRIPT, m.path], capture_stdout=True)
        assert (await m.ended()).status == 0
    found = json.loads(done.stdout)
    assert found == {
        "greeting": [["oob"], ["package", "qemu"]],
        "before": {"running": False, "status": "prelaunch"},
        "unknown": [
            "CommandNotFound", "There is no command 'no-such-cmd'; query-commands lists those there are",
        ],
        "arguments": [
            "GenericError", "Command 'machine-set': 'memory.size' must be an integer, not \"much\"",
        ],
        "event": "RESUME",
        "heard": ["RESUME", "STOP", "RESET", "RESUME"],
        "running": {"running": True, "status": "running"},
        "getfd": {},
        "closefd": [
            {}, ["GenericError", "closefd: this session has no descriptor 'pipe' (it has: none)"],
        ],
        "add-fd": ["fd", "fdset-id"],
        "fdsets": [3],
        "many": [True, 100],
        "oob": ["GenericError", "Command 'query-status' can't be run out of band; use 'execute'"],
        "oob other": {},
        "end": {"guest": False, "reason": "host-qmp-quit"},
    }  # fmt: skip
