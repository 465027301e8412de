"""What machine the figures are from."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

import attrs

from bench.machines import BenchFailed


@final
@attrs.frozen
class Placements:
    """Where processes are put: on all CPUs that this one may use, or on one of them."""

    all: set[int]
    one: int

    @classmethod
    def here(cls) -> Placements:
        """Choose the last CPU, since interrupts tend to go to the first."""
        cpus = os.sched_getaffinity(0)
        return cls(cpus, max(cpus))


def describe(qemu: str | None) -> dict[str, Any]:
    """Describe the machine, as JSON."""
    found = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True).stdout if qemu else None
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": _field("/proc/cpuinfo", "model name"),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_mib": int(_field("/proc/meminfo", "MemTotal").split()[0]) // 1024,
        "kernel": platform.release(),
        "kvm": _kvm_kind(),
        "python": platform.python_version(),
        "trio": version("trio"),
        "qemu": found.splitlines()[0].removeprefix("QEMU emulator version ") if found else None,
        "load_before": os.getloadavg()[0],
    }


def available_mib() -> int:
    """Return how much memory can be taken without swapping."""
    return int(_field("/proc/meminfo", "MemAvailable").split()[0]) // 1024


def _kvm_kind() -> str:
    """Name what executes guests: the kernel's module, or built-in part, by the processor's extension."""
    modules = sorted(path.name for path in Path("/sys/module").glob("kvm_*"))
    if modules:
        return modules[0]
    flags = _field("/proc/cpuinfo", "flags").split()
    for flag, kind in (("vmx", "kvm_intel, built in"), ("svm", "kvm_amd, built in")):
        if flag in flags:
            return kind
    return "software, the processor shows neither VMX nor SVM"


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    raise BenchFailed(f"{path} does not say {name!r}")
