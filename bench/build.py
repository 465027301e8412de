"""A machine built over QMP beside the same one of the command line: from the greeting to a guest that runs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from bench.machines import OURS, Machine, running
from bench.series import columns, ratio

if TYPE_CHECKING:
    from pathlib import Path

MIB: Final = 128

OPTIONS: Final = ("-m", str(MIB), "-kernel", "builtin:heartbeat", "-append", "region=64K", "-serial", "none")
COMMANDS: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    ("machine-set", {"memory": {"size": MIB << 20}, "kernel": "builtin:heartbeat", "append": "region=64K"}),
    ("accel-set", {"accel": "kvm"}),
    ("cpu-model-set", {"model": "host"}),
    ("finish-machine-init", {}),
    ("cont", {}),
)
"""What `OPTIONS` stand for."""


def measure_build(pairs: int, folder: Path) -> dict[str, Any]:
    """Build the machine both ways, in turn, `pairs` times."""
    rows: dict[str, list[dict[str, float]]] = {"options": [], "commands": []}
    for number in range(pairs + 1):
        # Which of the two comes first changes from pair to pair. The first pair fills caches and is not counted.
        for way in sorted(rows, reverse=number % 2 == 1):
            found = _built(way, folder)
            rows[way] += [found] if number else []
    milliseconds = {way: [row["running_ms"] for row in found] for way, found in rows.items()}
    return {
        **{way: columns(found) for way, found in rows.items()},
        "ratio": ratio(milliseconds["commands"], milliseconds["options"]),
    }


def _built(way: str, folder: Path) -> dict[str, float]:
    """Start a process; return the time from its greeting to the moment at which a client knows that the guest runs.

    With options the process goes on by itself as soon as it has greeted, or before. The first command that changes
    something is answered when all of it is done. With commands each is sent when the one before was answered.
    """
    qmp = folder / "build.qmp"
    options = OPTIONS if way == "options" else ()
    with running([*OURS, *options, "-qmp", f"unix:{qmp}"], qmp, folder / "build.log") as machine:
        began = time.perf_counter()
        machine.monitor.execute("qmp_capabilities")
        if way == "options":
            machine.monitor.execute("migrate-set-parameters")
        else:
            for command, arguments in COMMANDS:
                machine.monitor.execute(command, **arguments)
        took = time.perf_counter() - began
        _require_running(machine)
        return {"running_ms": took * 1e3}


def _require_running(machine: Machine) -> None:
    assert machine.monitor.execute("query-status")["running"]
