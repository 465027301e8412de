"""From a vCPU thread, or the kernel, to a task."""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final, final

import trio

from vmm import hostio

if TYPE_CHECKING:
    from collections.abc import Generator


@final
class Doorbell:
    """An eventfd with one listener. `ring` may be called from any thread; the kernel may ring `fd` itself.

    Rings coalesce: a listener that was away hears once. Whoever rings publishes the work first; whoever was woken
    looks for work after `wait_rung` has returned.

    A ring that finds another one unanswered makes no system call. That loses none: `_rung` is set before the eventfd
    is written and cleared only after it was read, so if it is set, either the eventfd is readable or about to be, or
    the listener has read it and not yet returned, and looks for work after that. In the other direction the two may
    disagree (readable and not set), which costs a needless wake-up.
    """

    def __init__(self, fd: int) -> None:
        self.fd: Final = fd
        self._rung = False

    def ring(self) -> None:
        """Wake the listener, now or at its next `wait_rung`. Does not block."""
        if not self._rung:
            self._rung = True
            os.eventfd_write(self.fd, 1)

    async def wait_rung(self) -> None:
        """Wait for a ring since the last return. A checkpoint in every case. A cancellation loses no ring.

        Raises:
            trio.ClosedResourceError: the doorbell was closed.
        """
        await trio.lowlevel.wait_readable(self.fd)
        with suppress(BlockingIOError):  # whoever else can read the descriptor may have been quicker
            os.eventfd_read(self.fd)
        self._rung = False

    def close(self) -> None:
        """Wake the listener with `ClosedResourceError` and close the eventfd. Later rings are nothing.

        Not while another thread is in `ring`: the descriptor's number may be another file's by then.
        """
        self._rung = True
        trio.lowlevel.notify_closing(self.fd)
        os.close(self.fd)


def make_doorbell() -> Doorbell:
    """Make an eventfd, which the caller closes. Raises `HostFileRefused` if the host has no descriptor left."""
    return Doorbell(hostio.open_eventfd())


@contextmanager
def open_doorbell() -> Generator[Doorbell, None, None]:
    """Make a doorbell and close it at the end. Raises as `make_doorbell`."""
    bell = make_doorbell()
    try:
        yield bell
    finally:
        bell.close()
