"""The source of a guest that runs at its destination already: pages that it waits for, and all others meanwhile."""

from __future__ import annotations

import os
import select
import socket
import time
from collections import deque
from typing import TYPE_CHECKING, Final, final

import attrs

from vmm.errors import MigrationRefused, StreamCorrupt
from vmm.kvm._pages import ffi, lib
from vmm.kvm.page_file import PAGE_SIZE, checksum
from vmm.migration.page_frames import FRAME_SIZE, MOST_PAGES, Frame, FrameKind
from vmm.migration.pump import Stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmm.kvm.memory import GuestMemory
    from vmm.kvm.page_map import PageMap
    from vmm.migration.status import MigrationRamStats

_AHEAD: Final = 8
"""Pages that are sent with one that was asked for, at most: who waits in order finds them there."""
_REASON: Final = 4096
"""Bytes of a reason that are read."""
_SAID: Final = (FrameKind.NEED, FrameKind.GOT, FrameKind.BEGIN, FrameKind.LOADED, FrameKind.REFUSED)
_LOOK: Final = 0.05
"""Seconds between two looks at a limit that holds this up: it may be changed."""
_BURST: Final = 1 << 16
"""Bytes by which a limited rate may be exceeded."""


class LinkBroken(Exception):
    """A connection is gone, or what came over it is damaged. `str` of it says how."""


@final
class PageServer:
    """Sends the pages of a guest that has gone. For a thread; begun again after a break, with other sockets."""

    def __init__(self, memory: GuestMemory, todo: PageMap, limit: Callable[[], int]) -> None:
        """Send the pages in `todo`, which are taken out of it.

        Args:
            limit: bytes a second for what nobody waits for; 0 is no limit.
        """
        self._memory: Final = memory
        self.todo = todo
        self._limit: Final = limit
        self._begun = True  # whether pages can be taken in there
        self._loaded: Callable[[], object] | None = None
        self._at = 0  # page after the one that was sent last
        self.requests = 0
        self.data_pages = 0
        self.zero_pages = 0
        self.bytes = 0
        """That were sent so far."""

    def statistics(self, before: MigrationRamStats) -> MigrationRamStats:
        """Return what `query-migrate` shows, with what was sent while the guest ran at the source."""
        return attrs.evolve(
            before,
            transferred=before.transferred + self.bytes,
            postcopy_bytes=self.bytes,
            postcopy_requests=self.requests,
            remaining=len(self.todo) * PAGE_SIZE,
            normal=before.normal + self.data_pages,
            normal_bytes=before.normal_bytes + self.data_pages * PAGE_SIZE,
            duplicate=before.duplicate + self.zero_pages,
        )

    def run(self, link: int, urgent: int | None, bell: int, loaded: Callable[[], object] | None = None) -> None:
        """Return once the destination has all pages; with `loaded`, once the guest is the destination's.

        Args:
            link: a connected socket. What is asked for comes over it.
            urgent: another one, for what was asked for; None: the same.
            bell: an eventfd that ends this.
            loaded: the destination has only got the stream. Called once the state is in force there; if it returns,
                the guest is told to be the destination's.

        Raises:
            LinkBroken, Stopped: it can be begun anew.
            MigrationRefused: the destination does not take the guest.
        """
        self._begun = loaded is None
        self._loaded = loaded
        with socket.socket(fileno=os.dup(link)) as main:
            rush = main if urgent is None else socket.socket(fileno=os.dup(urgent))
            try:
                self._run(main, rush, bell, loaded)
            except (BrokenPipeError, ConnectionResetError) as error:
                raise LinkBroken("the destination closed the connection") from error
            except OSError as error:
                raise LinkBroken(os.strerror(error.errno or 0)) from error
            except StreamCorrupt as error:
                raise LinkBroken(error.reason) from error
            finally:
                rush.close()

    def _run(self, main: socket.socket, rush: socket.socket, bell: int, loaded: Callable[[], object] | None) -> None:
        incoming = _Incoming(main)
        asked: deque[int] = deque()
        begun, sent = time.monotonic(), 0
        told = False
        while True:
            ahead = 0.0
            if not asked:
                limit = self._limit()
                ahead = (sent - _BURST) / limit - (time.monotonic() - begun) if limit else 0.0
                # That all was sent is said to a destination that has the guest: it is over there then.
                idle = told or not self._begun or self._awaits
                _wait(main, select.POLLIN, bell, None if idle else min(max(ahead, 0.0), _LOOK))
            for frame in incoming.frames():
                if self._has_heard(frame, main, bell):
                    if loaded is not None and self._loaded is None:
                        return
                    continue
                if frame.kind is FrameKind.GOT:
                    if not told:
                        raise StreamCorrupt(reason="the destination has all pages before they were sent")
                    return
                if frame.page >= self.todo.pages:
                    raise StreamCorrupt(reason=f"the destination waits for page {frame.page} of {self.todo.pages}")
                if frame.pages != 1:
                    raise StreamCorrupt(reason=f"the destination waits for {frame.pages} pages in a frame, expected 1")
                asked.append(frame.page)
            if asked:
                page = asked.popleft()
                self.requests += 1
                # One that has gone already is on its way.
                if page in self.todo:
                    self._send(rush, bell, page, page + _AHEAD)
            elif ahead > 0 or not self._begun or self._awaits:
                continue
            elif not told:
                first = self._next()
                if first is None:
                    _send_all(main, [Frame(FrameKind.SENT).encode()], bell)
                    told = True
                else:
                    sent += self._send(main, bell, first, first + MOST_PAGES)

    @property
    def _awaits(self) -> bool:
        """Whether nothing is left to send, and the guest is not the destination's yet."""
        return self._loaded is not None and not len(self.todo)

    def _has_heard(self, frame: Frame, main: socket.socket, bell: int) -> bool:
        """Go by what is said of the guest; return whether it was that."""
        if frame.kind is FrameKind.BEGIN:
            self._begun = True
        elif frame.kind is FrameKind.LOADED:
            if self._loaded is None or not self._begun:
                raise StreamCorrupt(reason="the destination has loaded what it was not sent, or twice")
            self._loaded()
            self._loaded = None
            _send_all(main, [Frame(FrameKind.YOURS).encode()], bell)
        elif frame.kind is FrameKind.REFUSED and self._loaded is not None:
            text = receive_exactly(main, min(frame.pages, _REASON), bell).decode(errors="replace")
            raise MigrationRefused(reason=f"Refused by the destination: {text}")
        else:
            return False
        return True

    def _next(self) -> int | None:
        """Return the page to go on with: after the one that was sent last, whoever wanted that."""
        pages = self.todo.pages
        first = self.todo.first(self._at)
        if first >= pages:
            first = self.todo.first(0)
        return first if first < pages else None

    def _send(self, sock: socket.socket, bell: int, first: int, end: int) -> int:
        """Send the page `first`, and those after it that are in `todo`, in one frame; return the bytes."""
        count = 0
        while first + count < end and first + count in self.todo:
            count += 1
        sums, zeros = ffi.new("uint32_t[]", count), ffi.new("uint64_t[]", -(-count // 64))
        lib.tv_checksum_pages(self._memory.hva(first * PAGE_SIZE), count, sums, zeros)
        zero = [bool(zeros[index // 64] >> index % 64 & 1) for index in range(count)]
        run = next((index for index in range(count) if zero[index] != zero[0]), count)
        if zero[0]:
            pieces: list[bytes | memoryview] = [Frame(FrameKind.ZEROS, first, run).encode()]
            self.zero_pages += run
        else:
            table = ffi.buffer(sums, 4 * run)[:]
            content = memoryview(ffi.buffer(ffi.cast("char *", self._memory.hva(first * PAGE_SIZE)), run * PAGE_SIZE))  # type: ignore[arg-type]
            pieces = [Frame(FrameKind.PAGES, first, run, checksum(table)).encode(), table, content]
            self.data_pages += run
        size = _send_all(sock, pieces, bell)
        self.bytes += size
        # Only now: what was cut off in the middle is sent again.
        self.todo.discard(first, run)
        self._at = first + run
        return size


@final
class _Incoming:
    """Frames of the destination, as they come."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock: Final = sock
        self._data = b""

    def frames(self) -> list[Frame]:
        """Return those that are complete. Does not wait."""
        try:
            # One at a time: what is refused is followed by a text, which is not for here.
            data = self._sock.recv(FRAME_SIZE - len(self._data), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        if not data:
            raise LinkBroken("the destination closed the connection")
        self._data += data
        if len(self._data) < FRAME_SIZE:
            return []
        data, self._data = self._data, b""
        return [Frame.decode(data, *_SAID)]


def _send_all(sock: socket.socket, pieces: Sequence[bytes | memoryview], bell: int) -> int:
    left = [memoryview(piece).cast("B") for piece in pieces]
    size = sum(map(len, left))
    while left:
        try:
            count = sock.sendmsg(left, [], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            _wait(sock, select.POLLOUT, bell, None)
            continue
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if count:
            left[0] = left[0][count:]
    return size


def receive_exactly(sock: socket.socket, size: int, bell: int) -> bytes:
    """Read so many bytes. Raises `LinkBroken`, `Stopped`."""
    found = b""
    while len(found) < size:
        try:
            data = sock.recv(size - len(found), socket.MSG_DONTWAIT)
        except BlockingIOError:
            _wait(sock, select.POLLIN, bell, None)
            continue
        except OSError as error:
            raise LinkBroken(os.strerror(error.errno or 0)) from error
        if not data:
            raise LinkBroken("the other side closed the connection")
        found += data
    return found


def _wait(sock: socket.socket, event: int, bell: int, seconds: float | None) -> None:
    """Wait until something can be done, at most so long. Raises `Stopped`."""
    poll = select.poll()
    poll.register(sock, event)
    poll.register(bell, select.POLLIN)
    for fd, _ in poll.poll(None if seconds is None else seconds * 1000):
        if fd == bell:
            raise Stopped
