"""A guest that is copied while it runs: how fast, at what cost of processor time, and how long it stands for it.

Both programs run the same ELF file, and have the same in all of RAM that is not the guest's own: random bytes, so that
nothing is left out and nothing compressed. A source is the same process throughout, which runs its guest again after
each migration; a destination is new each time, and gets its memory from a pool (`bench/pool.py`).
"""

from __future__ import annotations

import mmap
import os
import time
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any, Final

import attrs

from bench.host import available_mib
from bench.movers import Guest, Program, Way, guest_pause_ms, move, source
from bench.pool import MARGIN_MIB, Pool
from bench.series import columns, ratio
from bench.ticks import bearing_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from bench.movers import Mover

WAYS: Final[Mapping[str, Way]] = {
    "unix": Way("unix"),
    "tcp": Way("tcp"),
    "multifd2": Way("tcp", 2),
    "multifd4": Way("tcp", 4),
}

SIZES: Final[Mapping[str, tuple[int, tuple[str, ...]]]] = {
    "1 GiB": (1024, tuple(WAYS)),
    "4 GiB": (4096, ("unix", "tcp")),
}
"""MiB, and the ways that a guest of that size goes."""

IDLE: Final = "hz=20 pages=0 region=64K"
"""A guest that does next to nothing: what it costs is in the processor time of both programs."""

TICKING: Final = "hz=1000 pages=0 region=64K"
"""Looks at the time often enough to tell how long it stood."""

GUESTS: Final[Mapping[str, Guest]] = {
    "idle": Guest(1024, TICKING),
    # 10 pages in each tick are 39 MiB/s.
    "dirty": Guest(1024, "hz=1000 pages=10 region=32M", "dirtier", own_mib=40),
}
"""Whose pauses are measured."""

GROWTH: Final[Mapping[str, int]] = {"128 MiB": 128, "1 GiB": 1024, "8 GiB": 8192}

QUICK_MIB: Final = 64

_PIECE: Final = 1 << 18

Rows = list[dict[str, float]]


def programs(qemu: str | None) -> list[Program]:
    """Return both programs, or ours alone."""
    ours = Program("ours", None)
    return [ours] if qemu is None else [ours, Program("qemu", qemu)]


def measure_precopy(pairs: int, qemu: str | None, folder: Path, *, quick: bool) -> dict[str, Any]:
    """Migrate guests that do nothing, of each size and each way, ours and QEMU's in turn; with `quick` of one size."""
    found: dict[str, Any] = {"left_out": []}
    with closing(Pool()) as pool:
        for name, (mib, ways) in SIZES.items():
            size = QUICK_MIB if quick else mib
            if available_mib() + pool.mib < size * (1 + len(programs(qemu))) + MARGIN_MIB:
                found["left_out"].append(name)
            elif quick and len(found) > 1:
                found[name] = {way: found[next(iter(SIZES))][way] for way in ways}
            else:
                # The first of all is not counted, where it does not take long.
                first = int(size != 1024)
                found[name] = _size(pairs, Guest(size, IDLE), ways, qemu, folder, pool, first=first)
    return found


def _size(
    pairs: int, guest: Guest, ways: Sequence[str], qemu: str | None, folder: Path, pool: Pool, *, first: int
) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Rows]] = {way: {} for way in ways}
    with ExitStack() as stack:
        pool.free(pool.mib)
        sources = [stack.enter_context(source(program, guest, folder)) for program in programs(qemu)]
        # Number 0 is not counted: then the sources do for the first time what they will do again and again.
        for number in range(first, pairs + 1):
            for way in ways:
                for end in sources:
                    row = _over(end, WAYS[way], folder, pool)
                    rows[way].setdefault(end.program.side, []).extend([row] if number else [])
    return {way: compared(sides) for way, sides in rows.items()}


def _over(end: Mover, way: Way, folder: Path, pool: Pool) -> dict[str, float]:
    """Migrate a guest to a new process, which is then ended; the guest goes on in the source."""
    guest = end.guest
    pool.hold(guest.mib)
    way.prepare(end)
    with way.destination(end.program, guest, folder) as (destination, uri):
        pool.free(guest.mib)
        row = move(end, destination, uri)
    end.execute("cont")
    return row


def compared(sides: Mapping[str, Rows]) -> dict[str, Any]:
    """Sum up both sides, and their ratio in each figure: None where there is no QEMU."""
    ours, theirs = sides["ours"], sides.get("qemu")
    if not theirs:
        return {"ours": columns(ours), "qemu": None, "ratio": None}
    # A downtime is told in whole milliseconds, which can be none.
    names = [name for name in ours[0] if name != "downtime_ms"]
    both = {name: ratio([row[name] for row in ours], [row[name] for row in theirs]) for name in names}
    return {"ours": columns(ours), "qemu": columns(theirs), "ratio": both}


def measure_switchover(pairs: int, qemu: str | None, folder: Path, *, quick: bool) -> dict[str, Any]:
    """Migrate guests of 1 GiB that tick at 1 kHz; how long they stood, by the monitors and by themselves."""
    found: dict[str, Any] = {}
    with closing(Pool()) as pool:
        for kind, guest in GUESTS.items():
            guest = attrs.evolve(guest, mib=QUICK_MIB) if quick else guest
            sides: dict[str, Rows] = {}
            with ExitStack() as stack:
                pool.free(pool.mib)
                sources = [stack.enter_context(source(program, guest, folder)) for program in programs(qemu)]
                for number in range(int(quick), pairs + 1):
                    for end in sources:
                        row = _pause(end, folder, pool)
                        sides.setdefault(end.program.side, []).extend([row] if number else [])
            found[kind] = compared(sides)
    return found


def _pause(end: Mover, folder: Path, pool: Pool) -> dict[str, float]:
    guest = end.guest
    pool.hold(guest.mib)
    WAYS["unix"].prepare(end)
    before = bearing_of(end.read)
    with WAYS["unix"].destination(end.program, guest, folder) as (destination, uri):
        pool.free(guest.mib)
        row = move(end, destination, uri)
        row["guest_pause_ms"] = guest_pause_ms(end, before, destination)
    end.execute("cont")
    return row


def measure_growth(count: int, folder: Path, *, quick: bool) -> dict[str, Any]:
    """Migrate guests of every size, ours alone: what a GiB costs must not depend on how many there are."""
    found: dict[str, Any] = {"left_out": []}
    program = Program("ours", None)
    with closing(Pool()) as pool:
        for name, mib in GROWTH.items():
            guest = Guest(QUICK_MIB if quick else mib, IDLE)
            if available_mib() + pool.mib < 2 * guest.mib + MARGIN_MIB:
                found["left_out"].append(name)
                continue
            if quick and len(found) > 1:
                found[name] = found[next(iter(GROWTH))]
                continue
            pool.free(guest.mib)
            with source(program, guest, folder) as end:
                rows = [_over(end, WAYS["unix"], folder, pool) for _ in range(int(quick), count + 1)]
            for row in rows:
                row["seconds_per_gib"] = row["seconds"] / guest.mib * 1024
                row["copy_cpu_per_gib"] = _plain_copy(guest.mib, pool)
            found[name] = columns(rows[-count:])
    return found


def _plain_copy(mib: int, pool: Pool) -> float:
    """Copy as much by pwrite, from one memory object to a new one, and nothing else; processor seconds per GiB.

    What the machine's own memory costs, by which a migration's growth is to be judged.
    """
    with ExitStack() as stack:
        pool.free(mib)
        source, target = (os.memfd_create(name, os.MFD_CLOEXEC) for name in ("source", "target"))
        stack.callback(os.close, source)
        stack.callback(os.close, target)
        piece = os.urandom(_PIECE)
        for at in range(0, mib << 20, _PIECE):
            os.pwrite(source, piece, at)
        mapped = stack.enter_context(mmap.mmap(source, mib << 20, prot=mmap.PROT_READ))
        view = stack.enter_context(memoryview(mapped))
        pool.hold(mib)
        pool.free(mib)
        began = time.process_time()
        for at in range(0, mib << 20, _PIECE):
            os.pwrite(target, view[at : at + _PIECE], at)
        return (time.process_time() - began) / mib * 1024
