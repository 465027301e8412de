"""Updates in numbers: a long row of one guest, many vCPUs, many descriptors, and how long a client waits."""

from __future__ import annotations

import array
import json
import math
import os
import resource
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, Any, Final, final

import trio

from bench.machines import (
    OURS,
    PATIENCE,
    PROGRAM,
    ROOT,
    BenchFailed,
    Monitor,
    connect,
    end,
    environment,
    memory_of,
    moment,
    open_ram,
    wait_until_complete,
)
from bench.pause import floor_of
from bench.series import columns, ratio, summary
from bench.ticks import newest
from vmm.cli_update import live_update
from vmm.guests.heartbeat import HeartbeatReader
from vmm.qmp_client import qmp_session

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB: Final = 128
WINDOW: Final = 200
"""Updates of which the 99th percentile is told: the second longest of so many."""

FLOOR_EVERY: Final = 10
FEW, MANY = 10, 7500
"""Descriptors in sets."""
VCPUS: Final = (1, 8)


def measure_row(count: int, floor: Path, folder: Path) -> dict[str, Any]:
    """Update one guest `count` times in a row, and compare the last process with the first successor.

    The process that the operator started is not that one: it has imported other parts of the program.
    """
    stages: list[dict[str, float]] = []
    bottom: list[dict[str, float]] = []
    with machine(folder, "row") as guest:
        first = guest.holds()
        for number in range(count):
            stages.append(guest.update())
            if number == 0:
                first = guest.holds()
            if number % FLOOR_EVERY == 0:
                bottom.append(floor_of(floor, None))
        last = guest.holds()
        guest.require_intact()
    totals = [row["total"] for row in stages]
    windows = [totals[at : at + WINDOW] for at in range(0, max(1, len(totals) - WINDOW + 1), WINDOW)]
    beside = [total for number, total in enumerate(totals) if number % FLOOR_EVERY == 0]
    return {
        "updates": count,
        "pause": columns(stages),
        "p99": summary(percentile(window, 99) for window in windows),
        "floor": columns(bottom),
        "ratio": ratio(beside, [row["total"] for row in bottom]),
        "first": first,
        "last": last,
    }


def percentile(values: list[float], percent: float) -> float:
    """Return the value that `percent` of `values` do not exceed: one of them, by nearest rank."""
    ordered = sorted(values)
    return ordered[max(1, math.ceil(len(ordered) * percent / 100)) - 1]


def measure_vcpus(pairs: int, folder: Path) -> dict[str, Any]:
    """Update a guest of one vCPU and one of eight in turn."""
    with ExitStack() as stack:
        one, eight = (stack.enter_context(machine(folder, f"smp-{count}", "-smp", f"{count}")) for count in VCPUS)
        return _in_turn({"one": one, "eight": eight}, pairs)


def measure_descriptors(pairs: int, many: int, folder: Path) -> dict[str, Any]:
    """Update a guest with few descriptors in a set and one with `many` in turn. They go over before the pause."""
    with room_for(many), ExitStack() as stack:
        guests = {name: stack.enter_context(machine(folder, name)) for name in ("few", "many")}
        guests["few"].give_descriptors(FEW)
        guests["many"].give_descriptors(many)
        return {**_in_turn(guests, pairs), "counts": {"few": FEW, "many": many}}


def _in_turn(guests: dict[str, Machine], pairs: int) -> dict[str, Any]:
    """Update each of two guests `pairs` times, and compare the second with the first."""
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in guests}
    for number in range(pairs + 1):
        # The first pair is of processes that the operator started, and not counted.
        for name, guest in guests.items():
            found = guest.update()
            rows[name] += [found] if number else []
    first, second = ([row["total"] for row in found] for found in rows.values())
    return {**{name: columns(found) for name, found in rows.items()}, "ratio": ratio(second, first)}


def measure_exec(count: int, folder: Path) -> dict[str, Any]:
    """Let the process of one guest execute a new program `count` times. The guest pauses twice each time."""
    with machine(folder, "exec") as guest:
        found = [guest.update_by_exec() for _ in range(count + 1)]
    return columns(found[1:])


def measure_response(pairs: int, folder: Path) -> dict[str, Any]:
    """Have a successor wait, send `migrate`, and see when it says RESUME."""
    rows = []
    for number in range(pairs + 1):
        with machine(folder, "response") as guest:
            found = guest.hand_over(folder / "successor.qmp", folder / "successor.log")
            rows += [found] if number else []
    return columns(rows)


@contextmanager
def room_for(count: int) -> Iterator[None]:
    """Let this process, and those that it starts, have `count` descriptors and some besides."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 1024
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise BenchFailed(f"{needed} descriptors are needed, and `ulimit -Hn` admits {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@final
class Machine:
    """A machine that runs the guest `heartbeat`, and the process that has it now."""

    def __init__(self, pid: int, qmp: Path) -> None:
        self.pid = pid
        self._qmp = qmp
        self._ram = open_ram(pid)
        self._reader = HeartbeatReader(lambda address, size: os.pread(self._ram, size, address))

    def update(self) -> dict[str, float]:
        """Update the machine; return the stages of its pause."""
        report = trio.run(live_update, str(self._qmp), [sys.executable, "-m", "vmm"])
        _reap(self.pid)
        self.pid = report.new_pid
        self.require_intact()  # often enough that no tick is overwritten unseen
        return report.stages

    def update_by_exec(self) -> dict[str, float]:
        """Let the process execute the program anew, under its own PID; return both pauses and their sum, in ms."""
        command = [*PROGRAM, "update", "--exec", "--json", "--qmp", str(self._qmp)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=PATIENCE)
        if done.returncode:
            raise BenchFailed(f"the program cannot be executed anew: {done.stderr}")
        report = json.loads(done.stdout)
        if report["new-pid"] != self.pid:
            raise BenchFailed(f"the guest of process {self.pid} is in process {report['new-pid']}")
        self.require_intact()
        away, back = (pause["total"] for pause in report["pauses-ms"])
        return {"away": away, "back": back, "sum": away + back}

    def hand_over(self, successor_qmp: Path, log: Path) -> dict[str, float]:
        """Hand the guest to a successor that waits; return how long it took until that resumed it, in ms."""
        main, cpr = (str(successor_qmp.with_suffix(f".{kind}")) for kind in ("main", "cpr"))
        where = [
            {"channel-type": kind, "addr": {"transport": "socket", "type": "unix", "path": path}}
            for kind, path in (("main", main), ("cpr", cpr))
        ]
        successor_qmp.unlink(missing_ok=True)
        command = [*OURS, "-qmp", f"unix:{successor_qmp}"]
        for channel in where:
            command += ["-incoming", json.dumps(channel)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=ROOT, env=environment()
            )
        try:
            with (
                closing(Monitor.connect(successor_qmp, process)) as successor,
                closing(Monitor.connect(self._qmp)) as source,
            ):
                successor.execute("qmp_capabilities")
                limit = time.monotonic() + PATIENCE
                while successor.execute("query-migrate").get("status") != "setup":
                    if time.monotonic() > limit:
                        raise BenchFailed("a successor does not listen")
                source.execute("qmp_capabilities")
                source.execute("migrate-set-parameters", mode="cpr-transfer")
                began = time.time() * 1e3
                source.execute("migrate", channels=where)
                resumed = successor.wait_for("RESUME")
                while (info := source.execute("query-migrate"))["status"] != "completed":
                    if time.monotonic() > limit:
                        raise BenchFailed(f"the update is not completed: {info}")
                source.execute("quit")
        except BaseException:
            end(process)
            raise
        self.pid = process.pid
        return {
            "resume_ms": moment(resumed) - began,
            "total": info["x-pause"]["total"],
        }

    def ticks(self) -> int:
        """Return how often the guest has ticked."""
        return newest(lambda address, size: os.pread(self._ram, size, address))

    def give_descriptors(self, count: int) -> None:
        """Put `count` descriptors into a set of the machine's."""
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        with connect(self._qmp) as sock, sock.makefile("rb") as answers:
            sock.settimeout(PATIENCE)
            answers.readline()
            _ask(sock, answers, {"execute": "qmp_capabilities"})
            for _ in range(count):
                _ask(sock, answers, {"execute": "add-fd", "arguments": {"fdset-id": 1}}, null)
        os.close(null)

    def holds(self) -> dict[str, float]:
        """Return what the process holds: memory in MiB, descriptors, threads."""
        return {
            **memory_of(self.pid),
            "descriptors": len(os.listdir(f"/proc/{self.pid}/fd")),
            "threads": len(os.listdir(f"/proc/{self.pid}/task")),
        }

    def require_intact(self) -> None:
        """Raise `BenchFailed` if the guest lost a tick, or anything in its memory."""
        report = self._reader.look()
        if report is None or not report.intact:
            raise BenchFailed(f"the guest was damaged by an update: {report}")

    def close(self) -> None:
        """End the machine, whatever process has it now."""
        os.close(self._ram)
        trio.run(_quit, str(self._qmp))


def _ask(sock: socket.socket, answers: Any, request: dict[str, Any], *fds: int) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([json.dumps(request).encode()], rights)
    while "return" not in (answer := json.loads(answers.readline())):
        if "error" in answer:
            raise BenchFailed(f"{request['execute']}: {answer['error']['desc']}")


async def _quit(qmp: str) -> None:
    async with qmp_session(qmp) as client:
        await client.execute("quit")


@contextmanager
def machine(folder: Path, name: str, *options: str) -> Iterator[Machine]:
    """Start a machine of `MIB` with the guest `heartbeat`, which ticks when the block begins."""
    qmp, log = folder / f"{name}.qmp", folder / f"{name}.log"
    qmp.unlink(missing_ok=True)
    command = [*OURS, "-M", "microvm", "-nodefaults", "-kernel", "builtin:heartbeat", "-m", f"{MIB}", *options]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "-qmp", f"unix:{qmp}"],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=ROOT, env=environment(),
        )  # fmt: skip
    pid = process.pid
    try:
        with closing(Monitor.connect(qmp, process)) as monitor:
            monitor.execute("qmp_capabilities")
            wait_until_complete(monitor)
        with closing(Machine(process.pid, qmp)) as made:
            limit = time.monotonic() + PATIENCE
            while not made.ticks():
                if time.monotonic() > limit:
                    raise BenchFailed(f"the guest does not start: {log.read_text(errors='replace')}")
                time.sleep(0.01)
            yield made
            pid = made.pid
    finally:
        end(process)
        if pid != process.pid:
            _reap(pid)


def _reap(pid: int) -> None:
    """Wait for a successor, which is this process's child; `subprocess` may have done so."""
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        return
