"""Machines as real processes, to be handed over, killed and stalled by a test, which is their parent."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, final

import attrs
import trio

from vmm import host_sockets
from vmm.errors import HostFileRefused
from vmm.guests.heartbeat import HeartbeatReader, HeartbeatReport
from vmm.qmp_client import MonitorGone, QmpClient, qmp_session

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncGenerator, Callable, Iterator, Sequence

PROGRAM: Final = (sys.executable, "-m", "vmm")
APPEND: Final = "region=64K pages=1"
"""A guest that ticks a thousand times a second and checks all of its region sixty times. By default it would check
more, and take most of a processor where KVM emulates each of its instructions."""
GUEST: Final = ("-kernel", "builtin:heartbeat", "-append", APPEND, "-m", "16")
HANGS: Final = 20.0
"""Seconds after which a test says that what it waits for does not come. No outcome depends on it."""


class Hangs(Exception):
    """What a test waits for did not come."""


@asynccontextmanager
async def due(what: str) -> AsyncGenerator[None, None]:
    """Raise `Hangs` if the body takes too long."""
    with trio.move_on_after(HANGS) as scope:
        yield
    if scope.cancelled_caught:
        raise Hangs(what)


@final
class Console:
    """The guest's serial port: a unix socket of ours to which the machine has connected, and which moves with it."""

    def __init__(self, listener: socket.socket, path: str, word: str) -> None:
        self._listener = listener
        self.path = path
        self._word = word
        self._client: socket.socket | None = None
        self._data = b""
        self._next = 1

    async def line(self) -> str | None:
        """Return the next line; None at the end, when every process that had the socket is gone."""
        if self._client is None:
            await trio.lowlevel.wait_readable(self._listener)
            self._client = self._listener.accept()[0]
            self._client.setblocking(False)
        while b"\r\n" not in self._data:
            await trio.lowlevel.wait_readable(self._client)
            if not self._take_in():
                return None
        line, _, self._data = self._data.partition(b"\r\n")
        return line.decode()

    async def beat(self) -> bool:
        """Read the next line of the guest's heartbeat, none of which may be missing or repeated; False at the end."""
        async with due(f"{self._word} {self._next}"):
            if self._next == 1:
                assert await self.line() == f"{self._word}: started"
            line = await self.line()
        assert line in (f"{self._word} {self._next} ok", None)
        self._next += 1
        return line is not None

    async def beats(self, count: int) -> None:
        """Read `count` more lines of the guest's heartbeat."""
        for _ in range(count):
            assert await self.beat(), "the guest is gone"

    async def new_beats(self, count: int) -> None:
        """Read what has arrived, and `count` more lines: the guest runs now."""
        self._take_in()
        await self.beats(self._data.count(b"\r\n") + count)

    async def from_a_start(self, count: int) -> None:
        """Read on until a guest that was reset, which tears a line, has printed `count` lines in order."""
        seen: int | None = None
        async with due(f"{count} lines from a start"):
            while seen != count:
                line = await self.line()
                assert line is not None, "the guest is gone"
                if line.endswith(f"{self._word}: started"):
                    seen = 0
                elif seen is not None:
                    seen += 1
                    assert line == f"{self._word} {seen} ok"

    async def goes_on(self) -> bool:
        """Read what has arrived; say whether more comes, or the end."""
        self._take_in()
        await self.beats(self._data.count(b"\r\n"))
        return await self.beat()

    async def ended(self) -> None:
        """Read what is left, and wait for the end."""
        while await self.beat():
            pass

    def _take_in(self) -> bool:
        """Take in what has arrived; False at the end."""
        assert self._client is not None
        try:
            while data := self._client.recv(1 << 20):
                self._data += data
        except BlockingIOError:
            return True
        except ConnectionResetError:
            pass
        return b"\r\n" in self._data

    def close(self) -> None:
        """Close both sockets."""
        self._listener.close()
        if self._client is not None:
            self._client.close()


class Child(Protocol):
    """A child process; a `subprocess.Popen` is one."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...

    def send_signal(self, sig: int, /) -> None: ...


@final
@attrs.define(eq=False)
class Process:
    """One VMM."""

    popen: Child
    qmp: str
    """Path of a monitor of its own."""
    log: Path
    """Its standard error."""

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.popen.pid

    async def stopped(self) -> None:
        """Wait until it has stopped itself."""
        async with due(f"the stop of process {self.pid}"):
            found = await self._wait(os.WSTOPPED | os.WEXITED)
        assert found.si_code == os.CLD_STOPPED, f"it has ended, status {found.si_status}: {self.log.read_text()}"

    async def ended(self) -> int:
        """Wait until it has ended; return the exit status, or minus the signal."""
        async with due(f"the end of process {self.pid}"):
            await self._wait(os.WEXITED)
        return self.popen.wait()

    async def _wait(self, what: int) -> os.waitid_result:
        def wait() -> os.waitid_result:
            found = os.waitid(os.P_PID, self.pid, what | os.WNOWAIT)
            assert found is not None
            return found

        return await trio.to_thread.run_sync(wait, abandon_on_cancel=True)

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self.popen.poll() is None

    def kill(self) -> None:
        """Kill it at once."""
        self.popen.send_signal(signal.SIGKILL)

    def go_on(self) -> None:
        """Wake it."""
        self.popen.send_signal(signal.SIGCONT)

    def said(self) -> list[str]:
        """Return the lines of its standard error."""
        return self.log.read_text().splitlines()

    async def says(self, line: str) -> None:
        """Wait for `line` on its standard error."""
        async with due(f"{line!r} of {self.pid}"):
            while line not in self.said():  # noqa: ASYNC110 - a file does not tell when it grows
                await trio.sleep(0.01)


@final
class Bench:
    """Where a test's processes and files are. At its end all processes are killed."""

    def __init__(
        self, folder: Path, stack: AsyncExitStack, spawn: Callable[[Sequence[str], Path], Child] | None = None
    ) -> None:
        """Args: `spawn` starts `trio-vmm ARGUMENTS` with its standard error in a file; None runs the program."""
        self.folder = folder
        self._stack = stack
        self._spawn = spawn
        self._processes: list[Process] = []
        self.qmp = str(folder / "machine")
        """The machine's own monitor, which moves with it."""

    def start(self, *options: str, qmp: str | None = None, notify: Path | None = None) -> Process:
        """Start a VMM with a monitor at `qmp`, or at a path of its own; `notify` is its service manager's socket."""
        number = len(self._processes)
        path = qmp or str(self.folder / f"qmp{number}")
        log = self.folder / f"log{number}"
        arguments = ["run", "-qmp", f"unix:{path}", *options]
        if self._spawn is not None:
            process = Process(self._spawn(arguments, log), path, log)
        else:
            environment = {**os.environ, "NOTIFY_SOCKET": str(notify)} if notify is not None else None
            with log.open("wb") as file:
                popen = subprocess.Popen(
                    [*PROGRAM, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=file,
                    env=environment,
                )
            process = Process(popen, path, log)
        self._processes.append(process)
        return process

    def is_there(self, path: str) -> bool:
        """Whether there is a file at `path`."""
        return os.path.lexists(path)

    def console(self, word: str = "heartbeat") -> Console:
        """Make a console for a machine's `-serial unix:PATH,server=off`."""
        path = str(self.folder / f"console-{word}")
        console = Console(host_sockets.listen_unix(path), path, word)
        self._stack.callback(console.close)
        return console

    def machine(
        self, console: Console, *options: str, guest: Sequence[str] = GUEST, notify: Path | None = None
    ) -> Process:
        """Start a machine with the heartbeat guest, whose monitor is at `self.qmp`."""
        serial = ("-serial", f"unix:{console.path},server=off")
        return self.start(*guest, *serial, *options, qmp=self.qmp, notify=notify)

    def destination(self, *options: str) -> Process:
        """Start a process that awaits a live update on `self.channels` of its number."""
        number = len(self._processes)
        cpr = f"channel-type=cpr,addr.transport=socket,addr.type=unix,addr.path={self.folder}/cpr{number}"
        return self.start("-incoming", f"unix:{self.folder}/main{number}", "-incoming", cpr, *options)

    def channels(self, destination: Process) -> list[dict[str, Any]]:
        """Return where `destination` listens, as `migrate` takes it."""
        number = self._processes.index(destination)
        return channels(*(f"{self.folder}/{kind}{number}" for kind in ("main", "cpr")))

    @asynccontextmanager
    async def session(self, path: str) -> AsyncGenerator[QmpClient, None]:
        """Yield a session of the monitor at `path`, which may be about to appear."""
        async with AsyncExitStack() as stack:
            client: QmpClient | None = None
            async with due(f"a monitor at {path}"):
                while client is None:
                    try:
                        client = await stack.enter_async_context(qmp_session(path, within=HANGS))
                    except HostFileRefused:
                        await trio.sleep(0.01)  # nothing tells when a socket appears
            assert client is not None
            yield client

    async def listening(self, destination: Process) -> None:
        """Wait until `destination` awaits a source."""
        async with self.session(destination.qmp) as client, due("the listeners"):
            while (await client.execute("query-migrate")).get("status") != "setup":
                await client.wait_event(lambda event: True)

    def close(self) -> None:
        """Kill what is left."""
        for process in self._processes:
            process.kill()
            process.popen.wait()


def channels(main: str, cpr: str) -> list[dict[str, Any]]:
    """Return two unix sockets as `migrate` takes them."""
    return [
        {"channel-type": kind, "addr": {"transport": "socket", "type": "unix", "path": path}}
        for kind, path in (("main", main), ("cpr", cpr))
    ]


@asynccontextmanager
async def open_bench(
    spawn: Callable[[Sequence[str], Path], Child] | None = None,
) -> AsyncGenerator[Bench, None]:
    """Open a bench in a new directory, whose path is short enough for sockets; at the end nothing of it is left."""
    with tempfile.TemporaryDirectory(prefix="vmm-") as folder:
        async with AsyncExitStack() as stack:
            bench = Bench(Path(folder), stack, spawn)
            try:
                yield bench
            except BaseException as error:
                for process in bench._processes:
                    error.add_note(f"process {process.pid} said: {process.log.read_text() or 'nothing'}")
                raise
            finally:
                bench.close()


async def begin_update(source: QmpClient, where: list[dict[str, Any]]) -> None:
    """Have `source` hand its guest over to who listens at `where`."""
    await source.execute("migrate-set-parameters", mode="cpr-transfer")
    await source.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    source.events.clear()
    await source.execute("migrate", channels=where)


OVER: Final = ("completed", "failed", "cancelled")


async def outcome(source: QmpClient) -> dict[str, Any]:
    """Return what `query-migrate` says once it is over."""
    async with due("the end of the update"):
        while True:
            info: dict[str, Any] = await source.execute("query-migrate")
            if info["status"] in OVER:
                return info
            await source.wait_event(lambda event: event["event"] == "MIGRATION")


@final
class Ram:
    """The guest's memory, looked at from outside: the ring of ticks in it. Stays good when the guest moves."""

    def __init__(self, pid: int) -> None:
        path = next(path for path, target in descriptors_in(pid) if target.startswith("/memfd:ram"))
        with path.open("rb") as file:
            self._memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self._reader = HeartbeatReader(lambda address, size: self._memory[address : address + size])

    def look(self) -> HeartbeatReport:
        """Return what the reader finds in what is new."""
        report = self._reader.look()
        assert report is not None
        return report

    def require_intact(self) -> HeartbeatReport:
        """Fail if a tick was lost, repeated or torn, or a page was."""
        report = self.look()
        assert report.intact, str(report)
        return report

    def close(self) -> None:
        """Unmap."""
        self._memory.close()


def descriptors_in(pid: int) -> Iterator[tuple[Path, str]]:
    """Yield each descriptor of a process: its path in /proc, and what it refers to."""
    folder = Path(f"/proc/{pid}/fd")
    for name in os.listdir(folder):
        with suppress(FileNotFoundError):  # closed meanwhile
            yield folder / name, os.readlink(folder / name)


def descriptors_of(pid: int) -> list[str]:
    """Return what the descriptors of a process refer to, sorted, without the numbers of sockets and the like."""
    return sorted(target.partition(":[")[0] for _, target in descriptors_in(pid))


async def settled(pid: int) -> list[str]:
    """Return what a process holds once a hundred looks have seen the same."""
    seen, looks = descriptors_of(pid), 0
    while looks < 100:
        await trio.sleep(0.001)
        now = descriptors_of(pid)
        seen, looks = now, looks + 1 if now == seen else 0
    return seen


async def holds(pid: int, descriptors: list[str]) -> None:
    """Wait until a process holds these descriptors: a session that has just ended may still be closing."""
    async with due(f"the descriptors of {pid} to be {descriptors}"):
        while descriptors_of(pid) != descriptors:  # noqa: ASYNC110 - a process does not tell
            await trio.sleep(0.01)


async def ready(client: QmpClient) -> None:
    """Wait until the machine has been built, with all its serial ports and monitors."""
    async with due("the machine to be ready"):
        while (await client.execute("query-machine-phase"))["phase"] != "machine-ready":
            await client.wait_event(lambda event: True)


async def answering_pid(path: str) -> int:
    """Return the process that answers at the monitor `path`."""
    async with due(f"an answer at {path}"), qmp_session(path, within=HANGS) as client:
        await client.execute("query-status")
        return client.peer_pid


async def hung_up(client: QmpClient) -> None:
    """Wait until the machine has closed a session."""
    async with due("the end of a session"):
        with suppress(MonitorGone):
            while True:
                await client.read()


STAGES: Final = {"stop", "quiesce", "save", "send", "load", "answer", "resume", "total"}


async def move(bench: Bench, source: Process, *, complaints: int = 0) -> Process:
    """Hand the machine over to a new process, and end the old one, of so many complaints, as QEMU's clients do."""
    destination = bench.destination()
    await bench.listening(destination)
    async with bench.session(bench.qmp) as client:
        assert client.peer_pid == source.pid
        await begin_update(client, bench.channels(destination))
        info = await outcome(client)
        assert info["status"] == "completed", info
        assert set(info["x-pause"]) == STAGES
        assert (await client.execute("query-status")) == {"running": False, "status": "postmigrate"}
        await client.send("quit")
        await hung_up(client)
    assert await source.ended() == 0
    assert len(source.said()) == complaints
    return destination


def told(events: Any) -> list[str]:
    names = ("STOP", "RESUME", "MIGRATION")
    return [
        f"{event['event']} {event.get('data', {}).get('status', '')}".strip()
        for event in events
        if event["event"] in names
    ]
