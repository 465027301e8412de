"""The monitor against `qemu.qmp`, the client of QEMU's own test suite, in a process of its own."""

from __future__ import annotations

import json
import os
import socket
import sys
from typing import TYPE_CHECKING

import trio

from tests.monitor.fakes import VERSION, FakeExecutor
from vmm.monitor.events import Event, EventHub
from vmm.monitor.session import SessionOptions
from vmm.monitor.unix import qmp_monitor

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from vmm.monitor.ports import Caller

SCRIPT = """
import asyncio, json, os, sys
from qemu.qmp import ExecuteError, QMPClient

async def main():
    found = {}
    client = QMPClient("test")
    await client.connect(sys.argv[1])
    found["package"] = client.greeting.QMP.version["package"]
    found["echo"] = await client.execute("echo", {"n": [1, "\\u00e9"]})
    try:
        await client.execute("fail")
    except ExecuteError as error:
        found["class"] = error.error_class
        found["desc"] = str(error)
    with client.listener("STOP") as listener:
        await client.execute("echo", {"n": "stop"})
        found["event"] = (await listener.get())["event"]
    read_end, write_end = os.pipe()
    client.send_fd_scm(read_end)
    found["claim"] = await client.execute("claim")
    found["oob"] = await client.execute("yank", oob=True)
    many = [client.execute("echo", {"n": n}) for n in range(50)]
    found["many"] = [reply["n"] for reply in await asyncio.gather(*many)]
    await client.disconnect()
    print(json.dumps(found))

asyncio.run(main())
"""


class StoppingExecutor(FakeExecutor):
    """Emits STOP when asked to echo "stop"."""

    hub: EventHub

    async def execute(self, caller: Caller, name: str, arguments: Mapping[str, object]) -> object:
        if arguments.get("n") == "stop":
            self.hub.emit("STOP")
        return await super().execute(caller, name, arguments)


async def test_qemu_qmp_can_do_all_it_does_with_qemu(tmp_path: Path) -> None:
    executor = StoppingExecutor()
    executor.hub = EventHub([Event("STOP")])
    it = qmp_monitor("qmp0", executor, executor.hub, SessionOptions(VERSION), lambda line: None)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "qmp"))
        listener.listen()
        async with trio.open_nursery() as nursery:
            await nursery.start(it.serve_listener, listener, lambda sock: None)
            with trio.fail_after(60):
                done = await trio.run_process(
                    [sys.executable, "-c", SCRIPT, str(tmp_path / "qmp")], capture_stdout=True
                )
            nursery.cancel_scope.cancel()
    assert json.loads(done.stdout) == {
        "package": "trio-vmm-0.1",
        "echo": {"n": [1, "é"]},
        "class": "DeviceNotFound",
        "desc": "Device 'disk0' does not exist",
        "event": "STOP",
        "claim": 1,
        "oob": {},
        "many": list(range(50)),
    }
    for fd in executor.claimed:
        os.close(fd)
