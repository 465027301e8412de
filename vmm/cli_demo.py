"""`trio-vmm demo`: a machine is built phase by phase, and the process under it is replaced while its guest goes on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import trio

from vmm import host_sockets
from vmm.cli_demo_events import NEW, OLD, Moment, changes, may, show, show_timeline, token_name
from vmm.cli_demo_guest import RamView, SerialLine
from vmm.cli_demo_processes import DemoFailed, Processes, started_processes
from vmm.cli_demo_screen import BOLD, DIM, GREEN, RED, Screen
from vmm.cli_demo_ticks import TickClock
from vmm.cli_successor import successor_command
from vmm.cli_update import live_update
from vmm.errors import HostFileRefused, VmmError, leaves
from vmm.guests.heartbeat import HeartbeatReader
from vmm.kvm.system import Kvm
from vmm.qmp_client import MonitorGone, QmpClient, qmp_over, qmp_session

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.cli_update import UpdateReport
    from vmm.guests.heartbeat import HeartbeatReport

LIMIT: Final = 60.0
"""Seconds after which something must have gone wrong. It takes 3 to 7 on an idle machine."""

PACE: Final = 0.35
"""Seconds between two commands for whoever reads along on a terminal."""

_BEATS: Final = 8
"""Lines of the guest's heartbeat, ten a second, that are awaited before the update and after it."""

_MEBIBYTES: Final = 128


def run_demo(plain: bool) -> int:
    """Run the demo on standard output, and return the exit status: 0 if all that it claims was so.

    Ends every process that it started, and removes its directory, at Ctrl-C too.

    Raises:
        VmmError: it cannot be run here, or something broke.
    """
    Kvm.open().close()  # One sentence now, rather than an error in the middle of things.
    screen = Screen.on_stdout(plain=plain)
    try:
        return trio.run(_run, screen)
    except BaseExceptionGroup as group:
        found = list(leaves(group))
        for error in found:
            if isinstance(error, VmmError):
                raise error from None
        if not all(isinstance(error, BrokenPipeError) for error in found):
            raise
        sys.stdout = None  # Nobody reads on. Nothing is left to be flushed into the pipe.
        return 1


async def _run(screen: Screen) -> int:
    status = 1
    signals_seen: list[int] = []
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:

            async def interrupted() -> None:
                async for number in signals:
                    signals_seen.append(number)
                    nursery.cancel_scope.cancel()

            nursery.start_soon(interrupted)
            with trio.move_on_after(LIMIT) as patience:
                status = await _in_a_directory(screen)
            nursery.cancel_scope.cancel()
    if signals_seen:
        screen.line()
        screen.line("Interrupted. The guest has been ended, and nothing is left.", DIM)
        return 128 + signals_seen[0]
    if patience.cancelled_caught:
        raise DemoFailed(reason=f"it did not come to its end within {LIMIT:g} s")
    return status


async def _in_a_directory(screen: Screen) -> int:
    with tempfile.TemporaryDirectory(prefix="trio-vmm-demo-") as folder:
        async with started_processes() as processes, AsyncExitStack() as stack:
            return await _Demo(screen, Path(folder), processes, stack).run()


@final
class _Demo:
    """One run of it."""

    def __init__(self, screen: Screen, folder: Path, processes: Processes, stack: AsyncExitStack) -> None:
        self._screen = screen
        self._processes = processes
        self._stack = stack
        self._old, self._theirs = (stack.enter_context(sock) for sock in host_sockets.connected_pair())
        self._qmp = str(folder / "qmp.sock")
        self._watch = str(folder / "watch.sock")
        self._console = str(folder / "serial.sock")
        self._serial = SerialLine()
        self._moments: list[Moment] = []
        self._shown: set[str] = set()
        """Names of the phases whose tokens have been shown."""
        self._pause_seen = (0.0, 0.0)
        """When the guest's pause began and ended, by the wall clock, in ms."""
        self._clock = TickClock()
        self._successor_ready = trio.Event()
        self._successor_gone = trio.Event()

    async def run(self) -> int:
        """Run it all and return the exit status."""
        screen = self._screen
        screen.line("trio-vmm demo: a guest that outlives the process it runs in", BOLD)
        async with trio.open_nursery() as nursery:
            process, machine = await self._start()
            await self._build(machine, nursery)
            ram = self._ram(process.pid)
            reader = HeartbeatReader(ram.read)
            screen.heading("The guest lives: 1000 timer ticks a second, each noted in its RAM")
            await self._beats(_BEATS, process.pid, ram)
            before = _looked(reader)
            update = await self._update(nursery, process.pid, ram)
            await self._processes.ended(process.pid)
            process.wait()
            moved = self._ram(update.new_pid)
            reader.follow(moved.read)
            await self._beats(_BEATS, update.new_pid, moved)
            after = _looked(reader)
            gaps = self._clock.gaps(moved.read, *self._pause_seen)
            runs = await self._quit(update.new_pid)
            nursery.cancel_scope.cancel()
        faults = self._serial.faults() + [str(report) for report in (before, after) if not report.intact]
        if moved.identity != ram.identity:
            faults.append("the new process runs the guest in other memory than the old one did")
        if not runs:
            faults.append("the new process says that the guest does not run")
        return self._verdict(update, after, gaps, faults)

    async def _start(self) -> tuple[subprocess.Popen[bytes], QmpClient]:
        self._screen.heading("A process with a monitor, and nothing else")
        self._screen.command("$", f"trio-vmm run -qmp unix:{self._qmp}")
        # With one monitor more: clients of the machine's own go along with the guest, and this one sees what is left.
        with self._theirs as theirs:
            process = _machine(["-qmp", f"unix:{self._qmp}", "-qmp", f"fd:{theirs.fileno()}"], theirs.fileno())
        self._processes.add(process.pid)
        while True:
            try:
                machine = await self._stack.enter_async_context(qmp_session(self._qmp))
                break
            except HostFileRefused:
                if process.poll() is not None:
                    reason = f"the machine's process ended with status {process.returncode} before its monitor answered"
                    raise DemoFailed(reason=reason) from None
                await trio.sleep(0.01)
        phase = await machine.execute("query-nursery-tree")
        while phase:
            self._screen.opened([phase["phase"]], may([token_name(token) for token in phase["tokens"]]))
            self._shown.add(phase["phase"])
            phase = next(iter(phase["children"]), None)
        await self._pause()
        return process, machine

    async def _build(self, machine: QmpClient, nursery: trio.Nursery) -> None:
        """Make the machine, a command after the other, and run its guest."""
        self._screen.heading("It becomes a machine, one command and one phase at a time")
        address = {"type": "unix", "data": {"path": self._console}}
        backend = {"type": "socket", "data": {"addr": address, "server": True, "wait": False}}
        await self._command(machine, "id=serial0 backend=socket", "chardev-add", id="serial0", backend=backend)
        nursery.start_soon(self._serial.read, await trio.open_unix_socket(self._console))
        await self._command(
            machine, f"kernel=builtin:heartbeat memory.size={_MEBIBYTES}M serial=serial0", "machine-set",
            kernel="builtin:heartbeat", memory={"size": _MEBIBYTES << 20}, serial=["serial0"],
        )  # fmt: skip
        await self._command(machine, "accel=kvm", "accel-set", accel="kvm")
        await self._command(machine, "model=host", "cpu-model-set", model="host")
        await self._command(machine, "", "finish-machine-init")
        await self._command(machine, "", "cont")

    async def _command(self, machine: QmpClient, shown: str, name: str, /, **arguments: Any) -> None:
        self._screen.command(self._screen.marks.command, f"{name} {shown}".rstrip())
        await machine.execute(name, **arguments)
        events = [machine.events.popleft() for _ in range(len(machine.events))]
        while name == "cont" and not any(event["event"] == "RESUME" for event in events):
            events.append(await machine.wait_event(lambda event: True))
        found = changes(Moment.of(OLD, event) for event in events)
        show(self._screen, found)
        self._shown.update(change.phase for change in found)
        await self._pause()

    async def _pause(self) -> None:
        if self._screen.is_terminal:
            await trio.sleep(PACE)

    def _ram(self, pid: int) -> RamView:
        ram = RamView(pid)
        self._stack.callback(os.close, ram.fd)
        return ram

    # The guest.

    async def _beats(self, count: int, pid: int, ram: RamView) -> None:
        """Show `count` more lines of the guest's heartbeat, and leave the last one."""
        last = len(self._serial.lines) + count
        await self._follow(lambda: len(self._serial.lines) >= last, pid, ram)
        self._screen.line(f"  {self._beat(pid, ram)}")

    async def _follow(self, done: Callable[[], bool], pid: int, ram: RamView) -> None:
        while not done():
            await self._serial.news()
            self._screen.live(self._beat(pid, ram))

    def _beat(self, pid: int, ram: RamView) -> str:
        tick = self._clock.sample(ram.read, time.time() * 1e3)
        return f"{self._screen.paint(self._serial.lines[-1], GREEN)}   tick {tick}   process {pid}"

    # The update.

    async def _update(self, nursery: trio.Nursery, pid: int, ram: RamView) -> UpdateReport:
        self._screen.heading("A live update: another process takes the guest over")
        self._screen.command("$", f"trio-vmm update --qmp {self._qmp}")
        listener = host_sockets.listen_unix(self._watch)
        self._stack.callback(listener.close)
        nursery.start_soon(self._watch_new, listener)
        async with qmp_over(self._old, "the old process") as old, trio.open_nursery() as watching:
            watching.start_soon(self._watch_old, old)
            beating = await watching.start(self._go_on_beating, pid, ram)
            # What the command does, with one more monitor for the successor: it connects to us, so we see it begin.
            extra = ["-qmp", f"unix:{self._watch},server=off"]
            report = await live_update(self._qmp, successor_command(None), extra)
            await self._successor_ready.wait()
            beating.cancel()
        self._screen.line(f"      ms  old is process {pid}, new is process {report.new_pid}", DIM)
        zero, resumed = show_timeline(self._screen, self._moments, frozenset(self._shown))
        self._pause_seen = (zero, resumed)
        return report

    async def _go_on_beating(self, pid: int, ram: RamView, *, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        with trio.CancelScope() as scope:
            task_status.started(scope)
            await self._follow(lambda: False, pid, ram)

    async def _watch_old(self, old: QmpClient) -> None:
        with suppress(MonitorGone):
            while True:
                self._moments.append(Moment.of(OLD, await old.wait_event(lambda event: True)))

    async def _watch_new(self, listener: socket.socket) -> None:
        await trio.lowlevel.wait_readable(listener)
        fd = host_sockets.accept(listener, self._watch)
        if fd is None:
            raise DemoFailed(reason="the successor hung up before it had said anything")
        sock = socket.socket(fileno=fd)
        self._processes.add(host_sockets.peer_credentials(sock)[0])
        with suppress(MonitorGone):
            async with qmp_over(sock, self._watch) as successor:
                while True:
                    moment = Moment.of(NEW, await successor.wait_event(lambda event: True))
                    self._moments.append(moment)
                    # The last of what phase running grants.
                    if moment.event == "TOKEN_GRANTED" and moment.data["token"] == "may-start-migration":
                        self._successor_ready.set()
        self._successor_gone.set()

    # The end.

    async def _quit(self, pid: int) -> bool:
        """Ask at the same socket whether the guest runs, and end the machine."""
        screen = self._screen
        screen.heading("The same socket answers, from the new process")
        self._moments.clear()
        async with qmp_session(self._qmp) as machine:
            screen.command(screen.marks.command, "query-status")
            status = await machine.execute("query-status")
            screen.text(f"running: {str(status['running']).lower()}")
            await self._pause()
            screen.command(screen.marks.command, "quit")
            await machine.execute("quit")
        await self._successor_gone.wait()
        await self._processes.ended(pid)
        closed = [m.phase for m in self._moments if m.event == "PHASE_CHANGED" and not m.data["opened"]]
        screen.text(f"phases closed, innermost first: {', '.join(closed)}", DIM)
        return bool(status["running"])

    def _verdict(
        self, update: UpdateReport, after: HeartbeatReport, gaps: tuple[float, float], faults: list[str]
    ) -> int:
        screen = self._screen
        stages = ", ".join(f"{name} {value:.2f}" for name, value in update.stages.items() if name != "total")
        screen.heading(f"The guest's pause: {update.stages['total']:.2f} ms")
        screen.text(f"by stage: {stages}")
        screen.text(f"as the guest saw it: {gaps[0]:.2f} ms without a tick (else at most {gaps[1]:.2f} ms)")
        screen.line()
        if faults:
            for fault in faults:
                screen.text(f"Not as it should be: {fault}.", RED)
            return 1
        screen.text(
            f"No tick was lost, repeated or torn: {after.ticks} ticks and {after.header.pages_checked} pages checked, "
            f"and {len(self._serial.lines)} lines over one serial connection, in order.",
            BOLD, GREEN,
        )  # fmt: skip
        return 0


def _machine(options: list[str], fd: int) -> subprocess.Popen[bytes]:
    """Start `trio-vmm run`, out of the reach of this terminal's Ctrl-C: the demo ends it in its own time."""
    return subprocess.Popen(
        [*successor_command(None), "run", *options], stdin=subprocess.DEVNULL, pass_fds=(fd,), start_new_session=True
    )


def _looked(reader: HeartbeatReader) -> HeartbeatReport:
    report = reader.look()
    if report is None:
        raise DemoFailed(reason="the guest left no trace of itself in its RAM")
    return report
