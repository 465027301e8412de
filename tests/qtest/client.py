"""A client of qtest, and machines to try it on."""

from __future__ import annotations

import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Self, final

import attrs
import trio

from tests.phases.machine import appearance, bare
from vmm.recipe import Step

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping
    from pathlib import Path

    from tests.phases.machine import Running
    from vmm.qmp_client import QmpClient

PATIENCE = 20
"""Seconds after which a test gives up. Nothing is measured by it."""
SIZE = 8 << 20
"""Bytes of RAM of a machine here."""


@final
@attrs.define(eq=False)
class QtestClient:
    """One end of a qtest socket."""

    stream: trio.SocketStream
    interrupts: list[str] = attrs.Factory(list)
    """`raise N` and `lower N`, as they came."""
    _data: bytearray = attrs.Factory(bytearray)

    @classmethod
    async def connect(cls, path: Path) -> Self:
        """Connect to the socket at `path`."""
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        await sock.connect(str(path))
        return cls(trio.SocketStream(sock))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stream.aclose()

    async def line(self) -> str | None:
        """Read one line; None at the end of the stream."""
        while b"\n" not in self._data:
            data = await self.stream.receive_some()
            if not data:
                assert not self._data, f"half a line: {bytes(self._data)!r}"
                return None
            self._data += data
        line, _, rest = bytes(self._data).partition(b"\n")
        self._data[:] = rest
        return line.decode("ascii")

    async def send(self, *lines: str) -> None:
        """Send lines."""
        await self.stream.send_all("".join(f"{line}\n" for line in lines).encode())

    async def reply(self) -> str:
        """Read the next line that is no interrupt."""
        while (line := await self.line()) is not None:
            if not line.startswith("IRQ "):
                return line
            self.interrupts.append(line.removeprefix("IRQ "))
        raise AssertionError("the other side hung up")

    async def ask(self, line: str) -> str:
        """Send a line and read the answer."""
        with trio.fail_after(PATIENCE):
            await self.send(line)
            return await self.reply()

    async def do(self, line: str) -> str:
        """Send a line that must succeed; return what follows `OK`."""
        answer = await self.ask(line)
        assert answer == "OK" or answer.startswith("OK "), f"{line!r} was answered {answer!r}"
        return answer.removeprefix("OK").removeprefix(" ")

    async def value(self, line: str) -> int:
        """Send a line that must succeed; return the number that follows `OK`."""
        return int(await self.do(line), 0)

    async def interrupt(self) -> str:
        """Take the next interrupt, waiting for it if need be."""
        with trio.fail_after(PATIENCE):
            while not self.interrupts:
                line = await self.line()
                assert line is not None
                assert line.startswith("IRQ "), line
                self.interrupts.append(line.removeprefix("IRQ "))
        return self.interrupts.pop(0)

    async def changes(self) -> list[str]:
        """Return the interrupts so far, all that were told before an answer that is asked for now, and forget them."""
        await self.do("endianness")
        changes, self.interrupts = self.interrupts, []
        return changes


def unix(name: str, path: Path, *, server: bool = True) -> Step:
    """Return the command that makes a chardev of a unix socket."""
    address = {"type": "unix", "data": {"path": str(path)}}
    data = {"addr": address, "server": server, "wait": False}
    return Step("chardev-add", {"id": name, "backend": {"type": "socket", "data": data}})


def qtest_object(**more: Any) -> Step:
    """Return the command that makes the qtest object, over chardev `qt`."""
    return Step("object-add", {"qom-type": "qtest", "id": "qtest0", "chardev": "qt", **more})


@final
@attrs.define(eq=False)
class Bench:
    """A machine, with a client of its monitor and one of its qtest."""

    running: Running
    qmp: QmpClient
    qtest: QtestClient
    path: Path
    """Of the qtest's socket."""


@asynccontextmanager
async def before_machine(tmp_path: Path, *more: Step, **options: Any) -> AsyncGenerator[Bench, None]:
    """Run a process without a machine, with a monitor and a qtest."""
    path = tmp_path / "qt"
    async with bare(tmp_path, unix("qt", path), *more, qtest_object(**options)) as (running, qmp):
        await appearance(path)
        async with await QtestClient.connect(path) as client:
            yield Bench(running, qmp, client, path)


@asynccontextmanager
async def machine(
    tmp_path: Path, *more: Step, accel: str = "qtest", options: Mapping[str, Any] | None = None, **qtest: Any
) -> AsyncGenerator[Bench, None]:
    """Run a machine as far as phase devices; `options` are more of `machine-set`'s, `qtest` of the qtest object's."""
    async with before_machine(tmp_path, *more, **qtest) as bench:
        await build(bench.qmp, accel, options)
        yield bench


async def build(qmp: QmpClient, accel: str = "qtest", options: Mapping[str, Any] | None = None) -> None:
    """Build a machine as far as phase devices."""
    await qmp.execute("machine-set", memory={"size": SIZE}, **(options or {}))
    await qmp.execute("accel-set", accel=accel)
    await qmp.execute("cpu-model-set")
