"""Waiting for some descriptors and for other threads, all at once.

trio waits for one direction of one descriptor in one task. A chardev has up to three directions and a bell, and must
notice a client that hangs up while its input is not wanted. So each has an epoll set of its own (which trio waits for),
edge triggered:

- an edge is told once, at the next wait, if it came after the last one, and also if it was there when the descriptor
  was added or changed. So whoever tries all it can do before it waits misses nothing.
- a hang-up is an edge whether asked for or not; that of a pty's master is told when its slave is closed, and typing at
  the slave, once it has been opened again, is an edge too. (Level triggered, a hung-up master would keep us busy.)
- an eventfd's edge comes with every write, so it need not be read.
- regular files and /dev/null can't be added (EPERM), but never would block.
- a write to a pipe is an edge for its readers even if the pipe is full and nothing was written (fs/pipe.c,
  `poll_usage`). So where we have a pipe for both directions, the end to be written must not be watched for input.

Source: epoll(7), and Linux drivers/tty/pty.c, fs/eventfd.c.
"""

from __future__ import annotations

import os
import select
import threading
from contextlib import suppress
from typing import Final, final

import trio

from vmm import hostio

_INPUT: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
_HANG_UP: Final = select.EPOLLET
"""It is told whether asked for or not."""


@final
class Watch:
    """Edges of a few descriptors, and a bell. Owns none of the descriptors."""

    def __init__(self) -> None:
        """Open the bell. Raises `HostFileRefused` if no descriptors are left."""
        self._lock: Final = threading.Lock()
        self._bell = hostio.open_eventfd()
        try:
            self._epoll: Final = hostio.open_epoll()
        except BaseException:
            os.close(self._bell)
            raise
        self._epoll.register(self._bell, _INPUT)
        self._masks: Final[dict[int, int]] = {}
        """Of each descriptor, what is watched for besides room."""
        self._waiting_for_room: Final[set[int]] = set()

    def ring(self) -> None:
        """Wake the one that waits, or the next one to. Any thread; nothing happens after `close`."""
        with self._lock:
            if self._bell >= 0:
                os.eventfd_write(self._bell, 1)

    async def wait(self) -> None:
        """Wait for an edge or the bell since the last return, or longer ago. A cancellation loses neither."""
        await trio.lowlevel.wait_readable(self._epoll.fileno())
        self._epoll.poll(0)

    def add(self, fd: int, *, reads: bool = True) -> None:
        """Watch `fd` for hang-up, and if it `reads` for input."""
        self._masks[fd] = _INPUT if reads else _HANG_UP
        with suppress(PermissionError):
            self._epoll.register(fd, self._masks[fd])

    def remove(self, fd: int) -> None:
        """Forget `fd`. Call it before the close: a descriptor that was passed on stays in the set otherwise."""
        self._waiting_for_room.discard(fd)
        self._masks.pop(fd, None)
        with suppress(OSError):
            self._epoll.unregister(fd)

    def wants_room(self, fd: int, wants: bool) -> None:
        """Watch `fd` for room for output, too, or no longer. It must have been added."""
        if wants != (fd in self._waiting_for_room):
            (self._waiting_for_room.add if wants else self._waiting_for_room.remove)(fd)
            with suppress(FileNotFoundError):  # of a kind that can't be watched
                self._epoll.modify(fd, self._masks[fd] | (select.EPOLLOUT if wants else 0))

    def close(self) -> None:
        """Close the bell and the set. Nobody may wait any more."""
        with self._lock:
            bell, self._bell = self._bell, -1
        if bell >= 0:
            self._epoll.close()
            os.close(bell)


def poll(fd: int) -> int:
    """Return the events (`select.POLLIN`, `POLLOUT`, `POLLHUP`, `POLLERR`) that `fd` shows now."""
    poller = select.poll()
    poller.register(fd, select.POLLIN | select.POLLOUT)
    return next((mask for _, mask in poller.poll(0)), 0)
