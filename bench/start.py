"""From exec to an answer, and the memory that it takes."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from bench.machines import OURS, ROOT, BenchFailed, Machine, environment, memory_of, running, wait_until_complete
from bench.series import columns, ratio

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

KINDS: Final = ("monitor", "machine")
"""A monitor with no machine yet; a machine of 128 MiB that is complete and stands."""


def measure_start(pairs: int, qemu: str | None, folder: Path) -> dict[str, Any]:
    """Start each kind of machine `pairs` times, ours and QEMU's in turn."""
    interpreter: list[dict[str, float]] = []
    trio: list[dict[str, float]] = []
    ours: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    theirs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for number in range(pairs + 1):
        # The first round is not counted: it fills the page cache, and the cache of bytecode.
        counts = number > 0
        for kind in KINDS:
            found = _start_ours(kind, folder)
            ours[kind] += [found] if counts else []
            if qemu is not None:
                found = _start_qemu(qemu, kind, folder)
                theirs[kind] += [found] if counts else []
        for rows, code in ((interpreter, ""), (trio, "import trio; ")):
            found = _start_python(code)
            rows += [found] if counts else []
    result: dict[str, Any] = {"interpreter": columns(interpreter), "import_trio": columns(trio)}
    for kind in KINDS:
        result[kind] = {
            "ours": columns(ours[kind]),
            "qemu": columns(theirs[kind]) if theirs[kind] else None,
            "ratio": {name: ratio(_of(ours[kind], name), _of(theirs[kind], name)) for name in theirs[kind][0]}
            if theirs[kind]
            else None,
        }
    own = [{"greeting_ms": a["greeting_ms"] - b["exec_ms"]} for a, b in zip(ours["monitor"], trio, strict=True)]
    result["own_share"] = columns(own)
    return result


def _of(rows: Sequence[dict[str, float]], name: str) -> list[float]:
    return [row[name] for row in rows]


def _start_ours(kind: str, folder: Path) -> dict[str, float]:
    qmp = folder / "start.qmp"
    options = ["-M", "microvm", "-S", "-m", "128", "-nodefaults"] if kind == "machine" else []
    with running([*OURS, *options, "-qmp", f"unix:{qmp}"], qmp, folder / "start.log") as machine:
        times = _ask(machine)
        began = time.perf_counter()
        if kind == "machine":
            wait_until_complete(machine.monitor)
        complete = times["answer_ms"] + (time.perf_counter() - began) * 1e3
        return {**times, "complete_ms": complete, **memory_of(machine.process.pid)}


def _start_qemu(qemu: str, kind: str, folder: Path) -> dict[str, float]:
    qmp = folder / "start.qmp"
    options = ["-M", "microvm,accel=kvm", "-m", "128"] if kind == "machine" else ["-M", "none"]
    command = [qemu, *options, "-S", "-nodefaults", "-no-user-config", "-display", "none"]
    command += ["-qmp", f"unix:{qmp},server=on,wait=off"]
    with running(command, qmp, folder / "start.log") as machine:
        times = _ask(machine)
        return {**times, "complete_ms": times["answer_ms"], **memory_of(machine.process.pid)}


def _ask(machine: Machine) -> dict[str, float]:
    began = time.perf_counter()
    machine.monitor.execute("qmp_capabilities")
    machine.monitor.execute("query-status")
    answered = machine.greeted + time.perf_counter() - began
    return {"greeting_ms": machine.greeted * 1e3, "answer_ms": answered * 1e3}


def _start_python(code: str) -> dict[str, float]:
    """Start the interpreter, and let it say something as soon as it has executed `code`."""
    program = f"{code}import os; os.write(1, b'.'); os.read(0, 1)"
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, cwd=ROOT, env=environment(),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        said = process.stdout.read(1)
        took = time.perf_counter() - began
        if said != b".":
            raise BenchFailed(f"{sys.executable} does not execute {program!r}")
        return {"exec_ms": took * 1e3, **memory_of(process.pid)}
