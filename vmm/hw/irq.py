"""Interrupt lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol, final

if TYPE_CHECKING:
    from collections.abc import Callable


class IrqLine(Protocol):
    """An interrupt line. `set` may be called from any thread, and again with the level that it has."""

    def set(self, level: bool) -> None:
        """Drive the line."""


@final
class GsiLine:
    """Line `gsi` of the interrupt controllers. `drive` is KVM's `Vm.set_irq`."""

    __slots__ = ("_drive", "gsi")

    def __init__(self, gsi: int, drive: Callable[[int, bool], object]) -> None:
        self.gsi: Final = gsi
        self._drive: Final = drive

    def set(self, level: bool) -> None:
        """Drive the line: one ioctl."""
        self._drive(self.gsi, level)


@final
class UnwiredLine:
    """A line that leads nowhere: the device is polled."""

    def set(self, level: bool) -> None:
        """Do nothing."""
