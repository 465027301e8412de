"""`query-status` round trips a second, on one connection."""

from __future__ import annotations

import json
import subprocess
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

from bench.machines import OURS, pin, pinned, running
from bench.series import columns, ratio

if TYPE_CHECKING:
    from pathlib import Path

    from bench.host import Placements

PLACEMENTS: Final = ("unpinned", "one_cpu")


def measure_roundtrips(
    pairs: int, seconds: float, qemu: str | None, client: Path, placements: Placements, folder: Path
) -> dict[str, Any]:
    """Let `client` ask a standing machine for `seconds`, ours and QEMU's in turn, `pairs` times for each placement."""
    with ExitStack() as stack:
        commands = {
            "ours": [*OURS, "-M", "microvm", "-S", "-m", "128", "-nodefaults", "-qmp", f"unix:{folder}/ours.qmp"]
        }
        if qemu is not None:
            commands["qemu"] = [
                qemu, "-M", "microvm,accel=kvm", "-S", "-m", "128", "-nodefaults", "-no-user-config",
                "-display", "none", "-qmp", f"unix:{folder}/qemu.qmp,server=on,wait=off",
            ]  # fmt: skip
        processes = {}
        for side, command in commands.items():
            machine = stack.enter_context(running(command, folder / f"{side}.qmp", folder / f"{side}.log"))
            # QEMU's monitor serves one client at a time: this one makes room for the one that is measured.
            machine.monitor.execute("qmp_capabilities")
            machine.monitor.close()
            processes[side] = machine.process
        rows: dict[str, dict[str, list[dict[str, float]]]] = {
            placement: {side: [] for side in commands} for placement in PLACEMENTS
        }
        for _ in range(pairs):
            for placement in PLACEMENTS:
                cpu = placements.one if placement == "one_cpu" else None
                for side, process in processes.items():
                    pin(process.pid, placements.all if cpu is None else {cpu})
                    done = subprocess.run(
                        pinned([str(client), str(folder / f"{side}.qmp"), str(seconds)], cpu),
                        check=True, capture_output=True,
                    )  # fmt: skip
                    found = json.loads(done.stdout)
                    rate = found["answers"] / found["seconds"]
                    rows[placement][side].append({"per_second": rate, "median_us": found["median_us"]})
    result: dict[str, Any] = {}
    for placement, sides in rows.items():
        result[placement] = {side: columns(found) for side, found in sides.items()}
        result[placement].setdefault("qemu", None)
        rates = {side: [row["per_second"] for row in found] for side, found in sides.items()}
        result[placement]["ratio"] = ratio(rates["ours"], rates["qemu"]) if "qemu" in rates else None
    return result
