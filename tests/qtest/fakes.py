"""What stands in for a machine in the tests of lines and sessions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, final

import attrs
import trio

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.errors import VmmError
    from vmm.outside import OutsideAccess

ResultT = TypeVar("ResultT")


@final
@attrs.define(eq=False)
class FakeAccess:
    """A machine that notes what is done to it. Ports read as their number, and memory as the address counts up."""

    done: list[tuple[Any, ...]] = attrs.Factory(list)
    tell: Callable[[int, bool], object] | None = None
    """Of the client that watches."""
    changes: int = 1
    """How often a driven line changes before it has its level."""

    def read_port(self, port: int, size: int) -> int:
        return port & (1 << 8 * size) - 1

    def write_port(self, port: int, size: int, value: int) -> None:
        self.done.append(("out", port, size, value))

    def load(self, address: int, size: int) -> int:
        return address & (1 << 8 * size) - 1

    def store(self, address: int, size: int, value: int) -> None:
        self.done.append(("store", address, size, value))

    def read(self, address: int, size: int) -> bytes:
        return bytes(at & 0xFF for at in range(address, address + size))

    def write(self, address: int, data: bytes) -> None:
        self.done.append(("write", address, data))

    def drive(self, path: str, name: str, number: int, level: bool) -> None:
        self.done.append(("drive", path, name, number, level))
        for _ in range(self.changes):
            if self.tell is not None:
                self.tell(number, level)

    def watch(
        self, path: str, name: str | None, *, inputs: bool, tell: Callable[[int, bool], object]
    ) -> Callable[[], object]:
        self.done.append(("watch", path, name, inputs))
        self.tell = tell

        def stop() -> None:
            self.tell = None

        return stop

    def step_clock(self, ns: int | None) -> int:
        self.done.append(("step", ns))
        return 1000 if ns is None else ns

    def set_clock(self, ns: int) -> int:
        self.done.append(("set", ns))
        return ns


@final
@attrs.define(eq=False)
class FakeLender:
    """Lends the machine at once, or says why not."""

    access: FakeAccess = attrs.Factory(FakeAccess)
    refusal: VmmError | None = None

    async def lend(self, command: str, holder: str, use: Callable[[OutsideAccess], ResultT]) -> ResultT:
        await trio.lowlevel.checkpoint()
        if self.refusal is not None:
            raise self.refusal
        return use(self.access)


@final
@attrs.define(eq=False)
class FakeLog:
    """Keeps what it is given."""

    lines: list[tuple[str, str]] = attrs.Factory(list)

    def note(self, kind: str, line: str) -> None:
        self.lines.append((kind, line))
