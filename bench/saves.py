"""A guest that is saved in a file on tmpfs and had again: how fast, and how soon it runs.

QEMU before 9.0 has no mapped-ram: there its stream is written to the file, by `migrate fd:` with the file's descriptor,
and read from it by `-incoming fd:`, which are the fastest ways that it has.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.host import available_mib
from bench.migration import TICKING, compared, programs
from bench.movers import SETTLED, Guest, completed, cpu_seconds, mover, source
from bench.pool import MARGIN_MIB, Pool
from bench.ticks import newest, offset_of, tick_at

if TYPE_CHECKING:
    from bench.migration import Rows
    from bench.movers import Mover

TMPFS: Final = Path("/dev/shm")

MIB: Final = 4096


def measure_saves(pairs: int, qemu: str | None, folder: Path, *, quick: bool) -> dict[str, Any] | None:
    """Save and restore a guest of 4 GiB, ours and QEMU's in turn. None if there is no memory for that."""
    guest = Guest(64 if quick else MIB, TICKING)
    sides = programs(qemu)
    needed = guest.mib * (2 + len(sides)) + MARGIN_MIB
    if available_mib() < needed or shutil.disk_usage(TMPFS).free < (guest.mib + 64) << 20:
        return None
    rows: dict[str, Rows] = {}
    with closing(Pool()) as pool, ExitStack() as stack:
        files = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trio-vmm-bench-", dir=TMPFS)))
        sources = [stack.enter_context(source(program, guest, folder)) for program in sides]
        for number in range(pairs + 1):
            for end in sources:
                path = files / "state"
                pool.hold(2 * guest.mib)
                row = _save(end, path, pool)
                row |= _restore(end, path, folder, pool)
                path.unlink()
                end.execute("cont")
                rows.setdefault(end.program.side, []).extend([row] if number else [])
    return compared(rows)


def _save(end: Mover, path: Path, pool: Pool) -> dict[str, float]:
    gib = end.guest.mib / 1024
    used = cpu_seconds(end.pid)
    if end.program.qemu is None:
        pool.free(end.guest.mib)
        began = time.perf_counter()
        end.execute("migrate", uri=f"file:{path}")
    else:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        end.machine.monitor.give(fd, "save")
        os.close(fd)
        pool.free(end.guest.mib)
        began = time.perf_counter()
        end.execute("migrate", uri="fd:save")
    completed(end)
    took = time.perf_counter() - began
    return {"save_gib_per_second": gib / took, "save_cpu_per_gib": (cpu_seconds(end.pid) - used) / gib}


def _restore(end: Mover, path: Path, folder: Path, pool: Pool) -> dict[str, float]:
    """From just before exec until the guest ticks again."""
    number = newest(end.read)
    pool.free(end.guest.mib)
    if end.program.qemu is None:
        way: tuple[str, ...] = ("-loadvm", str(path))
        before: tuple[str, ...] = ()
    else:
        way = ("-incoming", "fd:3")
        before = ("sh", "-c", 'exec "$@" 3<"$0"', str(path))
    began = time.time() * 1e3
    with mover(end.program, end.guest, folder, "restored", *way, before=before) as restored:
        restored.wait_for_tick(number + SETTLED)
        # When it ticked is in its ring: a monitor that answers late (QEMU's does while it loads) does not count.
        first = tick_at(restored.read, number) + offset_of(restored.read)
        spent = cpu_seconds(restored.pid)
    return {"restore_ms": first - began, "restore_cpu_per_gib": spent / end.guest.mib * 1024}
