"""What stands in KVM's place where there is none: a virtual machine with interrupt lines and eventfds, and no vCPU.

It offers what the board asks of `vmm.kvm.vm.Vm`. The kernel's part in eventfds is done here: a store that an ioeventfd
is assigned to rings it and reaches no device; a written irqfd becomes a pulse of its line. There is no handler of
interrupts, so each counts as acknowledged at once.
"""

from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING, Final, final

import attrs
import trio

from vmm import hostio

if TYPE_CHECKING:
    from vmm.hw.irq import IrqLines


@final
@attrs.frozen
class _Bell:
    """Which stores ring an eventfd. `size` 0 is any size, `value` None any value."""

    port: bool
    address: int
    size: int
    value: int | None

    def hears(self, port: bool, address: int, size: int, value: int) -> bool:
        return (self.port, self.address) == (port, address) and self.size in (0, size) and self.value in (None, value)


@final
@attrs.frozen
class _Line:
    gsi: int
    resample_fd: int | None


@final
class QtestVm:
    """A virtual machine without KVM. On the loop; eventfds may be written by any thread."""

    def __init__(self, lines: IrqLines) -> None:
        self._lines: Final = lines
        self._bells: Final[dict[_Bell, int]] = {}
        self._irqfds: Final[dict[int, _Line]] = {}
        self._irqfds_held = False
        self._poll: Final = hostio.open_epoll()

    rings: Final = None
    """No vCPU writes anything."""

    def set_memory_slot(self, slot: int, address: int, hva: int, size: int, *, log_dirty: bool = False) -> None:
        """Do nothing: whoever reads or writes RAM here goes through `GuestMemory`."""

    def protect_by_hand(self) -> int:
        """Say that there is nothing to protect."""
        return 0

    def read_dirty_log(self, slot: int, bitmap: object) -> None:
        """Leave it as it is: no guest writes anything."""

    def clear_dirty_log(self, slot: int, first: int, pages: int, bitmap: object) -> None:
        """Do nothing."""

    def assign_irqfd(self, fd: int, gsi: int, *, resample_fd: int | None = None) -> None:
        """From now on line `gsi` is pulsed when eventfd `fd` is written; then `resample_fd` is written, if given."""
        self._irqfds[fd] = _Line(gsi, resample_fd)
        if not self._irqfds_held:
            self._poll.register(fd, select.EPOLLIN)

    def deassign_irqfd(self, fd: int, gsi: int) -> None:
        """Undo `assign_irqfd`."""
        assert self._irqfds.pop(fd).gsi == gsi, "deassigned with other arguments than assigned"
        if not self._irqfds_held:
            self._poll.unregister(fd)

    def hold_irqfds(self) -> None:
        """Pulse the lines of those that were written, and from now on none. What is written then waits."""
        if not self._irqfds_held:
            self._pulse()
            self._irqfds_held = True
            for fd in self._irqfds:
                self._poll.unregister(fd)

    def release_irqfds(self) -> None:
        """Undo `hold_irqfds`, with what was written meanwhile. Without effect where they are not held."""
        if self._irqfds_held:
            self._irqfds_held = False
            for fd in self._irqfds:
                self._poll.register(fd, select.EPOLLIN)

    def assign_ioeventfd(
        self, fd: int, address: int, size: int, *, port: bool = False, value: int | None = None
    ) -> None:
        """From now on a store of `size` bytes at `address` writes eventfd `fd`; see `Vm.assign_ioeventfd`."""
        self._bells[_Bell(port, address, size, value)] = fd

    def deassign_ioeventfd(
        self, fd: int, address: int, size: int, *, port: bool = False, value: int | None = None
    ) -> None:
        """Undo `assign_ioeventfd`, which must have had the same arguments."""
        assert self._bells.pop(_Bell(port, address, size, value)) == fd

    def ring(self, address: int, size: int, value: int, *, port: bool) -> bool:
        """Write the eventfds that hear this store; say whether there was one: then the store is done."""
        heard = [fd for bell, fd in self._bells.items() if bell.hears(port, address, size, value)]
        for fd in heard:
            os.eventfd_write(fd, 1)
        return bool(heard)

    async def serve(self) -> None:
        """Turn written irqfds into interrupts, until cancelled; all eventfds are their makers' to close."""
        with self._poll as poll:
            while True:
                await trio.lowlevel.wait_readable(poll.fileno())
                self._pulse()

    def _pulse(self) -> None:
        for fd, _ in self._poll.poll(0):
            os.eventfd_read(fd)
            line = self._irqfds[fd]
            self._lines.set(line.gsi, True)
            self._lines.set(line.gsi, False)
            if line.resample_fd is not None:
                os.eventfd_write(line.resample_fd, 1)
