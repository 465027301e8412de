"""What a test may leave behind by mistake: descriptors, threads, child processes."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from typing import final

import attrs

_IDLE_TRIO_THREAD = "Trio thread "
"""How trio names a worker that waits for its next job. It keeps such workers for ten seconds, by design."""

_KVM_THREAD = "kvm-"
"""How KVM names threads that it adds to a process by itself, some time after a guest's start, while there is the VM."""


@final
@attrs.frozen
class Held:
    """What this process holds at one moment."""

    descriptors: dict[int, str]
    """Each descriptor and what it refers to."""
    threads: dict[int, str]
    """Each thread's kernel id and name, idle workers of trio's cache and KVM's own excepted."""
    children: dict[int, str]
    """Each child process that has not been waited for, and its command line."""

    @classmethod
    def now(cls) -> Held:
        """Look. Collects garbage first, so what a reference cycle alone still held is gone."""
        gc.collect()
        idle = {t.native_id for t in threading.enumerate() if t.name.startswith(_IDLE_TRIO_THREAD)}
        # By the kernel's name too: a worker whose ten seconds are over is none of Python's threads any more.
        others = (_IDLE_TRIO_THREAD, _KVM_THREAD)
        threads = {tid: name for tid, name in _threads().items() if tid not in idle and not name.startswith(others)}
        return cls(_descriptors(), threads, _children())

    def not_in(self, before: Held) -> list[str]:
        """One line for each thing held here that `before` did not hold. The same number may be another thing by now."""
        return [
            f"{kind} {number}: {what}"
            for kind, then, now in (
                ("descriptor", before.descriptors, self.descriptors),
                ("thread", before.threads, self.threads),
                ("child process", before.children, self.children),
            )
            for number, what in sorted(now.items())
            if then.get(number) != what
        ]


def _descriptors() -> dict[int, str]:
    held = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            held[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the one that the listing itself used
            continue
    return held


def _threads() -> dict[int, str]:
    # From the kernel, since a thread started in C is no `threading.Thread`.
    return {int(task.name): _read(task / "comm") for task in Path("/proc/self/task").iterdir()}


def _children() -> dict[int, str]:
    pids = [int(pid) for task in Path("/proc/self/task").iterdir() for pid in _read(task / "children").split()]
    return {pid: _read(Path(f"/proc/{pid}/cmdline")).replace("\0", " ").strip() or "ended" for pid in pids}


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        return ""
