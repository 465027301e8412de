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
from bench.machines import PROGRAM, running
from bench.migration import QUICK_MIB, TICKING, compared, programs
from bench.movers import SETTLED, Guest, Mover, completed, cpu_seconds, source
from bench.pool import MARGIN_MIB, Pool
from bench.ticks import newest, offset_of, tick_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.migration import Rows

TMPFS: Final = Path("/dev/shm")

MIB: Final = 4096


def measure_saves(pairs: int, qemu: str | None, folder: Path, *, quick: bool) -> dict[str, Any]:
    """Save and restore a guest of 4 GiB, ours and QEMU's in turn. Left out where there is no memory for that."""
    guest = Guest(QUICK_MIB if quick else MIB, TICKING)
    sides = programs(qemu)
    if (
        available_mib() < guest.mib * (2 + len(sides)) + MARGIN_MIB
        or shutil.disk_usage(TMPFS).free < (guest.mib + 64) << 20
    ):
        return {"left_out": [f"{MIB >> 10} GiB"]}
    rows: dict[str, Rows] = {}
    with closing(Pool()) as pool, ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trio-vmm-bench-", dir=TMPFS))) / "state"
        sources = [stack.enter_context(source(program, guest, folder)) for program in sides]
        for _ in range(pairs):
            for end in sources:
                pool.hold(2 * guest.mib)
                row = _save_ours(end, path, pool) if end.program.qemu is None else _save_qemus(end, path, pool)
                row |= (
                    _restore_ours(end, path, folder, pool)
                    if end.program.qemu is None
                    else _restore_qemus(end, path, folder, pool)
                )
                path.unlink()
                end.execute("cont")
                rows.setdefault(end.program.side, []).append(row)
    return {"left_out": [], **compared(rows)}


def _save_ours(end: Mover, path: Path, pool: Pool) -> dict[str, float]:
    states = [{"capability": name, "state": True} for name in ("events", "mapped-ram")]
    end.execute("migrate-set-capabilities", capabilities=states)
    return _save(end, f"file:{path}", pool)


def _save_qemus(end: Mover, path: Path, pool: Pool) -> dict[str, float]:
    end.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    end.machine.monitor.give(fd, "save")
    os.close(fd)
    return _save(end, "fd:save", pool)


def _save(end: Mover, uri: str, pool: Pool) -> dict[str, float]:
    gib = end.guest.mib / 1024
    used = cpu_seconds(end.pid)
    pool.free(end.guest.mib)
    began = time.perf_counter()
    end.execute("migrate", uri=uri)
    completed(end)
    took = time.perf_counter() - began
    return {"save_gib_per_second": gib / took, "save_cpu_per_gib": (cpu_seconds(end.pid) - used) / gib}


def _restore_ours(end: Mover, path: Path, folder: Path, pool: Pool) -> dict[str, float]:
    qmp = folder / "restored.qmp"
    command = [*PROGRAM, "restore", str(path), "-qmp", f"unix:{qmp}"]
    whole, spent = _restored([*command, "--whole"], qmp, end, folder, pool)
    pool.hold(end.guest.mib)
    on_demand, _ = _restored(command, qmp, end, folder, pool)
    return _restore_row(end, whole, on_demand, spent)


def _restore_qemus(end: Mover, path: Path, folder: Path, pool: Pool) -> dict[str, float]:
    qmp = folder / "restored.qmp"
    command = end.program.command(end.guest, qmp, "-incoming", "fd:3")
    whole, spent = _restored(["sh", "-c", 'exec "$@" 3<"$0"', str(path), *command], qmp, end, folder, pool)
    return _restore_row(end, whole, whole, spent)


def _restore_row(end: Mover, whole: float, on_demand: float, spent: float) -> dict[str, float]:
    return {"whole_ms": whole, "tick_ms": on_demand, "restore_cpu_per_gib": spent / end.guest.mib * 1024}


def _restored(command: Sequence[str], qmp: Path, end: Mover, folder: Path, pool: Pool) -> tuple[float, float]:
    """Return the ms from just before exec until the guest ticks again, and the processor seconds until then."""
    number, log = newest(end.read), folder / "restored.log"
    pool.free(end.guest.mib)
    began = time.time() * 1e3
    with running(command, qmp, log) as machine, closing(Mover(end.program, machine, end.guest, log)) as restored:
        restored.execute("qmp_capabilities")
        restored.wait_for_ram()
        restored.wait_for_tick(number + SETTLED)
        spent = cpu_seconds(restored.pid)
        # When it ticked is in its ring: a monitor that answers late (QEMU's does while it loads) does not count. A
        # guest that was saved in the middle of a tick has noted its time before.
        ahead = offset_of(restored.read)
        ticks = [tick_at(restored.read, at) + ahead - began for at in (number, number + 1)]
        return next(tick for tick in ticks if tick > 0), spent
