"""Machines of both programs whose guests are moved: how they are started, filled, and asked to migrate."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, final

import attrs

from bench.machines import OURS, POLL, BenchFailed, Machine, moment, open_ram, running, wait_until_complete
from bench.ticks import bearing_of, newest, period_of, tick_at
from vmm.guests import guest_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from bench.ticks import Bearing

SIDES: Final = ("ours", "qemu")

UNLIMITED: Final = 1 << 40
"""Bytes a second for `max-bandwidth`: more than there is."""

OVER: Final = ("completed", "failed", "cancelled")

WITHIN: Final = 120.0
"""Seconds that a migration may take."""

_RAM_NAMES: Final = {"ours": "/memfd:ram", "qemu": "/memfd:memory-backend-memfd"}
_BLOCK: Final = 64 << 20

SETTLED: Final = 50
"""Ticks after which a guest that was moved is at its ease."""

_DRIFT_MS: Final = 500
"""How long the drift of two clocks is watched: either bearing is good to some 20 us."""


@final
@attrs.frozen
class Guest:
    """What runs in a machine: the same ELF file for both programs."""

    mib: int
    append: str
    """Its command line."""
    kernel: str = "heartbeat"
    own_mib: int = 8
    """How much of RAM, from its beginning, is the guest's own. The rest is filled from outside."""


@final
@attrs.frozen
class Program:
    """One of the two programs."""

    side: str
    qemu: str | None
    """Path of QEMU, where it is that."""

    def command(self, guest: Guest, qmp: Path, *more: str) -> list[str]:
        """Return the command of a machine with `guest`, whose monitor is at `qmp`."""
        rest = ["-append", guest.append, "-m", str(guest.mib), "-serial", "null", "-nodefaults", *more]
        if self.qemu is None:
            return [*OURS, "-M", "microvm", "-kernel", f"builtin:{guest.kernel}", *rest, "-qmp", f"unix:{qmp}"]
        ram = f"memory-backend-memfd,id=ram,size={guest.mib}M,share=on"
        command = [self.qemu, "-M", "microvm,accel=kvm,isa-serial=on,memory-backend=ram", "-object", ram]
        command += ["-no-user-config", "-display", "none", "-kernel", str(guest_path(guest.kernel))]
        return [*command, *rest, "-qmp", f"unix:{qmp},server=on,wait=off"]


@final
@attrs.define
class Mover:
    """A machine that is, or will be, at one end of a migration."""

    program: Program
    machine: Machine
    guest: Guest
    log: Path
    _ram: int | None = None

    @property
    def pid(self) -> int:
        """Of its process."""
        return self.machine.process.pid

    def execute(self, command: str, **arguments: Any) -> Any:
        """Execute a command, as `Monitor.execute`. The error has what the process has written."""
        try:
            return self.machine.monitor.execute(command, **arguments)
        except (BenchFailed, OSError) as error:
            raise BenchFailed(f"{self.program.side}: {command}: {error}{self._words()}") from error

    def _words(self) -> str:
        said = self.log.read_text(errors="replace").strip()
        return f"\n{said}" if said else ""

    def event(self, name: str) -> dict[str, Any]:
        """Wait for the next event `name`, and return it."""
        try:
            return self.machine.monitor.wait_for(name, WITHIN)
        except (BenchFailed, OSError) as error:
            raise BenchFailed(f"{self.program.side}: no event {name}: {error}{self._words()}") from error

    @property
    def ram(self) -> int:
        """Descriptor of its RAM."""
        if self._ram is None:
            self._ram = open_ram(self.pid, _RAM_NAMES[self.program.side])
        return self._ram

    def read(self, address: int, size: int) -> bytes:
        """Read guest-physical memory below 3 GiB, which is the beginning of the memfd; zeros where that is none yet."""
        return os.pread(self.ram, size, address).ljust(size, b"\0")

    def wait_for_ram(self) -> None:
        """Return once the process has RAM. Our monitor answers before."""
        limit = time.monotonic() + WITHIN
        while True:
            try:
                assert self.ram >= 0
                return
            except BenchFailed:
                if time.monotonic() > limit:
                    raise
            time.sleep(POLL)

    def wait_for_tick(self, number: int) -> None:
        """Return once the guest has ticked for the time `number`."""
        limit = time.monotonic() + WITHIN
        while newest(self.read) <= number:
            if time.monotonic() > limit:
                raise BenchFailed(
                    f"{self.program.side}: no tick {number}, the last was {newest(self.read)}{self._words()}"
                )
            time.sleep(0.005)

    def fill(self) -> None:
        """Fill RAM with what is neither zero nor to be compressed, but for what is the guest's own."""
        block = os.urandom(_BLOCK)
        at, end = self.guest.own_mib << 20, self.guest.mib << 20
        while at < end:
            at += os.pwrite(self.ram, block[: end - at], at)

    def close(self) -> None:
        """Close the descriptor."""
        if self._ram is not None:
            os.close(self._ram)
            self._ram = None


@contextmanager
def mover(
    program: Program, guest: Guest, folder: Path, role: str, *more: str, before: tuple[str, ...] = ()
) -> Iterator[Mover]:
    """Start a machine, by the command `before` if there is one; `role` tells its files from others'.

    With `more` it may await something: it is not waited for.
    """
    qmp, log = folder / f"{program.side}-{role}.qmp", folder / f"{program.side}-{role}.log"
    with running([*before, *program.command(guest, qmp, *more)], qmp, log) as machine:
        made = Mover(program, machine, guest, log)
        try:
            made.execute("qmp_capabilities")
            if program.qemu is None and not more:
                wait_until_complete(machine.monitor)
            yield made
        finally:
            made.close()


@contextmanager
def source(program: Program, guest: Guest, folder: Path) -> Iterator[Mover]:
    """Start a machine whose guest ticks and whose RAM is filled."""
    with mover(program, guest, folder, "source") as made:
        made.wait_for_tick(3)
        made.fill()
        made.execute("migrate-set-parameters", **{"max-bandwidth": UNLIMITED, "downtime-limit": 20})
        yield made


@final
@attrs.frozen
class Way:
    """How a guest goes over."""

    scheme: str
    """unix or tcp."""
    channels: int = 0
    """Of multifd; 0 without."""

    def prepare(self, mover: Mover) -> None:
        """Set capabilities and parameters at one end."""
        wanted = {"events": True, "multifd": self.channels > 0}
        states = [{"capability": name, "state": state} for name, state in wanted.items()]
        mover.execute("migrate-set-capabilities", capabilities=states)
        if self.channels:
            mover.execute("migrate-set-parameters", **{"multifd-channels": self.channels})

    @contextmanager
    def destination(self, program: Program, guest: Guest, folder: Path) -> Iterator[tuple[Mover, str]]:
        """Start a process that awaits such a guest, with the machine's options; yield it, and the URI to go to."""
        path = folder / "main"
        path.unlink(missing_ok=True)
        uri = f"unix:{path}" if self.scheme == "unix" else "tcp:127.0.0.1:0"
        # Ours needs to be told nothing more: what QEMU's has to be, comes with the guest.
        with mover(
            program, guest, folder, "destination", "-incoming", uri if program.qemu is None else "defer"
        ) as made:
            if program.qemu is not None:
                self.prepare(made)
                made.execute("migrate-incoming", uri=uri)
            limit = time.monotonic() + WITHIN
            while "socket-address" not in (info := made.execute("query-migrate")):
                if time.monotonic() > limit:
                    raise BenchFailed(f"{program.side}: a destination does not listen: {info}")
                time.sleep(POLL)
            if self.scheme == "tcp":
                uri = f"tcp:127.0.0.1:{info['socket-address'][0]['port']}"
            yield made, uri


def move(source: Mover, destination: Mover, uri: str) -> dict[str, float]:
    """Migrate a guest that runs, and return what it cost. The guest runs in the destination then.

    `seconds` from just before `migrate` is sent to the destination's RESUME; `pause_ms` from the source's STOP to it,
    `downtime_ms` as the source tells it; processor seconds of both processes.
    """
    used = [cpu_seconds(end.pid) for end in (source, destination)]
    began = time.time()
    source.execute("migrate", uri=uri)
    info = completed(source)
    resumed = moment(destination.event("RESUME"))
    spent = [cpu_seconds(end.pid) - before for end, before in zip((source, destination), used, strict=True)]
    stopped = moment(source.event("STOP"))
    gib = source.guest.mib / 1024
    return {
        "seconds": resumed / 1e3 - began,
        "mib_per_second": source.guest.mib / (resumed / 1e3 - began),
        "pause_ms": resumed - stopped,
        "downtime_ms": float(info["downtime"]),
        "source_cpu_per_gib": spent[0] / gib,
        "destination_cpu_per_gib": spent[1] / gib,
        "cpu_per_gib": sum(spent) / gib,
    }


def completed(mover: Mover) -> Mapping[str, Any]:
    """Wait for the end of a migration at its source, and return what that says of it."""
    while mover.event("MIGRATION")["data"]["status"] not in OVER:
        pass
    info: Mapping[str, Any] = mover.execute("query-migrate")
    if info["status"] != "completed":
        raise BenchFailed(f"{mover.program.side}: the migration is {info['status']}: {info.get('error-desc')}")
    return info


def guest_pause_ms(source: Mover, before: Bearing, destination: Mover) -> float:
    """Return how long the guest did not tick because it was moved, less a tick, on the host's clock.

    Its own clock may have stood meanwhile. So the last tick is taken from the RAM that is left in the source, and the
    next one from the destination's, each by how far the host's clock was ahead of the guest's there: at the source
    `before`, while it ticked. How far they drift apart is measured at the destination: a guest that is not told the
    rate of its clock is off by milliseconds in a second.
    """
    number = newest(source.read)
    destination.wait_for_tick(number + SETTLED)
    after = bearing_of(destination.read)
    destination.wait_for_tick(newest(destination.read) + round(_DRIFT_MS / period_of(destination.read)))
    drift = after.drift_to(bearing_of(destination.read))
    last = before.on_host(tick_at(source.read, number - 1), drift)
    first, second = (after.on_host(tick_at(destination.read, at), drift) for at in (number, number + 1))
    # A guest that was stopped in the middle of a tick has noted its time before the pause, and counts it after.
    return max(first - last, second - first) - period_of(source.read)


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process, threads that have ended included.

    Source: the Linux kernel's include/linux/posix-timers.h (CPUCLOCK_SCHED), clock_getcpuclockid(3).
    """
    return time.clock_gettime((~pid << 3) | 2)
