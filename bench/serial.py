"""Bytes a second of a guest that does nothing but print."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from bench.machines import OURS, PATIENCE, BenchFailed, connect, running
from bench.series import columns, ratio
from vmm.guests import guest_path

if TYPE_CHECKING:
    import socket
    from pathlib import Path

SINKS: Final = ("file", "socket")

SETTLE: Final = 0.3
"""Seconds from the guest's first byte until counting begins."""


def measure_serial(pairs: int, seconds: float, qemu: str | None, folder: Path) -> dict[str, Any]:
    """Let the guest `chatter` print for `seconds` into a file and to a reader of a socket, ours and QEMU's in turn."""
    result: dict[str, Any] = {}
    sides = ("ours", "qemu") if qemu is not None else ("ours",)
    rows: dict[str, dict[str, list[dict[str, float]]]] = {sink: {side: [] for side in sides} for sink in SINKS}
    for _ in range(pairs):
        for sink in SINKS:
            for side in sides:
                qmp, out = folder / "serial.qmp", folder / "serial.out"
                out.unlink(missing_ok=True)
                if side == "ours":
                    command = [*OURS, "-M", "microvm", "-kernel", "builtin:chatter"]
                else:
                    assert qemu is not None
                    command = [qemu, "-M", "microvm,accel=kvm,isa-serial=on", "-nodefaults", "-no-user-config"]
                    command += ["-display", "none", "-kernel", str(guest_path("chatter"))]
                target = {"file": f"file:{out}", "socket": f"unix:{out},server=on,wait=off"}[sink]
                command += ["-m", "128", "-serial", target, "-qmp", f"unix:{qmp},server=on,wait=off"]
                with running(command, qmp, folder / "serial.log") as machine:
                    if sink == "file":
                        rate = _rate_of_file(out, seconds)
                    else:
                        with connect(out, machine.process) as sock:
                            rate = _rate_of_socket(sock, seconds)
                rows[sink][side].append({"bytes_per_second": rate})
    for sink, found in rows.items():
        rates = {side: [row["bytes_per_second"] for row in series] for side, series in found.items()}
        result[sink] = {
            "ours": columns(found["ours"]),
            "qemu": columns(found["qemu"]) if "qemu" in found else None,
            "ratio": ratio(rates["ours"], rates["qemu"]) if "qemu" in rates else None,
        }
    return result


def _rate_of_file(path: Path, seconds: float) -> float:
    limit = time.monotonic() + PATIENCE
    while not (path.exists() and path.stat().st_size):
        if time.monotonic() > limit:
            raise BenchFailed("the guest printed nothing")
        time.sleep(0.01)
    time.sleep(SETTLE)
    began, first = time.perf_counter(), path.stat().st_size
    time.sleep(seconds)
    ended, last = time.perf_counter(), path.stat().st_size
    return (last - first) / (ended - began)


def _rate_of_socket(sock: socket.socket, seconds: float) -> float:
    sock.settimeout(PATIENCE)
    if not sock.recv(65536):
        raise BenchFailed("the machine closed its serial port")
    settled = time.perf_counter() + SETTLE
    while (began := time.perf_counter()) < settled:
        sock.recv(65536)
    count = 0
    while (now := time.perf_counter()) < began + seconds:
        count += len(sock.recv(65536))
    return count / (now - began)
