"""`trio-vmm` as a process that has no /dev/kvm, driven by a client that it connects to: as libqtest starts QEMU."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.qmp.kit import TRIO_VMM, environment
from tests.qtest.client import PATIENCE, QtestClient

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("no_leaks")


def hidden() -> list[str]:
    """Return what runs a command with a /dev/kvm that is none."""
    if not os.path.exists("/dev/kvm"):
        return []
    script = 'mount --bind /dev/null /dev/kvm && exec "$@"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let a process hide /dev/kvm from itself")
    return command


async def accepted(listener: trio.SocketListener) -> trio.SocketStream:
    with trio.fail_after(PATIENCE):
        return await listener.accept()


@asynccontextmanager
async def listening(path: Path) -> AsyncGenerator[trio.SocketListener, None]:
    sock = trio.socket.socket(trio.socket.AF_UNIX)
    await sock.bind(str(path))
    sock.listen()
    async with trio.SocketListener(sock) as listener:
        yield listener


async def message(stream: trio.SocketStream, wanted: str) -> dict[str, Any]:
    """Read QMP messages up to one with a member `wanted`."""
    data = b""
    with trio.fail_after(PATIENCE):
        while True:
            while b"\n" not in data:
                data += await stream.receive_some()
            line, data = data.split(b"\n", 1)
            found: dict[str, Any] = json.loads(line)
            if wanted in found:
                return found


async def test_it_connects_to_both_sockets_of_libqtest_and_needs_no_kvm(tmp_path: Path) -> None:
    prefix = await trio.to_thread.run_sync(hidden)
    async with listening(tmp_path / "qt") as tests, listening(tmp_path / "qmp") as monitors:
        command = [
            *prefix, TRIO_VMM, "run", "-qtest", f"unix:{tmp_path}/qt", "-qtest-log", str(tmp_path / "log"),
            "-chardev", f"socket,path={tmp_path}/qmp,id=char0", "-object", "monitor-qmp,id=qmp0,chardev=char0",
            "-display", "none", "-accel", "qtest", "-m", "16", "-smp", "2",
        ]  # fmt: skip
        process = await trio.lowlevel.open_process(command, stdin=subprocess.DEVNULL, env=environment())
        try:
            async with QtestClient(await accepted(tests)) as client, await accepted(monitors) as qmp:
                assert "QMP" in await message(qmp, "QMP")
                await qmp.send_all(b'{"execute": "qmp_capabilities"}\n')
                await message(qmp, "return")
                assert await client.do("endianness") == "little"
                await client.do("writeq 0x1000 0x1122334455667788")
                assert await client.do("read 0x1000 8") == "0x8877665544332211"
                assert await client.do("clock_step 1000000") == "1000000"
                await qmp.send_all(b'{"execute": "query-status"}\n')
                assert (await message(qmp, "return"))["return"] == {"running": True, "status": "running"}
                await qmp.send_all(b'{"execute": "quit"}\n')
                with trio.fail_after(PATIENCE):
                    assert await process.wait() == 0
                    assert await client.line() is None
        finally:
            if process.returncode is None:
                process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()
    assert "[R +" in (tmp_path / "log").read_text()


async def test_without_the_accelerator_the_lack_of_kvm_is_an_error(tmp_path: Path) -> None:
    """So the other test does run without KVM."""
    command = [*(await trio.to_thread.run_sync(hidden)), TRIO_VMM, "run", "-kernel", "builtin:heartbeat"]
    done = await trio.run_process(command, capture_stderr=True, check=False, env=environment())
    assert done.returncode == 1
    assert b"Cannot use /dev/kvm: it " in done.stderr
