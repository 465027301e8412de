"""What a device is to the rest of the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import threading


class Addressable(Protocol):
    """What a bus needs of whoever answers at guest addresses.

    `read` and `write` are called on vCPU threads, one call at a time, with `lock` held by the bus. They must neither
    block nor await: slow work goes to a task, through a doorbell. An exception is a bug; it ends the vCPU's thread.
    """

    @property
    def name(self) -> str:
        """Name, unique in the machine; that of the state section too."""

    @property
    def addresses(self) -> tuple[range, ...]:
        """Guest addresses, ascending. Offsets count from the first address of the first range."""

    @property
    def widest(self) -> int:
        """Size of the widest access in bytes: 1, 2, 4 or 8. The bus cuts up what is wider."""

    @property
    def lock(self) -> threading.Lock:
        """Held during `read` and `write`. Every other method that touches the same state takes it by itself."""

    def read(self, offset: int, size: int) -> int:
        """Answer a guest load of `size` bytes (a power of two up to `widest`), unsigned."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Carry out a guest store of `size` bytes (a power of two up to `widest`), unsigned."""


class Device(Addressable, Protocol):
    """A device with declared state.

    `state` is an attrs class with a `SCHEMA` (see `vmm.hw.state`). To load, assign it and call `after_load`. All three
    are for the loop, while no vCPU runs.
    """

    state: Any

    def reset(self) -> None:
        """Go to the power-on state, and drive the interrupt line accordingly."""

    def after_load(self) -> None:
        """Recompute what follows from `state`, and drive the interrupt line. May be called again: changes nothing."""
