"""The pause of a live update, by the VMM's clock and by the guest's, beside the floor that the machine sets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, final

import trio

from bench.host import available_mib
from bench.machines import (
    OURS,
    PATIENCE,
    ROOT,
    BenchFailed,
    Monitor,
    end,
    environment,
    moment,
    open_ram,
    pin,
    pinned,
    running,
    wait_until_complete,
)
from bench.series import columns, ratio
from bench.ticks import gaps_from, newest
from vmm.cli_update import live_update
from vmm.guests.heartbeat import HeartbeatReader
from vmm.qmp_client import qmp_session

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from bench.host import Placements
    from vmm.guests.heartbeat import HeartbeatReport

SIZES: Final = {"128 MiB": 128, "1 GiB": 1024, "4 GiB": 4096}
PLACEMENTS: Final = ("unpinned", "one_cpu")

ATTEMPTS: Final = 3
TICKS: Final = 300
"""Ticks that the guest is watched for: before an update, for comparison, and around it."""

MARGIN_MIB: Final = 1024
"""Memory that stays free."""


def measure_pause(
    rounds: int, qemu: str | None, floor: Path, placements: Placements, folder: Path, *, resident: bool
) -> dict[str, Any]:
    """Update machines of all sizes in both placements, `rounds` times, with the floor in between.

    A machine lives for the whole run and goes from process to process; while it is not measured its guest stands. With
    `resident` every page of its RAM is there before the first update, as in a machine that has run for long.
    """
    ours: dict[str, dict[str, list[dict[str, float]]]] = {placement: {} for placement in PLACEMENTS}
    bottom: dict[str, list[dict[str, float]]] = {placement: [] for placement in PLACEMENTS}
    left_out = []
    with ExitStack() as stack:
        guests = {}
        for name, mib in SIZES.items():
            if resident and available_mib() < mib + MARGIN_MIB:
                left_out.append(name)
                continue
            guests[name] = stack.enter_context(_guest(mib, folder, resident=resident))
        for _ in range(rounds):
            for placement in PLACEMENTS:
                cpu = placements.one if placement == "one_cpu" else None
                for name, guest in guests.items():
                    found = guest.update(placements, cpu)
                    ours[placement].setdefault(name, []).append(found)
                    bottom[placement].append(floor_of(floor, cpu))
    return {
        "qemu": None,
        "qemu_has": qemu is not None and _has_cpr_transfer(qemu, folder),
        "resident": resident,
        "left_out": left_out,
        "ours": {place: {name: columns(rows) for name, rows in sizes.items()} for place, sizes in ours.items()},
        "floor": {place: columns(rows) for place, rows in bottom.items()},
        "largest_by_smallest": {place: _growth(sizes) for place, sizes in ours.items()},
    }


def _growth(sizes: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    totals = [[row["total"] for row in rows] for rows in sizes.values()]
    return ratio(totals[-1], totals[0])


@final
class _Guest:
    """A machine that runs the guest `heartbeat`, and the process that has it now."""

    def __init__(self, pid: int, qmp: Path, log: Path) -> None:
        self.pid = pid
        self._qmp = qmp
        self._log = log
        self._ram = open_ram(pid)
        self._reader = HeartbeatReader(self._read)
        self._wait_for_ticks(TICKS)
        self._order("stop")

    def fill(self) -> None:
        """Make every page of RAM resident; what is in it stays. As fast as the kernel clears pages."""
        os.posix_fallocate(self._ram, 0, os.fstat(self._ram).st_size)

    def update(self, placements: Placements, cpu: int | None) -> dict[str, float]:
        """Update the machine once, on `cpu` only if that is given. Returns milliseconds."""
        pin(self.pid, placements.all if cpu is None else {cpu})
        self._order("cont")
        self._wait_for_ticks(TICKS // 3)
        calm = newest(self._read)
        self._wait_for_ticks(TICKS)
        self._look()
        first = newest(self._read)
        with closing(Monitor.connect(self._qmp)) as events:
            events.execute("qmp_capabilities")
            began = time.perf_counter()
            report = trio.run(live_update, str(self._qmp), pinned([sys.executable, "-m", "vmm"], cpu))
            whole = (time.perf_counter() - began) * 1e3
            stopped = moment(events.last("STOP", until="RESUME"))
        self._wait_for_ticks(TICKS)
        gaps = gaps_from(self._read, calm)
        state = self._look()
        self.pid = report.new_pid
        ram, self._ram = self._ram, open_ram(self.pid)
        os.close(ram)
        self._order("stop")
        if not state.intact:
            raise BenchFailed(f"the guest was damaged by an update: {state}")
        normal = 1000 / state.header.rate_hz
        # STOP is reported once the vCPUs are out and the chardevs at rest.
        middle = stopped + (report.stages["total"] - report.stages["stop"] - report.stages["quiesce"]) / 2
        pause = next(gap for gap in gaps if gap.began <= middle < gap.ended)
        return {
            **report.stages,
            "guest_pause": pause.length - normal,
            "guest_longest": max(gap.length for gap in gaps[first - calm :]) - normal,
            "calm_longest": max(gap.length for gap in gaps[: first - calm]) - normal,
            "whole_update": whole,
        }

    def _look(self) -> HeartbeatReport:
        report = self._reader.look()
        if report is None:
            raise BenchFailed(f"the guest has not started: {self._log.read_text(errors='replace')}")
        return report

    def _wait_for_ticks(self, count: int) -> None:
        limit = time.monotonic() + PATIENCE
        first: int | None = None
        while True:
            # Not with the reader, whose work would be in the way of what is measured.
            ticks = newest(self._read)
            first = ticks if first is None else first
            if ticks >= first + count:
                return
            if time.monotonic() > limit:
                raise BenchFailed(f"the guest stands at tick {ticks}: {self._log.read_text(errors='replace')}")
            time.sleep(0.01)

    def _read(self, address: int, size: int) -> bytes:
        return os.pread(self._ram, size, address)  # RAM below 3 GiB is the beginning of the memfd

    def _order(self, command: str) -> None:
        trio.run(_order, str(self._qmp), command)

    def close(self) -> None:
        """End the machine, whatever process has it now."""
        os.close(self._ram)
        self._order("quit")
        _reap(self.pid)


@contextmanager
def _guest(mib: int, folder: Path, *, resident: bool) -> Iterator[_Guest]:
    qmp, log = folder / f"pause-{mib}.qmp", folder / f"pause-{mib}.log"
    command = [
        *OURS,
        "-M",
        "microvm",
        "-nodefaults",
        "-kernel",
        "builtin:heartbeat",
        "-m",
        str(mib),
        "-qmp",
        f"unix:{qmp}",
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=ROOT, env=environment()
        )
        try:
            with closing(Monitor.connect(qmp, process)) as monitor:
                monitor.execute("qmp_capabilities")
                wait_until_complete(monitor)
            guest = _Guest(process.pid, qmp, log)
            if resident:
                guest.fill()
            try:
                yield guest
            finally:
                guest.close()
        finally:
            end(process)


def _reap(pid: int) -> None:
    """Wait for a successor, which is this process's child; `subprocess` may have done so."""
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)


def floor_of(program: Path, cpu: int | None) -> dict[str, float]:
    """Run the floor once. Returns milliseconds."""
    command = pinned([str(program), str(TICKS)], cpu)
    for _ in range(ATTEMPTS):
        done = subprocess.run(command, check=False, capture_output=True, timeout=PATIENCE)
        if done.returncode == 0:
            break
        # One run in some dozens does not come about on a nested KVM; it is said, and not counted.
        print(f"the floor, tried again: {done.stderr.decode().strip()}", file=sys.stderr, flush=True)
    else:
        raise BenchFailed(f"the floor failed {ATTEMPTS} times in a row")
    found: dict[str, float] = json.loads(done.stdout)
    normal = found.pop("normal_gap")
    gaps = {name: found.pop(name) - normal for name in ("guest_pause", "calm_longest")}
    return {**found, **gaps}


def _has_cpr_transfer(qemu: str, folder: Path) -> bool:
    """Ask QEMU, which lists the modes of a migration in its schema."""
    qmp = folder / "schema.qmp"
    command = [qemu, "-M", "none", "-S", "-nodefaults", "-no-user-config", "-display", "none"]
    with running([*command, "-qmp", f"unix:{qmp},server=on,wait=off"], qmp, folder / "schema.log") as machine:
        machine.monitor.execute("qmp_capabilities")
        return "cpr-transfer" in json.dumps(machine.monitor.execute("query-qmp-schema"))


async def _order(qmp: str, command: str) -> None:
    async with qmp_session(qmp) as client:
        await client.execute(command)
