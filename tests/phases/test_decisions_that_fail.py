"""A decision that the host does not let be carried out fails, leaves the machine where it was, and can be repeated."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

import pytest

import vmm
from tests.phases.machine import PATHS, SIZE
from tests.phases.test_objects import refusal

if TYPE_CHECKING:
    from pathlib import Path

    from vmm.embedding import EmbeddedMachine

pytestmark = pytest.mark.usefixtures("no_leaks")

ACCELERATORS: Final = [pytest.param("kvm", marks=pytest.mark.kvm), "qtest"]

TOO_MUCH: Final = """
import os, resource, sys, trio, vmm
from vmm.errors import VmmError

async def main(accel):
    async with vmm.machine([{"execute": "machine-set", "arguments": {"memory": {"size": 64 << 30}}}]) as machine:
        before = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.RLIM_INFINITY))
        for _ in range(3):
            try:
                await machine.execute("accel-set", accel=accel)
            except VmmError as error:
                print(error)
            print(machine.path, len(os.listdir("/proc/self/fd")) - before, len(machine.recipe.steps))
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        await machine.execute("accel-set", accel=accel)
        print(machine.path)
        await machine.execute("cpu-model-set")
        print(machine.path)

trio.run(main, sys.argv[1])
"""


@pytest.mark.parametrize("accel", ACCELERATORS)
def test_accel_set_can_be_repeated_when_there_was_no_room_for_the_ram(accel: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", TOO_MUCH, accel], capture_output=True, text=True, timeout=120, check=False
    )
    error = f"mmap failed for {64 << 30} bytes of guest RAM: Cannot allocate memory (errno 12)"
    failed = f"{error}\n{PATHS['accel'][1]} 0 1\n"
    assert (ran.stdout, ran.stderr) == (f"{failed * 3}{PATHS['preconfig'][1]}\n{PATHS['devices'][1]}\n", "")


def kernel(path: Path) -> dict[str, Any]:
    """Write a flat binary; return a `machine-set` with it."""
    path.write_bytes(b"\xf4" * 8192)
    return {"kernel": f"flat:{path}", "memory": {"size": SIZE}}


async def built(machine: EmbeddedMachine, accel: str, path: Path, *more: str) -> None:
    """Make a machine whose kernel has lost its end since."""
    await machine.execute("machine-set", **kernel(path))
    await machine.execute("accel-set", accel=accel)
    for command in more:
        await machine.execute(command)
    os.truncate(path, 4096)


@pytest.mark.parametrize("accel", ACCELERATORS)
@pytest.mark.parametrize("phase", ["preconfig", "devices"])
async def test_a_kernel_that_has_changed_leaves_the_machine_in_devices(accel: str, phase: str, tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    text = f"Cannot load {path}: it ends 4096 bytes early; it has changed since it was opened"
    async with vmm.machine() as machine:
        await built(machine, accel, path, *(["cpu-model-set"] if phase == "devices" else []))
        for command in ("cont", "cont", "finish-machine-init"):
            assert await refusal(machine, command) == text
            assert machine.path == PATHS["devices"][1]
        os.truncate(path, 8192)
        await machine.execute("cont")
        assert machine.path == PATHS["running"][1]
        await machine.execute("stop")
