"""Machines of this process whose guests are copied, and peers that are not what they should be."""

from __future__ import annotations

import hashlib
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, final

import attrs
import pytest
import trio

import vmm
from tests.phases.streams import PREAMBLE
from vmm.capabilities import ADMIN, Grant
from vmm.guests.heartbeat import HeartbeatReader
from vmm.migration.ram_records import Switchover
from vmm.migration.stream import HEAD_SIZE, StreamReader
from vmm.migration.stream_records import Section
from vmm.migration.words import Ear, Word, say, say_with_descriptor
from vmm.phases.machine import Machine
from vmm.phases.start import Start
from vmm.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from vmm.embedding import EmbeddedMachine
    from vmm.errors import VmmError
    from vmm.guests.heartbeat import HeartbeatReport
    from vmm.migration.stream_records import Record
    from vmm.migration.words import WordName

SIZE: Final = 16 << 20
HANGS: Final = 30.0
"""Seconds after which a test says that what it waits for does not come. No outcome depends on it."""

OVER: Final = ("completed", "failed", "cancelled")


def definition(size: int = SIZE, region: str = "64K pages=1", **options: Any) -> dict[str, Any]:
    """Return the arguments of `machine-set` for a machine whose guest keeps its heartbeat, and leaves a processor free.

    Args:
        region: its command line from there on.
    """
    return {"memory": {"size": size}, "kernel": "builtin:heartbeat", "append": f"region={region}", **options}


def commands(*, upto: str = "cont", **options: Any) -> list[dict[str, Any]]:
    """Return the recipe of a machine, as far as command `upto`."""
    steps: list[dict[str, Any]] = [
        {"execute": "machine-set", "arguments": definition(**options)},
        {"execute": "accel-set"},
        {"execute": "cpu-model-set"},
        {"execute": "finish-machine-init"},
        {"execute": "cont"},
    ]
    names = [step["execute"] for step in steps]
    return steps[: names.index(upto) + 1]


@asynccontextmanager
async def started(*, ticks: int = 5, **options: Any) -> AsyncGenerator[EmbeddedMachine, None]:
    """Run a machine whose guest has ticked `ticks` times."""
    async with vmm.machine(commands(**options)) as machine:
        await ticked(machine, ticks)
        yield machine


@asynccontextmanager
async def empty(
    *, autostart: bool = True, allowed: dict[str, str] | None = None
) -> AsyncGenerator[EmbeddedMachine, None]:
    """Run a machine that waits in phase precreate; complaints are dropped."""
    start = Start(Recipe("of this test"), autostart=autostart, complain=lambda text: None)
    async with vmm.machine(start=start) as machine:
        for name, path in (allowed or {}).items():
            await machine.execute("x-allow-resource", name=name, path=path)
        yield machine


def parts(machine: EmbeddedMachine) -> Machine:
    """Return the machine's parts."""
    return machine._tree.view(Machine)


def ram(machine: EmbeddedMachine) -> list[tuple[int, int, str]]:
    """Return where the guest's RAM, which stands still, is not zero, with digests of what is there."""
    memory = parts(machine).memory
    return [
        (address, size, hashlib.blake2b(memory.view(address, size)).hexdigest()) for address, size in memory.data_runs()
    ]


def reader(machine: EmbeddedMachine) -> HeartbeatReader:
    """Return a reader of the guest's ticks."""
    memory = parts(machine).memory
    return HeartbeatReader(memory.read)


def look(machine: EmbeddedMachine) -> HeartbeatReport:
    """Return what there is to be found in the guest's RAM."""
    report = reader(machine).look()
    assert report is not None
    return report


async def ticked(machine: EmbeddedMachine, count: int) -> None:
    """Wait until the guest has ticked `count` times, with nothing lost."""
    found = reader(machine)
    with trio.fail_after(HANGS):
        while (report := found.look()) is None or report.ticks < count:  # noqa: ASYNC110 - a guest does not tell
            await trio.sleep(0.005)
    assert report.intact, str(report)


async def goes_on(machine: EmbeddedMachine) -> None:
    """Wait until the guest has ticked some more."""
    await ticked(machine, look(machine).ticks + 5)


async def status(machine: EmbeddedMachine) -> str:
    """Return the run state."""
    return str((await machine.execute("query-status"))["status"])


async def in_status(machine: EmbeddedMachine, *wanted: str) -> None:
    """Wait until the machine is in one of these run states."""
    with trio.fail_after(HANGS):
        while await status(machine) not in wanted:  # noqa: ASYNC110 - not every change has an event
            await trio.sleep(0.005)


async def outcome(machine: EmbeddedMachine, *wanted: str) -> dict[str, Any]:
    """Return what `query-migrate` says once the migration is over, or in one of these statuses."""
    with trio.fail_after(HANGS):
        while (info := await machine.execute("query-migrate")).get("status") not in (wanted or OVER):  # noqa: ASYNC110
            await trio.sleep(0.005)  # not every change has an event
    return dict(info)


async def at_path(machine: EmbeddedMachine, path: str) -> None:
    """Wait until the innermost phase is called so."""
    with trio.fail_after(HANGS):
        while machine.path.rpartition("/")[2] != path:  # noqa: ASYNC110
            await trio.sleep(0.005)


async def port_of(machine: EmbeddedMachine) -> str:
    """Return the port on which a destination listens."""
    (address,) = (await machine.execute("query-migrate"))["socket-address"]
    return str(address["port"])


async def move(source: EmbeddedMachine, destination: EmbeddedMachine, folder: Path) -> dict[str, Any]:
    """Copy the guest over a unix socket; return what the source says at the end."""
    uri = f"unix:{folder / 'main'}"
    await destination.execute("migrate-incoming", uri=uri)
    await source.execute("migrate", uri=uri)
    return await outcome(source)


async def save(source: EmbeddedMachine, path: Path) -> bytes:
    """Save the guest in a file, and return that."""
    await source.execute("migrate", uri=f"file:{path}")
    info = await outcome(source)
    assert info["status"] == "completed", info
    return await trio.Path(path).read_bytes()


def refusal(kind: type[VmmError], match: str | None = None) -> pytest.RaisesGroup[VmmError]:
    """Expect a machine that ends with this reason."""
    return pytest.RaisesGroup(pytest.RaisesExc(kind, match=match), flatten_subgroups=True)


@final
class Peer:
    """The other side of a migration, played by the test."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._ear = Ear(stream, "peer", "the test fails")
        self._reader: StreamReader | None = None
        self._is_prepared = False
        self._answers = True
        self.sends_along: int | None = None
        """A descriptor for the source, with the word that this side has made ready."""
        self.records: list[Record] = []
        """Those that have come, in order."""
        self.seen = 0

    @property
    def sections(self) -> list[str]:
        """Return the names of the sections that have come, in order."""
        return [record.name for record in self.records if isinstance(record, Section)]

    async def say(self, name: WordName, reason: str = "", at: int | None = None) -> None:
        """Say a word."""
        await say(self._stream, Word(name, reason, at))

    async def hear(self) -> Word:
        """Hear one."""
        with trio.fail_after(HANGS):
            return await self._ear.hear()

    async def send(self, data: bytes) -> None:
        """Send bytes."""
        await self._stream.send_all(data)

    async def read(self, count: int) -> bytes:
        """Read so many bytes, and no more."""
        found = b""
        with trio.fail_after(HANGS):
            while len(found) < count:
                data = await self._stream.receive_some(count - len(found))
                assert data, f"it ended after {self.seen} bytes"
                found += data
                self.seen += len(data)
                await self._answer(data)
        return found

    async def _answer(self, data: bytes) -> None:
        """As a destination, say that it is prepared as soon as the source tells it to be."""
        if self._reader is None:
            return
        records = self._reader.feed(data)
        while self._reader.content and self._reader.take_content():
            records += self._reader.feed(b"")
        self.records += records
        if Switchover() in records:
            self._is_prepared = True
            if self._answers:
                await self.say_prepared()

    async def say_prepared(self) -> None:
        """Say that this side has made ready."""
        if self.sends_along is None:
            await self.say("prepared")
        else:
            await say_with_descriptor(self._stream, Word("prepared"), self.sends_along)

    async def invite(self) -> None:
        """Read what comes before the guest is stopped, and ask for the rest."""
        await self.invited()
        await self.say("ready")

    async def invited(self) -> None:
        """Read what comes before the guest is stopped."""
        self._reader = StreamReader()
        await self.read(PREAMBLE)
        for _ in range(4):
            head = await self.read(HEAD_SIZE)
            await self.read(int.from_bytes(head[8:12], "little"))

    async def read_pages(self) -> None:
        """Read until the guest is about to be stopped, and do not answer."""
        assert self._reader is not None, "invited() comes first"
        self._answers = False
        await self._read_on()

    async def prepare(self) -> None:
        """Ask for the rest, and read until the guest is about to be stopped; say that it may be."""
        await self.invite()
        await self._read_on()

    async def _read_on(self) -> None:
        with trio.fail_after(HANGS):
            while not self._is_prepared:
                data = await self._stream.receive_some(65536)
                assert data, "it ended before"
                await self._answer(data)

    async def read_all(self) -> None:
        """Read to the end record."""
        assert self._reader is not None, "invited() comes first"
        with trio.fail_after(HANGS):
            while not self._reader.ended:
                data = await self._stream.receive_some(65536)
                assert data, "it ended before"
                await self._answer(data)

    async def ended(self) -> bytes:
        """Read to the end; return what came."""
        found = b""
        with trio.fail_after(HANGS):
            try:
                while data := await self._stream.receive_some(65536):
                    found += data
                    await self._answer(data)
            except trio.BrokenResourceError:
                pass
        return found

    async def send_eof(self) -> None:
        """Say no more."""
        await self._stream.send_eof()

    def close(self) -> None:
        """Hang up."""
        self._stream.socket.close()


@asynccontextmanager
async def listening(folder: Path, name: str = "peer") -> AsyncGenerator[tuple[str, trio.SocketListener], None]:
    """Listen as a destination does; yield the URI, and the listener."""
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await sock.bind(str(folder / name))
    sock.listen(1)
    async with trio.SocketListener(sock) as listener:
        yield f"unix:{folder / name}", listener


@asynccontextmanager
async def destination_peer(source: EmbeddedMachine, folder: Path) -> AsyncGenerator[Peer, None]:
    """Have `source` copy its guest to the test; yield that side once it has connected."""
    async with listening(folder) as (uri, listener):
        await source.execute("migrate", uri=uri)
        with trio.fail_after(HANGS):
            stream = await listener.accept()
        async with stream:
            yield Peer(stream)


@asynccontextmanager
async def source_peer(path: Path) -> AsyncGenerator[Peer, None]:
    """Connect to a destination as a source does."""
    stream = await trio.open_unix_socket(str(path))
    async with stream:
        yield Peer(stream)


async def given(machine: EmbeddedMachine, folder: Path, endpoint: str, **parameters: Any) -> None:
    """Give a machine credentials, and have it use them."""
    arguments = {"qom_type": "tls-creds-x509", "id": "tls0", "dir": str(folder), "endpoint": endpoint}
    await machine.execute("object-add", **arguments)
    await machine.execute("migrate-set-parameters", tls_creds="tls0", **parameters)


async def arrived(source: EmbeddedMachine, destination: EmbeddedMachine) -> None:
    """Wait until the guest has gone from one, and goes on in the other."""
    info = await outcome(source)
    assert info["status"] == "completed", info
    await in_status(destination, "running")
    await goes_on(destination)


@final
@attrs.frozen
class Client:
    """A caller that may do anything, as a monitor's session."""

    name: str = "qmp0/1"
    grant: Grant = ADMIN
    descriptors: dict[str, int] = attrs.Factory(dict)
    by_number: bool = False

    def take_descriptors(self) -> list[int]:
        """Return none."""
        return []


async def execute(machine: EmbeddedMachine, client: Client, command: str, **arguments: Any) -> object:
    """Have `client` execute a command."""
    wired = {name.replace("_", "-"): value for name, value in arguments.items()}
    return await machine._host.table.execute(client, command, wired)
