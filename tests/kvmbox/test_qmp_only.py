"""A machine from nothing but its monitor: Linux is built, booted and stopped by commands, and the session is recorded.

    python -m tests.kvmbox tests/kvmbox/test_qmp_only.py --transcript docs/qmp-session.md

writes what was said, both ways, to where the documentation has it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final, final

import attrs
import pytest
import trio

from tests.kvmbox.console import SerialConsole
from tests.kvmbox.guest import READY, command_line

if TYPE_CHECKING:
    from pathlib import Path

    from tests.kvmbox.conftest import MakeInitramfs

pytestmark = [pytest.mark.kvmbox, pytest.mark.usefixtures("no_leaks")]

START: Final = 120.0
"""Seconds from the start of the process to its monitor. Python needs eight or so in the box."""

BOOT: Final = 240.0
"""Seconds from `cont` to the guest's script. Twenty or so are usual in the box."""

MODULES: Final = ("virtio_mmio", "virtio_rng")

SCRIPT: Final = """\
echo "guest: $(uname -sr), $(nproc) vCPU, random bytes of $(cat /sys/class/misc/hw_random/rng_current)"
read -r word
echo "guest: $word"
poweroff -f
"""

_HEAD: Final = """\
# A session of nothing but QMP

`trio-vmm run -qmp unix:/run/vmm/qmp` was started, and nothing else was said to it. All that follows went over that
socket: `->` is what the client sent, `<-` what it received. Linux is Debian's cloud kernel, with an initramfs of
busybox and a script. Times, and the events that say which tokens come and go with each phase (TOKEN_GRANTED,
TOKEN_REVOKED), have been left out, and paths made shorter; lines that begin with `#` are ours.

Recorded by `python -m tests.kvmbox tests/kvmbox/test_qmp_only.py --transcript docs/qmp-session.md`, a test that runs
with all others.

```
"""


@final
@attrs.define(eq=False)
class Recorded:
    """A session whose every message is kept."""

    stream: trio.SocketStream
    said: list[tuple[str, str]] = attrs.Factory(list)
    """What was said, after an arrow for who said it, or `#`."""
    _data: bytearray = attrs.Factory(bytearray)

    def note(self, text: str) -> None:
        """Add a remark."""
        self.said.append(("#", text))

    async def read(self) -> dict[str, Any] | None:
        """Return the next message; None at the end."""
        while b"\n" not in self._data:
            data = await self.stream.receive_some()
            if not data:
                self.note("the end of the stream")
                return None
            self._data += data
        line, _, rest = bytes(self._data).partition(b"\n")
        self._data[:] = rest
        self.said.append(("<-", line.decode().strip()))
        message: dict[str, Any] = json.loads(line)
        return message

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Send a command, which must not fail, and return what it returns; what comes before that are events."""
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = arguments
        self.said.append(("->", json.dumps(request)))
        await self.stream.send_all(json.dumps(request).encode())
        while True:
            message = await self.read()
            assert message is not None, f"{command}: the stream has ended"
            assert "error" not in message, message
            if "return" in message:
                return message["return"]

    async def event(self, name: str) -> dict[str, Any]:
        """Read on to the next event `name`, and return its data."""
        while (message := await self.read()) is not None:
            if message.get("event") == name:
                data: dict[str, Any] = message.get("data", {})
                return data
        raise AssertionError(f"the stream ended without {name}")

    def transcript(self, paths: dict[str, str]) -> str:
        """Return what was said as a document, with `paths` by what they are called there."""
        lines = []
        for who, text in self.said:
            if who == "#":
                lines.append(f"# {text}")
                continue
            message = json.loads(text)
            if message.get("event", "").startswith("TOKEN_"):
                continue
            message.pop("timestamp", None)
            shown = json.dumps(message)
            for path, name in paths.items():
                shown = shown.replace(path, name)
            lines.append(f"{who} {shown}")
        return _HEAD + "\n".join(lines) + "\n```\n"


async def connected(path: Path) -> trio.SocketStream:
    """Connect to the monitor as soon as it is there."""
    with trio.fail_after(START):
        while True:
            try:
                return await trio.open_unix_socket(str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                await trio.sleep(0.1)  # nothing tells when a socket appears


async def test_linux_is_built_booted_and_stopped_by_nothing_but_qmp(
    linux_kernel: Path, initramfs: MakeInitramfs, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    qmp, com, log = tmp_path / "qmp", tmp_path / "com", tmp_path / "log"
    initrd = initramfs(SCRIPT, MODULES)
    command = [sys.executable, "-m", "vmm", "run", "-qmp", f"unix:{qmp}"]
    with log.open("wb") as file:
        process = await trio.lowlevel.open_process(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        async with await connected(qmp) as stream:
            session = Recorded(stream)
            await builds_boots_and_stops(session, linux_kernel, initrd, com)
            with trio.fail_after(START):
                assert await process.wait() == 0
    finally:
        with trio.CancelScope(shield=True):
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert log.read_text() == ""
    assert not os.path.exists(qmp)  # noqa: ASYNC240
    assert not os.path.exists(com)  # noqa: ASYNC240
    where = request.config.getoption("--transcript", default=None)
    if where:
        names = {
            str(linux_kernel): "/boot/vmlinuz-cloud",
            str(initrd): "/run/vmm/initramfs.cpio",
            str(tmp_path): "/run/vmm",
        }
        with open(where, "w") as document:  # noqa: ASYNC230
            document.write(session.transcript(names))


async def builds_boots_and_stops(session: Recorded, kernel: Path, initrd: Path, com: Path) -> None:
    greeting = await session.read()
    assert greeting is not None
    assert "QMP" in greeting
    await session.execute("qmp_capabilities")
    assert (await session.execute("query-machine-phase"))["phase"] == "no-machine"

    session.note("a serial port's other end, and the machine")
    address = {"type": "unix", "data": {"path": str(com)}}
    await session.execute(
        "chardev-add", id="com", backend={"type": "socket", "data": {"addr": address, "server": True, "wait": False}}
    )
    await session.execute(
        "machine-set",
        type="microvm",
        name="debian",
        memory={"size": 256 << 20},
        smp={"cpus": 1},
        kernel=str(kernel),
        initrd=str(initrd),
        append=command_line(),
        serial=["com"],
    )
    await session.execute("accel-set", accel="kvm")
    session.note("KVM is open; devices may be named from here on, and are built with the board")
    await session.execute("object-add", **{"qom-type": "rng-builtin", "id": "entropy"})
    await session.execute("device_add", driver="virtio-rng-device", id="rng0", rng="entropy")
    await session.execute("cpu-model-set", model="host")
    assert (await session.execute("query-machine-phase"))["phase"] == "machine-initialized"
    assert len(await session.execute("query-cpus-fast")) == 1
    await session.execute("finish-machine-init")
    assert await session.execute("query-status") == {"running": False, "status": "prelaunch"}

    async with SerialConsole.connected(com) as console:
        session.note("Linux boots; the client has connected to the serial port to see it")
        await session.execute("cont")
        await console.expect(f"^{READY}$", within=BOOT)
        hello = await console.expect("^guest: Linux .*$", within=BOOT)
        session.note(f"on the serial port: {hello[0]}")
        assert hello[0].endswith(", 1 vCPU, random bytes of virtio_rng.0")

        session.note("it stands, and runs again")
        await session.execute("stop")
        assert (await session.execute("query-status"))["status"] == "paused"
        await session.execute("cont")
        await console.send("goodbye\n")
        await console.expect("^guest: goodbye$", within=BOOT)

        session.note("typed on the serial port: goodbye, whereupon the guest turns the machine off")
        with trio.fail_after(BOOT):
            assert await session.event("SHUTDOWN") == {"guest": True, "reason": "guest-shutdown"}
            while await session.read() is not None:
                pass
