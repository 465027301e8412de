"""Machines of this process whose RAM has a back end, and a third party that looks at its lock."""

from __future__ import annotations

import fcntl
import os
import struct
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import vmm
from tests.phases.copy_kit import SIZE, commands, outcome, ticked
from tests.phases.update_kit import channels

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from vmm.embedding import EmbeddedMachine

_FLOCK: Final = struct.Struct("hhqqi4x")
"""struct flock of x86-64. Source: fcntl(2)."""


def memfd(name: str = "m0", size: int = SIZE, **more: Any) -> dict[str, Any]:
    """Return the arguments of `object-add` for RAM of a memfd."""
    return {"qom-type": "memory-backend-memfd", "id": name, "size": size, **more}


def in_file(path: Path, name: str = "m0", size: int = SIZE, **more: Any) -> dict[str, Any]:
    """Return the same for RAM in a file."""
    arguments = {"qom-type": "memory-backend-file", "id": name, "size": size, "mem-path": str(path), "share": True}
    return arguments | more


def recipe(backend: dict[str, Any], *, upto: str = "cont", **options: Any) -> list[dict[str, Any]]:
    """Return the recipe of a machine whose RAM is of `backend`, as far as command `upto`."""
    options.setdefault("size", backend["size"])
    made = {"execute": "object-add", "arguments": backend}
    return [made, *commands(upto=upto, **{"memory-backend": backend["id"], **options})]


@asynccontextmanager
async def with_ram(backend: dict[str, Any], *, ticks: int = 5, **options: Any) -> AsyncGenerator[EmbeddedMachine, None]:
    """Run a machine whose RAM is of `backend`, and whose guest has ticked."""
    async with vmm.machine(recipe(backend, **options)) as machine:
        await ticked(machine, ticks)
        yield machine


async def update(source: EmbeddedMachine, destination: EmbeddedMachine, folder: Path) -> dict[str, Any]:
    """Hand the guest over; return what the source says at the end."""
    where = channels(str(folder / "main"), str(folder / "cpr"))
    await destination.execute("migrate-incoming", channels=where)
    await source.execute("migrate", channels=where, parameters={"mode": "cpr-transfer"})
    return await outcome(source)


def try_lock(path: Path) -> bool:
    """Try to lock a file as another machine would; say whether that was possible. Nothing stays locked."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def lock_of(path: Path) -> tuple[int, int, int] | None:
    """Return type, start and length of the lock that keeps others from a file; None if there is none."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    finally:
        os.close(fd)
    kind, _, start, length, _ = _FLOCK.unpack(found)
    return None if kind == fcntl.F_UNLCK else (kind, start, length)


def locks_on(path: Path) -> int:
    """Return how many locks the kernel has on a file."""
    found = os.stat(path)
    wanted = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    with open("/proc/locks") as file:
        return sum(wanted in line.split() for line in file)
