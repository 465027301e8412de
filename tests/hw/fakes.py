"""What stands in for the board and the back ends in the tests of devices."""

from __future__ import annotations

import attrs


@attrs.define(eq=False)
class FakeLine:
    """An interrupt line that remembers how it was driven."""

    levels: list[bool] = attrs.Factory(list)

    def set(self, level: bool) -> None:
        self.levels.append(level)

    def is_up(self) -> bool:
        return bool(self.levels and self.levels[-1])

    @property
    def edges(self) -> int:
        """How often the line has risen."""
        return sum(new and not old for old, new in zip([False, *self.levels], self.levels, strict=False))


@attrs.define(eq=False)
class FakeSink:
    """A back end that takes bytes while it has room."""

    free: int = 1 << 30
    data: bytearray = attrs.Factory(bytearray)

    def put(self, data: bytes) -> int:
        taken = data[: self.free]
        self.free -= len(taken)
        self.data += taken
        return len(taken)


@attrs.define(eq=False)
class FakeClock:
    """A host's clock that stands still until it is moved. Nanoseconds of Unix time."""

    ns: int = 1_700_000_000 * 1_000_000_000  # 2023-11-14 22:13:20, a Tuesday

    def __call__(self) -> int:
        return self.ns

    def pass_seconds(self, seconds: float) -> None:
        self.ns += int(seconds * 1_000_000_000)


@attrs.define(eq=False)
class Calls:
    """A callback that counts, and remembers its arguments."""

    arguments: list[tuple[object, ...]] = attrs.Factory(list)

    def __call__(self, *arguments: object) -> None:
        self.arguments.append(arguments)

    @property
    def count(self) -> int:
        return len(self.arguments)
