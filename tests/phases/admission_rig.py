"""A real machine with a session of every grant, a destination that does only what it is told, and such a source.

Sessions are the monitor's own over a wire in memory; the machine, KVM and the live updates' sockets are real.
"""

from __future__ import annotations

import json
import os
import socket
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Any, Final, final

import attrs
import trio

from vmm import host_sockets, hostio
from vmm.capabilities import ADMIN, MIGRATE, OBSERVE, OPERATE
from vmm.cpr.cell import OwnershipCell
from vmm.cpr.channel import CprChannel
from vmm.cpr.limits import CprLimits
from vmm.errors import VmmError, leaves
from vmm.monitor.session import Session, SessionOptions
from vmm.phases.boot import run_machine
from vmm.phases.start import VERSION, Start
from vmm.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence
    from pathlib import Path

    from vmm.cpr.channel import Message
    from vmm.monitor.events import Occurrence
    from vmm.phases.foundation import Host
    from vmm.recipe import Step

HANGS: Final = 20.0
"""Seconds after which what a test waits for does not come. No outcome depends on it."""

MEMORY: Final = 16 << 20
GRANTS: Final = {grant.name: grant for grant in (OBSERVE, OPERATE, MIGRATE, ADMIN)}
PATIENT: Final = CprLimits(describing=600, building=600, loading=600, taking=600)


@final
class Wire:
    """A client's wire, without a socket: what is put in is received, and what is sent can be read."""

    def __init__(self) -> None:
        self._in: list[tuple[bytes, list[int]]] = []
        self._out = bytearray()
        self._fds: list[int] = []
        self._closed = False
        self._changed = trio.Event()

    def _change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def put(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send `data` as the client, with descriptors, which are the session's from here on."""
        self._in.append((data, list(fds)))
        self._change()

    async def line(self) -> bytes:
        """Return the next line that the session sent."""
        while (end := self._out.find(b"\n")) < 0:
            await self._changed.wait()
        line = bytes(self._out[: end + 1])
        del self._out[: end + 1]
        return line

    def hang_up(self) -> None:
        """End the client's side."""
        self.put(b"")

    # What the session calls.

    async def receive(self) -> bytes:
        while not self._in:
            if self._closed:
                raise trio.ClosedResourceError
            await self._changed.wait()
        data, fds = self._in.pop(0)
        self._fds += fds
        return data

    def take_descriptors(self) -> list[int]:
        taken, self._fds = self._fds, []
        return taken

    def send_nowait(self, data: bytes) -> int:
        self._out += data
        self._change()
        return len(data)

    async def wait_sendable(self) -> None:
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        self._closed = True
        self._change()


@final
class Destination:
    """Where a live update goes: does the next of its steps when it is told to."""

    def __init__(self, folder: Path) -> None:
        self.main: Final = str(folder / "to-main")
        self.cpr: Final = str(folder / "to-cpr")
        self._listeners = [host_sockets.listen_unix(self.main), host_sockets.listen_unix(self.cpr)]
        self._channel: CprChannel | None = None
        self._cell: OwnershipCell | None = None
        self._held: list[Message | socket.socket] = []

    def accept(self, *, update: bool) -> None:
        """Accept the source, which has connected: to the CPR channel for a live update, else to the main one."""
        if not update:
            self._held.append(self._listeners[0].accept()[0])
            return
        sock, _ = self._listeners[1].accept()
        self._channel = CprChannel(trio.socket.from_stdlib_socket(sock), side="destination", peer="source")

    async def describe(self) -> None:
        """Say hello, and hear what the machine is."""
        assert self._channel is not None
        await self._channel.hello("a test")
        message = await self._channel.receive("machine")
        self._held.append(message)
        self._cell = OwnershipCell.adopt(message.claim("owner"))

    async def build(self) -> None:
        """Say that all is built, and hear that the guest is paused."""
        assert self._channel is not None
        await self._channel.send("ready", {})
        self._held.append(await self._channel.receive("paused"))
        self._held.append(self._listeners[0].accept()[0])

    async def load(self) -> None:
        """Say that the state is loaded, and hear that the guest is offered."""
        assert self._channel is not None
        await self._channel.send("loaded", {})
        self._held.append(await self._channel.receive("offered"))

    async def take(self) -> None:
        """Take the guest, and say so."""
        assert self._channel is not None
        assert self._cell is not None
        assert self._cell.take()
        assert self._cell.run()
        await self._channel.send("running", {"resumed-ns": None})

    def hang_up(self) -> None:
        """Close the channels of this attempt."""
        for end in (self._channel, self._cell, *self._held):
            if end is not None:
                end.close()
        self._channel = self._cell = None
        self._held.clear()

    def close(self) -> None:
        """Close everything."""
        self.hang_up()
        for listener in self._listeners:
            path = listener.getsockname()
            listener.close()
            os.unlink(path)


@final
class Source:
    """Where a live update comes from: describes a machine, and then leaves its destination waiting."""

    def __init__(self, folder: Path) -> None:
        self.main: Final = str(folder / "from-main")
        self.cpr: Final = str(folder / "from-cpr")
        self._channel: CprChannel | None = None

    async def describe(self, recipe: Sequence[Mapping[str, Any]]) -> None:
        """Connect, say what the machine is, and hear that all of it is built."""
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        await sock.connect(self.cpr)
        self._channel = CprChannel(sock, side="source", peer="destination")
        await self._channel.hello("a test")
        ram = hostio.create_ram(MEMORY, "ram")
        try:
            with closing(OwnershipCell.create()) as cell:
                body = {"recipe": list(recipe), "run-state": "running"}
                await self._channel.send("machine", body, {"ram": ram, "owner": cell.fd})
        finally:
            os.close(ram)
        (await self._channel.receive("ready")).close()

    def hang_up(self) -> None:
        """Close the channel."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None


@final
@attrs.define(eq=False)
class Rig:
    """A machine, with who talks to it."""

    host: Host
    sockets: Path
    """The folder for the machine's sockets, of which none may be left in the end."""
    destination: Destination
    source: Source
    scope: trio.CancelScope
    """Of the machine."""
    ended: trio.Event = attrs.Factory(trio.Event)
    failure: BaseException | None = None
    """What the machine ended with: an expected error, or a bug."""
    _wires: dict[str, Wire] = attrs.Factory(dict)

    @property
    def path(self) -> str:
        """The innermost open phase; empty once the machine has ended."""
        return self.host.tree.path

    async def ask(
        self, grant: str, command: str, arguments: Mapping[str, Any] | None = None, fds: Sequence[int] = ()
    ) -> dict[str, Any]:
        """Have the session with `grant` execute a command; return its reply, past all events."""
        wire = self._wires[grant]
        wire.put(json.dumps({"execute": command, "arguments": arguments or {}}).encode(), fds)
        with trio.fail_after(HANGS):
            while True:
                message: dict[str, Any] = json.loads(await wire.line())
                if "event" not in message:
                    return message

    async def admin(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Execute a command that must not fail."""
        reply = await self.ask("admin", command, arguments)
        assert "return" in reply, (command, arguments, reply)
        return reply["return"]

    async def wait_path(self, path: str) -> None:
        """Wait until `path` is the innermost open phase."""
        changed = trio.Event()

        def tell(_: Occurrence) -> None:
            changed.set()

        self.host.events.subscribe(tell)
        try:
            with trio.fail_after(HANGS):
                while self.path != path:
                    await changed.wait()
                    changed = trio.Event()
        finally:
            self.host.events.unsubscribe(tell)

    def told(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the events so far that are remembered."""
        hub = self.host.events
        told = hub.since(max(0, hub.last - 1000))
        assert told is not None
        return [(str(event.body["event"]), dict(event.body.get("data", {}))) for event in told]  # type: ignore[call-overload]


@asynccontextmanager
async def open_rig(folder: Path, *steps: Step) -> AsyncGenerator[Rig, None]:
    """Start a machine, and replay `steps`. When the block is left, the machine is cancelled if it has not ended."""
    sockets = folder / "machine"
    sockets.mkdir(exist_ok=True)
    start = Start(Recipe("of a test", steps), limits=PATIENT, complain=lambda text: None)
    scope = trio.CancelScope()
    rigs: list[Rig] = []

    async def live(*, task_status: trio.TaskStatus[Host]) -> None:
        failure: BaseException | None = None
        try:
            with scope:
                await run_machine(start, task_status=task_status)
        except* Exception as group:
            failure = group
        for rig in rigs:
            rig.failure = failure
            rig.ended.set()
        if failure is not None and not rigs:
            raise failure

    async with trio.open_nursery() as nursery:
        host: Host = await nursery.start(live)
        destination, source = Destination(folder), Source(sockets)
        rig = Rig(host, sockets, destination, source, scope)
        rigs.append(rig)
        try:
            for name, grant in GRANTS.items():
                wire = rig._wires[name] = Wire()
                session = Session(f"{name}/0", wire, host.table, host.events, SessionOptions(VERSION, grant=grant))
                nursery.start_soon(session.serve)
                await wire.line()
                assert await rig.ask(name, "qmp_capabilities") == {"return": {}}
            yield rig
        finally:
            scope.cancel()
            destination.close()
            source.hang_up()
            for wire in rig._wires.values():
                wire.hang_up()


def unexpected(failure: BaseException | None) -> list[BaseException]:
    """Return the bugs in what a machine ended with."""
    if failure is None:
        return []
    return [error for error in leaves(failure) if not isinstance(error, VmmError | trio.Cancelled)]


def opened(events: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Return what opened and closed, in the words of `out_of_order`, but for what is beside the chain."""
    words = {"TOKEN_GRANTED": "granted", "TOKEN_REVOKED": "revoked"}
    return [
        f"{words[name]} {data['token']} of {data['path']}"
        if name in words
        else f"{'open' if data['opened'] else 'leave'} {data['path']}"
        for name, data in events
        if (name in words or name == "PHASE_CHANGED") and data["phase"] not in ("fd_receive", "stream_receive")
    ]
