"""How long a destination takes to answer `query-status`: while it awaits a source, builds, and loads."""

from __future__ import annotations

import json
import math
import time
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, Final, final

from bench.machines import OURS, PATIENCE, BenchFailed, Machine, Monitor, connect, running, wait_until_complete
from bench.series import summary

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STAGES: Final = ("waiting", "building", "loading", "copying")
"""A source is awaited; its machine of 4 GiB is built and mapped; a live update's state is loaded; state and RAM of a
machine are loaded, of which 512 MiB are no zeros."""

MIB: Final = 4096
COPIED_MIB: Final = 1024
WAITING: Final = 1000
"""Round trips."""

_MORE: Final = 5
"""Rounds more, at most, if a stage was so short that nobody asked in it."""

_QUERY: Final = b'{"execute": "query-status"}'


def measure_latency(rounds: int, folder: Path) -> dict[str, Any]:
    """Hand a machine over, and copy one, `rounds` times; the destination is asked all the time, one thing at once."""
    found: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for number in range(rounds + _MORE):
        if number >= rounds and all(found.values()):
            break
        _live_update(folder, found)
        _copy(folder, found)
    return {stage: _tail(milliseconds) for stage, milliseconds in found.items()}


def _tail(milliseconds: list[float]) -> dict[str, Any]:
    if not milliseconds:
        raise BenchFailed("a destination was not asked in every stage: it was over too soon")
    ordered = sorted(milliseconds)
    p99 = ordered[min(len(ordered) - 1, math.ceil(len(ordered) * 0.99) - 1)]
    return {
        "count": len(ordered),
        **{name: summary([value]) for name, value in (("p50_ms", ordered[len(ordered) // 2]), ("p99_ms", p99))},
        "max_ms": summary([ordered[-1]]),
    }


@final
class _Asker:
    """A session with the destination; knows from the events which phase it is in."""

    def __init__(self, path: Path) -> None:
        self._sock = connect(path)
        self._sock.settimeout(PATIENCE)
        self._file = self._sock.makefile("rb")
        self.phase = ""
        self._file.readline()
        self._sock.sendall(b'{"execute": "qmp_capabilities"}')
        while "return" not in self._next():
            pass

    def _next(self) -> dict[str, Any]:
        line = self._file.readline()
        if not line:
            raise BenchFailed("a destination closed its monitor")
        message: dict[str, Any] = json.loads(line)
        data = message.get("data", {})
        if message.get("event") == "PHASE_CHANGED" and data["opened"] and data["phase"] not in _ASIDE:
            self.phase = data["phase"]
        return message

    def ask(self) -> float:
        """Ask once. Returns milliseconds."""
        began = time.perf_counter()
        self._sock.sendall(_QUERY)
        while "return" not in self._next():
            pass
        return (time.perf_counter() - began) * 1e3

    def close(self) -> None:
        """Leave."""
        self._file.close()
        self._sock.close()


_ASIDE: Final = ("fd_receive", "stream_receive")


@contextmanager
def _pair(mib: int, append: str, folder: Path) -> Iterator[tuple[Machine, _Asker]]:
    """A machine with a guest that has begun to work, and a process that awaits one, with somebody who asks it."""
    qmp, heir = folder / "latency.qmp", folder / "latency-heir.qmp"
    guest = ("-m", str(mib), "-kernel", "builtin:heartbeat", "-append", append, "-serial", "none")
    with (
        running([*OURS, *guest, "-qmp", f"unix:{qmp}"], qmp, folder / "latency.log") as source,
        running([*OURS, "-qmp", f"unix:{heir}"], heir, folder / "latency-heir.log") as destination,
    ):
        for machine in (source, destination):
            machine.monitor.execute("qmp_capabilities")
        wait_until_complete(source.monitor)
        with closing(_Asker(heir)) as asker:
            destination.monitor.execute("migrate-incoming", **_channels(folder, update=mib == MIB))
            yield source, asker


def _channels(folder: Path, *, update: bool) -> dict[str, Any]:
    kinds = ("main", "cpr") if update else ("main",)
    return {
        "channels": [
            {
                "channel-type": kind,
                "addr": {"transport": "socket", "type": "unix", "path": str(folder / f"latency-{kind}")},
            }
            for kind in kinds
        ]
    }


def _ask_until_running(asker: _Asker, loading: str, found: dict[str, list[float]]) -> None:
    limit = time.monotonic() + PATIENCE
    while asker.phase != "running":
        stage = loading if asker.phase == "incoming" else "building"
        found[stage].append(asker.ask())
        if time.monotonic() > limit:
            raise BenchFailed("a destination did not get its guest")


def _live_update(folder: Path, found: dict[str, list[float]]) -> None:
    with _pair(MIB, "region=1M", folder) as (source, asker):
        found["waiting"] += [asker.ask() for _ in range(WAITING)]
        source.monitor.execute("migrate-set-parameters", mode="cpr-transfer")
        _begin(source.monitor, folder, update=True)
        _ask_until_running(asker, "loading", found)


def _copy(folder: Path, found: dict[str, list[float]]) -> None:
    with _pair(COPIED_MIB, f"region={COPIED_MIB // 2}M", folder) as (source, asker):
        _begin(source.monitor, folder, update=False)
        _ask_until_running(asker, "copying", found)


def _begin(monitor: Monitor, folder: Path, *, update: bool) -> None:
    monitor.execute("migrate", **_channels(folder, update=update))
