"""A decision that the host does not let be carried out fails, leaves the machine where it was, and can be repeated."""

from __future__ import annotations

import subprocess
import sys
from typing import Final

import pytest

from tests.phases.machine import PATHS

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
