"""What the demo sees of its guest: its RAM, and its serial line."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final, final

import trio

from vmm import hostio
from vmm.cli_demo_processes import DemoFailed


@final
class RamView:
    """A process's view of its guest's RAM, which is read and never written. The guest's first 3 GiB begin at 0."""

    def __init__(self, pid: int) -> None:
        self.fd: Final = hostio.open_input_file(str(_ram_of(pid)))

    @property
    def identity(self) -> tuple[int, int]:
        """Tells one file from every other."""
        found = os.fstat(self.fd)
        return found.st_dev, found.st_ino

    def read(self, address: int, size: int) -> bytes:
        """Return `size` bytes at guest-physical `address`."""
        return os.pread(self.fd, size, address)


def _ram_of(pid: int) -> Path:
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            if str(entry.readlink()).startswith("/memfd:ram"):
                return entry
    raise DemoFailed(reason=f"process {pid} has no memfd named ram")


@final
class SerialLine:
    """The other end of the guest's serial port: one connection, whoever runs the guest."""

    def __init__(self) -> None:
        self.lines: Final[list[str]] = []
        self._cut = False
        self._news = trio.Event()

    async def read(self, stream: trio.SocketStream) -> None:
        """Read until the other end hangs up."""
        rest = ""
        async with stream:
            with suppress(trio.BrokenResourceError):
                async for data in stream:
                    *lines, rest = (rest + data.decode("ascii", "replace")).split("\r\n")
                    self.lines.extend(lines)
                    if lines:
                        self._tell()
        self._cut = True
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def news(self) -> None:
        """Wait for the next line. Raises `DemoFailed` when none can come any more."""
        if self._cut:
            raise DemoFailed(reason="the guest's serial line was cut")
        await self._news.wait()

    def faults(self) -> list[str]:
        """Return what is wrong with the lines: each must be there once, in order, and say ok."""
        expected = ["heartbeat: started", *(f"heartbeat {n} ok" for n in range(1, len(self.lines)))]
        wrong = [(line, want) for line, want in zip(self.lines, expected, strict=True) if line != want]
        return [f"the serial line said {line!r} where {want!r} was due" for line, want in wrong[:1]]
