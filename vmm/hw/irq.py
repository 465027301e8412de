"""Interrupt lines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final, Protocol, final

import attrs

from vmm.hw.state import derived, host_only

if TYPE_CHECKING:
    from collections.abc import Callable


class IrqLine(Protocol):
    """An interrupt line. `set` may be called from any thread, and again with the level that it has."""

    def set(self, level: bool) -> None:
        """Drive the line."""


@final
class IrqLines:
    """The lines into the interrupt controllers: `drive`, which is KVM's `Vm.set_irq`, where somebody can look on.

    Lines that the kernel drives by itself (irqfds, the PIT) do not come by here.
    """

    def __init__(self, drive: Callable[[int, bool], object] = lambda gsi, level: None) -> None:
        self._drive: Final = drive
        self._levels: Final[dict[int, bool]] = {}
        self.observer: Callable[[int, bool], object] | None = None
        """Called with each change of a level, on the thread that drives the line, and must not block."""

    def level(self, gsi: int) -> bool:
        """Return the level that line `gsi` was driven to last; low at first."""
        return self._levels.get(gsi, False)

    def high(self) -> int:
        """Return the lines that are high, bit N for line N. Nobody drives one meanwhile."""
        return sum(1 << gsi for gsi, level in self._levels.items() if level)

    def put(self, high: int) -> None:
        """Let the lines have had these levels, as `high` returned them; none of them is driven, and nobody told."""
        self._levels.clear()
        self._levels.update({gsi: True for gsi in range(high.bit_length()) if high >> gsi & 1})

    def set(self, gsi: int, level: bool) -> None:
        """Drive line `gsi`. Any thread."""
        self._drive(gsi, level)
        if level != self._levels.get(gsi, False):
            self._levels[gsi] = level
            if self.observer is not None:
                self.observer(gsi, level)


@final
class GsiLine:
    """Line `gsi` of the interrupt controllers. `drive` is `IrqLines.set`."""

    __slots__ = ("_drive", "gsi")

    def __init__(self, gsi: int, drive: Callable[[int, bool], object]) -> None:
        self.gsi: Final = gsi
        self._drive: Final = drive

    def set(self, level: bool) -> None:
        """Drive the line: with KVM one ioctl."""
        self._drive(self.gsi, level)


@attrs.define(eq=False, repr=False, kw_only=True)
class Interrupts(ABC):
    """The part of a device that has a line: the line is driven where its level changes, and only there."""

    irq: IrqLine = attrs.field(metadata=host_only("wired by the board"))
    _irq_level: bool = attrs.field(metadata=derived("follows from what is pending"), default=False, init=False)

    @abstractmethod
    def _is_pending(self) -> bool:
        """Say whether the device wants to interrupt."""

    def _update_irq(self) -> None:
        level = self._is_pending()
        if level != self._irq_level:
            self._drive_irq(level)

    def _drive_irq(self, level: bool) -> None:
        self._irq_level = level
        self.irq.set(level)
