"""Machines in real `trio-vmm` processes, with clients that talk to them over their sockets."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, final

import attrs
import trio

from tests.kvm.tiny import assemble
from vmm.qmp_client import QmpClient, qmp_over, qmp_session

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from contextlib import AbstractAsyncContextManager

TRIO_VMM = str(Path(sys.executable).with_name("trio-vmm"))
PATIENCE = 60
"""Seconds after which a test gives up. Nothing is measured by it."""
FLAT_BASE = 0x10000
"""Where a flat image lies. Real-mode segments begin there, flat protected-mode ones at 0."""

_TO_PROTECTED_MODE = f"""
 cli
 lgdt [gdtr]
 mov eax, cr0
 or al, 1
 mov cr0, eax
 jmp dword 8:flat + {FLAT_BASE}
gdt: dq 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdtr: dw 23
 dd gdt + {FLAT_BASE}
bits 32
flat: mov ax, 16
 mov ds, ax
 mov es, ax
 mov ss, ax
"""
HALT = "stay: hlt\n jmp stay"
TRIPLE_FAULT = f"{_TO_PROTECTED_MODE} lidt [none + {FLAT_BASE}]\n ud2\nnone: dw 0\n dd 0"
JUMP_INTO_NOTHING = f"{_TO_PROTECTED_MODE} mov eax, 0xd0000000\n jmp eax"
PULL_RESET = "mov al, 0xfe\n out 0x64, al\nstay: hlt\n jmp stay"
ECHO = """
 mov dx, 0x3fd
poll: in al, dx
 test al, 1
 jz poll
 mov dx, 0x3f8
 in al, dx
 out dx, al
 mov dx, 0x3fd
 jmp poll
"""
"""Sends back on COM1 each byte that comes."""


def debug_exit(value: int) -> str:
    """Make the source of a guest that writes `value` to the debug-exit port."""
    return f"mov dx, 0x501\n mov ax, {value}\n out dx, ax\nstay: hlt\n jmp stay"


def flat_guest(directory: Path, source: str, name: str = "guest") -> str:
    """Assemble `source` and return the value of `-kernel`."""
    path = directory / f"{name}.bin"
    path.write_bytes(assemble(source, origin=0))
    return f"flat:{path}"


def environment() -> dict[str, str]:
    """The environment of the processes: warnings are errors there too."""
    return {**os.environ, "PYTHONWARNINGS": "error"}


@final
@attrs.frozen
class Done:
    """A `trio-vmm` that has ended."""

    status: int
    out: str
    err: str


async def trio_vmm(*arguments: str | Path, **options: Any) -> Done:
    """Run `trio-vmm` with `arguments` to its end."""
    with trio.fail_after(PATIENCE):
        done = await trio.run_process(
            [TRIO_VMM, *map(str, arguments)],
            capture_stdout=True, capture_stderr=True, check=False, env=environment(), **options,
        )  # fmt: skip
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


@final
@attrs.define(eq=False)
class Machine:
    """A running `trio-vmm`, and a session with it that is there from its first moment."""

    process: trio.Process
    qmp: QmpClient
    directory: Path
    path: str
    """Of its monitor's socket."""

    def session(self) -> AbstractAsyncContextManager[QmpClient]:
        """Open one more session."""
        return qmp_session(self.path)

    async def raw(self) -> Raw:
        """Open one more connection that sends bytes and reads lines, greeting included."""
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        await sock.connect(self.path)
        return Raw(sock)

    async def until_running(self) -> None:
        """Wait until the guest runs."""
        if not (await self.qmp.execute("query-status"))["running"]:
            await self.event("RESUME")

    async def until_phase(self, phase: str) -> None:
        """Wait until `phase` is the innermost."""
        if (await self.qmp.execute("query-machine-phase"))["path"].split("/")[-1] != phase:
            await self.event("PHASE_CHANGED", lambda data: data["phase"] == phase and data["opened"])

    async def event(self, name: str, wanted: Callable[[dict[str, Any]], bool] = lambda data: True) -> dict[str, Any]:
        """Take events until one is a `name` with the `wanted` data, and return its data."""
        event = await self.qmp.wait_event(lambda event: event["event"] == name and wanted(event.get("data", {})))
        data: dict[str, Any] = event.get("data", {})
        return data

    async def ended(self) -> Done:
        """Wait for the process, and return its status and what it said."""
        status = await self.process.wait()
        return Done(status, (self.directory / "stdout").read_text(), (self.directory / "stderr").read_text())

    async def quit(self) -> Done:
        """Send `quit`, and wait for the end."""
        await self.qmp.execute("quit")
        return await self.ended()


@asynccontextmanager
async def machine(directory: Path, *options: str | Path, chardev: str = "") -> AsyncGenerator[Machine, None]:
    """Run `trio-vmm run` with `options` and a monitor at a socket in `directory`; at the end, end it if it still runs.

    `chardev` names the monitor's chardev, for a process that shall take over a machine that has the usual names.
    Fails if the process has left the monitor's socket on disk, or said anything unexpected: a traceback.
    """
    path = str(directory / "qmp")
    monitor = ["-qmp", f"unix:{path}"]
    if chardev:
        monitor = ["-chardev", f"socket,id={chardev},path={path},server=on", "-qmp", f"chardev:{chardev}"]
    ours, theirs = socket.socketpair()
    # The connected monitor is made after the listening one: once it greets, both are there.
    command = [TRIO_VMM, "run", *monitor, "-qmp", f"fd:{theirs.fileno()}", *map(str, options)]
    with (directory / "stdout").open("wb") as out, (directory / "stderr").open("wb") as err, theirs:
        process = await trio.lowlevel.open_process(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, pass_fds=(theirs.fileno(),), env=environment()
        )
    try:
        with trio.fail_after(PATIENCE):
            async with qmp_over(ours, "the test's own socket") as client:
                yield Machine(process, client, directory, path)
                if process.returncode is None:
                    process.send_signal(signal.SIGTERM)
                    await process.wait()
    except BaseException as error:
        error.add_note(f"trio-vmm said: {(directory / 'stderr').read_text()}")
        raise
    finally:
        if process.returncode is None:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
    said = (directory / "stderr").read_text()
    assert "Traceback" not in said, said
    assert "qmp" not in os.listdir(directory), "the monitor's socket was left on disk"


@final
@attrs.define(eq=False)
class Raw:
    """A client that sends bytes and reads lines."""

    sock: trio.socket.SocketType
    _data: bytearray = attrs.Factory(bytearray)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.sock.close()

    async def send(self, data: bytes | dict[str, Any]) -> None:
        """Send bytes, or a message."""
        raw = data if isinstance(data, bytes) else json.dumps(data).encode()
        while raw:
            raw = raw[await self.sock.send(raw) :]

    async def message(self) -> Any:
        """Read one message, whatever it is; None at the end."""
        while b"\n" not in self._data:
            data = await self.sock.recv(65536)
            if not data:
                return None
            self._data += data
        line, _, rest = bytes(self._data).partition(b"\n")
        self._data[:] = rest
        return json.loads(line)

    async def reply(self) -> Any:
        """Read one message that is no event."""
        while "event" in (message := await self.message() or {}):
            pass
        return message

    async def ask(self, data: bytes | dict[str, Any]) -> Any:
        """Send, and read the reply."""
        await self.send(data)
        return await self.reply()

    async def negotiate(self, *, oob: bool = False) -> None:
        """Read the greeting, and enter command mode."""
        assert "QMP" in await self.message()
        enable = {"enable": ["oob"]} if oob else {}
        assert await self.ask({"execute": "qmp_capabilities", "arguments": enable}) == {"return": {}}
