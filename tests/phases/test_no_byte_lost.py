"""Bytes go through a chardev while its machine goes from one to the next, and each arrives once, in order.

Both sides of an update are machines of their own in this process. Most execute nothing: what puts and takes bytes is a
device of the test's, which is faster than any guest here. One has a guest that echoes what comes on its serial port.
"""

from __future__ import annotations

import hashlib
import random
import socket
import struct
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, final

import attrs
import pytest
import trio
import trio.testing

import vmm
from tests.backends.chardev_kit import Frontend, read_exactly
from tests.phases.update_kit import OVER, channels, due
from tests.qmp.kit import flat_guest

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from pathlib import Path

    from vmm.backends.chardev import Chardev
    from vmm.embedding import EmbeddedMachine

pytestmark = pytest.mark.usefixtures("no_leaks")

MIB: Final = 1 << 20
UPDATES: Final = 20
CHUNK: Final = 128 << 10


@final
@attrs.define(eq=False)
class Bytes:
    """So many random bytes, the same for the same seed."""

    size: int
    seed: int
    chunk: int = CHUNK
    sent: int = 0
    _random: random.Random = attrs.field(init=False)
    _hash: Any = attrs.field(factory=hashlib.sha256, init=False)

    def __attrs_post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def next(self) -> bytes:
        """Return the next few, empty at the end."""
        data = self._random.randbytes(min(self.chunk, self.size - self.sent))
        self.sent += len(data)
        self._hash.update(data)
        return data

    @property
    def digest(self) -> str:
        """SHA-256 of those that were returned."""
        return str(self._hash.hexdigest())


@final
@attrs.define(eq=False)
class Sink:
    """Counts and digests what arrives."""

    count: int = 0
    _hash: Any = attrs.field(factory=hashlib.sha256, init=False)
    _changed: trio.Event = attrs.field(factory=trio.Event, init=False)

    def take(self, data: bytes) -> None:
        self.count += len(data)
        self._hash.update(data)
        self._changed.set()
        self._changed = trio.Event()

    async def reached(self, count: int) -> None:
        while self.count < count:
            await self._changed.wait()

    @property
    def digest(self) -> str:
        return str(self._hash.hexdigest())


@final
@attrs.define(eq=False)
class Port:
    """The pump's side of one machine's chardev."""

    pump: Pump
    chardev: Chardev

    def room(self) -> int:
        return min(CHUNK, self.pump.limit - self.pump.input.count)

    def receive(self, data: bytes) -> None:
        self.pump.input.take(data)

    def drained(self) -> None:
        self.pump.port = self
        self.pump.go_on()


@final
@attrs.define(eq=False)
class Pump:
    """A device of the guest's, as it were, which goes along with its machine."""

    output: Bytes
    limit: int
    """Bytes of input that it takes before it waits."""
    input: Sink = attrs.Factory(Sink)
    port: Port | None = None
    held: int = 0
    """How often it found no room."""
    _wake: trio.Event = attrs.Factory(trio.Event)

    def attach(self, machine: EmbeddedMachine) -> None:
        """Become the device behind the machine's chardev."""
        chardev = machine._host.stores.chardevs["pump"].chardev
        self.port = Port(self, chardev)
        chardev.attach(self.port)
        self.go_on()

    def go_on(self) -> None:
        self._wake.set()
        self._wake = trio.Event()

    def allow(self, limit: int) -> None:
        self.limit = limit
        assert self.port is not None
        self.port.chardev.accept_input()

    async def run(self) -> None:
        """Put out all there is."""
        while data := self.output.next():
            while data:
                assert self.port is not None
                count = self.port.chardev.put(data)
                data = data[count:]
                if count:
                    await trio.lowlevel.checkpoint()
                else:
                    self.held += 1
                    await self._wake.wait()


@final
@attrs.define(eq=False)
class Client:
    """Who is at the other end of the socket."""

    stream: trio.SocketStream
    output: Bytes
    limit: int
    """Bytes that it reads before it waits."""
    input: Sink = attrs.Factory(Sink)
    _wake: trio.Event = attrs.Factory(trio.Event)

    def allow(self, limit: int) -> None:
        self.limit = limit
        self._wake.set()
        self._wake = trio.Event()

    async def send(self) -> None:
        while data := self.output.next():
            await self.stream.send_all(data)

    async def read(self, size: int) -> None:
        while self.input.count < size:
            if self.input.count == self.limit:
                await self._wake.wait()
            data = await self.stream.receive_some(min(CHUNK, self.limit - self.input.count))
            assert data, "hung up on"
            self.input.take(data)


def backend(path: Path | None) -> dict[str, Any]:
    """A listening socket: at `path`, or a TCP one at any port."""
    address: dict[str, Any] = (
        {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}
        if path is None
        else {"type": "unix", "data": {"path": str(path)}}
    )
    return {"type": "socket", "data": {"addr": address, "server": True, "wait": False}}


def recipe(path: Path | None) -> list[dict[str, Any]]:
    """A machine that executes nothing."""
    return [
        {"execute": "chardev-add", "arguments": {"id": "pump", "backend": backend(path)}},
        {"execute": "machine-set", "arguments": {"memory": {"size": MIB}}},
        {"execute": "accel-set", "arguments": {"accel": "qtest"}},
        {"execute": "cpu-model-set"},
        {"execute": "finish-machine-init"},
        {"execute": "cont"},
    ]


@final
@attrs.define(eq=False)
class Line:
    """One machine after another, each the successor of the last."""

    folder: Path
    nursery: trio.Nursery
    machine: EmbeddedMachine = attrs.field(init=False)
    _over: trio.Event = attrs.field(factory=trio.Event, init=False)
    _number: int = 0

    async def begin(self, steps: list[dict[str, Any]]) -> None:
        self.machine = await self.nursery.start(self._run, steps, self._over)

    async def _run(
        self, steps: list[dict[str, Any]], over: trio.Event, *, task_status: trio.TaskStatus[EmbeddedMachine]
    ) -> None:
        async with vmm.machine(steps) as machine:
            task_status.started(machine)
            await over.wait()

    async def successor(self) -> tuple[EmbeddedMachine, trio.Event, list[dict[str, Any]]]:
        """Start a machine that awaits another one."""
        self._number += 1
        where = channels(str(self.folder / f"main{self._number}"), str(self.folder / f"cpr{self._number}"))
        over = trio.Event()
        steps = [{"execute": "migrate-incoming", "arguments": {"channels": where}}]
        return await self.nursery.start(self._run, steps, over), over, where

    async def update(self, during: Callable[[], Awaitable[object]] | None = None, *, fails: bool = False) -> None:
        """Hand the machine over. When all of it is at rest, wait for `during`; then the new one ends if it `fails`."""
        new, over, where = await self.successor()
        old = self.machine
        stores = old._host.stores
        quiesce = stores.quiesce

        async def quiesce_and_more() -> None:
            await quiesce()
            if during is not None:
                await during()
            if fails:
                over.set()

        stores.quiesce = quiesce_and_more  # type: ignore[method-assign]
        async with old.events() as events:
            parameters = {"mode": "cpr-transfer"}
            capabilities = [{"capability": "events", "state": True}]
            await old.execute("migrate", channels=where, parameters=parameters, capabilities=capabilities)
            async for _ in events:
                info: dict[str, Any] = await old.execute("query-migrate")
                if info["status"] in OVER:
                    break
        stores.quiesce = quiesce  # type: ignore[method-assign]
        if fails:
            assert info["status"] == "failed", info
            return
        assert info["status"] == "completed", info
        self._over.set()
        self.machine, self._over = new, over

    def end(self) -> None:
        self._over.set()


async def connect(machine: EmbeddedMachine, path: Path | None) -> trio.SocketStream:
    """Connect to the chardev, and wait until it has noticed."""
    if path is not None:
        stream = trio.SocketStream((await trio.open_unix_socket(str(path))).socket)
    else:
        shown = (await machine.execute("query-chardev"))[0]["filename"]
        stream = await trio.open_tcp_stream("127.0.0.1", int(shown.partition(",server=on")[0].rpartition(":")[2]))
    while (await machine.execute("query-chardev"))[0]["filename"].startswith("disconnected:"):
        await trio.lowlevel.checkpoint()
    return stream


@pytest.mark.parametrize(("family", "chunk"), [("unix", 16 << 10), ("tcp", CHUNK)])
async def test_a_hundred_mebibytes_each_way_through_twenty_updates(tmp_path: Path, family: str, chunk: int) -> None:
    size, reserve = 100 * MIB, MIB
    path = tmp_path / "pump" if family == "unix" else None
    async with due("the whole of it"), trio.open_nursery() as nursery:
        line = Line(tmp_path, nursery)
        await line.begin(recipe(path))
        # A part of the bytes waits for each update, so that none of them comes when all has been said. With small
        # chunks the rest takes longer than the updates, which come in full flow; with large ones, most of them find all
        # buffers full.
        limit = size - UPDATES * reserve
        async with await connect(line.machine, path) as stream:
            client = Client(stream, Bytes(size, 1, chunk), limit)
            pump = Pump(Bytes(size, 2, chunk), limit)
            pump.attach(line.machine)
            nursery.start_soon(client.send)
            nursery.start_soon(client.read, size)
            nursery.start_soon(pump.run)
            for number in range(1, UPDATES + 1):
                await line.update()
                pump.attach(line.machine)
                client.allow(limit + number * reserve)
                pump.allow(limit + number * reserve)
            await client.input.reached(size)
            await pump.input.reached(size)
            assert pump.held >= UPDATES, "it puts while the chardev is at rest"
            assert client.input.digest == pump.output.digest
            assert pump.input.digest == client.output.digest
        line.end()


# --- at the edges -------------------------------------------------------------------------------------------------


both_families = pytest.mark.parametrize("family", ["unix", "tcp"])


@asynccontextmanager
async def line_of(folder: Path, family: str) -> AsyncGenerator[tuple[Line, Frontend, Path | None], None]:
    """Begin a line of machines; yield it, the device of the first, and the socket's path if it has one."""
    path = folder / "pump" if family == "unix" else None
    async with due("the whole of it"), trio.open_nursery() as nursery:
        line = Line(folder, nursery)
        await line.begin(recipe(path))
        frontend = Frontend()
        chardev_of(line).attach(frontend)
        yield line, frontend, path
        line.end()


def chardev_of(line: Line) -> Chardev:
    return line.machine._host.stores.chardevs["pump"].chardev


@both_families
async def test_what_arrives_during_the_pause_comes_after_what_came_before(tmp_path: Path, family: str) -> None:
    async with line_of(tmp_path, family) as (line, frontend, path), await connect(line.machine, path) as client:
        frontend.space = 4
        await client.send_all(b"read, not read; ")
        await frontend.wait_received(4)
        chardev_of(line).put(b"said before; ")
        await line.update(lambda: client.send_all(b"in the pause; "))
        chardev = chardev_of(line)
        chardev.attach(frontend)
        await client.send_all(b"after it")
        frontend.space = 1000
        chardev.accept_input()
        assert await frontend.wait_received(38) == b"read, not read; in the pause; after it"
        chardev.put(b"said after")
        assert await read_exactly(client, 23) == b"said before; said after"


@both_families
async def test_an_update_that_fails_in_the_pause_loses_nothing_either(tmp_path: Path, family: str) -> None:
    async with line_of(tmp_path, family) as (line, frontend, path), await connect(line.machine, path) as client:
        frontend.space = 4
        chardev = chardev_of(line)
        typed, said = b"read, not read; ", b"said before; "
        await client.send_all(typed)
        await frontend.wait_received(4)
        chardev.put(said)
        for number in range(3):
            more = b"in pause %d; " % number
            typed += more
            await line.update(partial(client.send_all, more), fails=True)
            assert chardev.put(more) == len(more)
            said += more
        assert chardev_of(line) is chardev
        frontend.space = 1000
        chardev.accept_input()
        assert await frontend.wait_received(len(typed)) == typed
        assert await read_exactly(client, len(said)) == said


@both_families
@pytest.mark.parametrize("how", ["closes", "resets"])
async def test_who_hangs_up_during_the_pause_has_been_heard(tmp_path: Path, family: str, how: str) -> None:
    async with line_of(tmp_path, family) as (line, frontend, path):
        client = await connect(line.machine, path)
        frontend.space = 0

        async def leave() -> None:
            await client.send_all(b"last words; ")
            if how == "resets":
                client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.socket.close()

        await line.update(leave)
        chardev = chardev_of(line)
        chardev.attach(frontend)
        chardev.put(b"to nobody")
        async with await connect(line.machine, path) as second:
            await second.send_all(b"first words")
            frontend.space = 1000
            chardev.accept_input()
            assert await frontend.wait_received(23) == b"last words; first words"


@both_families
async def test_the_guest_gets_all_that_was_left_to_it_in_the_pause(tmp_path: Path, family: str) -> None:
    left = random.Random(5).randbytes(150_000)  # more than a chardev holds, and less than a socket does
    async with line_of(tmp_path, family) as (line, frontend, path):
        client = await connect(line.machine, path)
        # So that nothing waits in the pause, which trio would have it do.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MIB)
        if family == "tcp":
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, MIB)
        frontend.space = 0

        async def leave() -> None:
            await client.send_all(left)
            await client.aclose()

        # A write finds out that the client has left. (TCP itself throws away what was sent before such a reset.)
        said = b"nobody reads this" if family == "unix" else b""
        chardev_of(line).put(said)
        await line.update(leave)
        chardev = chardev_of(line)
        chardev.attach(frontend)
        chardev.put(said)
        while len(frontend.received) < len(left):
            frontend.space = 10_000
            chardev.accept_input()
            await frontend.wait_received(min(len(frontend.received) + 10_000, len(left)))
        assert frontend.received == left


@both_families
async def test_what_was_read_of_a_client_that_left_goes_along(tmp_path: Path, family: str) -> None:
    async with line_of(tmp_path, family) as (line, frontend, path):
        frontend.space = 0
        first = await connect(line.machine, path)
        await first.send_all(b"one, ")
        await first.aclose()
        await trio.testing.wait_all_tasks_blocked(0.01)
        async with await connect(line.machine, path) as second:
            if family == "tcp":
                # It may read on, for all that is known, until a write is answered by a reset.
                while chardev_of(line).pending().input == b"":
                    chardev_of(line).put(b"x")
                    await trio.testing.wait_all_tasks_blocked(0.01)
            assert chardev_of(line).pending().input == b"one, "
            await second.send_all(b"two")
            await line.update()
            chardev_of(line).attach(frontend)
            frontend.space = 1000
            chardev_of(line).accept_input()
            assert await frontend.wait_received(8) == b"one, two"


@both_families
async def test_who_connects_during_the_pause_is_served_after_it(tmp_path: Path, family: str) -> None:
    clients: list[trio.SocketStream] = []
    async with line_of(tmp_path, family) as (line, frontend, path):
        first = await connect(line.machine, path)
        shown = (await line.machine.execute("query-chardev"))[0]["filename"].partition(",server=on")[0]

        async def change() -> None:
            await first.send_all(b"one, ")
            await first.aclose()
            if path is not None:
                clients.append(trio.SocketStream((await trio.open_unix_socket(str(path))).socket))
            else:
                clients.append(await trio.open_tcp_stream("127.0.0.1", int(shown.rpartition(":")[2])))
            await clients[0].send_all(b"two")

        await line.update(change)
        chardev = chardev_of(line)
        chardev.attach(frontend)
        assert await frontend.wait_received(8) == b"one, two"
        chardev.put(b"hello two")
        async with clients[0]:
            assert await read_exactly(clients[0], 9) == b"hello two"


@both_families
@pytest.mark.parametrize("when", ["before", "during"])
async def test_who_has_said_all_still_hears(tmp_path: Path, family: str, when: str) -> None:
    async with line_of(tmp_path, family) as (line, frontend, path), await connect(line.machine, path) as client:
        await client.send_all(b"uname\n")
        if when == "before":
            await client.send_eof()
            await frontend.wait_received(6)
        await line.update(None if when == "before" else client.send_eof)
        chardev = chardev_of(line)
        chardev.attach(frontend)
        chardev.put(b"Linux\n")
        assert await read_exactly(client, 6) == b"Linux\n"
        assert await frontend.wait_received(6) == b"uname\n"


@both_families
async def test_who_reads_nothing_meanwhile_finds_it_all_in_order(tmp_path: Path, family: str) -> None:
    async with line_of(tmp_path, family) as (line, frontend, path), await connect(line.machine, path) as client:
        said = Bytes(1 << 40, 3)
        put = bytearray()
        for _ in range(3):
            chardev = chardev_of(line)
            while chardev.room():
                data = said.next()
                put += data[: chardev.put(data)]
                await trio.testing.wait_all_tasks_blocked(0.01)
            await line.update()
            chardev_of(line).attach(frontend)
        line.end()  # which writes what it can
        chardev_of(line).put(b"the end")
        assert await read_exactly(client, len(put)) == put


# --- a guest ------------------------------------------------------------------------------------------------------

ECHO: Final = """
 mov dx, 0x3fa
 mov al, 1
 out dx, al
 mov dx, 0x3f8
 mov al, '>'
 out dx, al
 mov dx, 0x3fd
listen: in al, dx
 test al, 1
 jz listen
 mov dx, 0x3f8
 in al, dx
 mov bl, al
 mov dx, 0x3fd
full: in al, dx
 test al, 0x20
 jz full
 mov al, bl
 mov dx, 0x3f8
 out dx, al
 mov dx, 0x3fd
 jmp listen
"""
"""Turns the FIFOs of COM1 on, which empties them; says so; then sends back each byte that comes, when there is room."""

WINDOW: Final = 400
"""Bytes that are on their way at most: more than the UART's FIFOs."""


@pytest.mark.kvm
@both_families
async def test_a_guest_echoes_each_byte_once_through_twenty_updates(tmp_path: Path, family: str) -> None:
    path = tmp_path / "pump" if family == "unix" else None
    machine_set = {"kernel": flat_guest(tmp_path, ECHO), "memory": {"size": 16 * MIB}, "serial": ["pump"]}
    steps: list[dict[str, Any]] = [
        {"execute": "chardev-add", "arguments": {"id": "pump", "backend": backend(path)}},
        {"execute": "machine-set", "arguments": machine_set},
        *({"execute": command} for command in ("accel-set", "cpu-model-set", "finish-machine-init")),
    ]
    said, heard = bytearray(), Sink()
    source = Bytes(1 << 40, 4, 100)
    updated = trio.Event()

    async def talk(stream: trio.SocketStream) -> None:
        while not updated.is_set() or heard.count < len(said):
            if not updated.is_set() and len(said) - heard.count < WINDOW:
                data = source.next()
                said.extend(data)
                await stream.send_all(data)
            else:
                data = await stream.receive_some(1 << 16)
                assert said[heard.count : heard.count + len(data)] == data != b""
                heard.take(data)

    async with due("the whole of it"), trio.open_nursery() as nursery:
        line = Line(tmp_path, nursery)
        await line.begin(steps)
        async with await connect(line.machine, path) as stream, trio.open_nursery() as talking:
            await line.machine.execute("cont")
            assert await stream.receive_some(1) == b">"
            talking.start_soon(talk, stream)
            for number in range(1, UPDATES + 1):
                await heard.reached(number * 20)
                await line.update()
            updated.set()
        line.end()
