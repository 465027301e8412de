"""Moving bulk over a descriptor from a thread, so that the loop answers meanwhile.

A thread works in bounded pieces and waits for the peer with `poll`; a cancellation on the loop rings a bell that every
such wait listens to, and that is looked at between pieces. So a cancelled transfer ends within one piece.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
from typing import TYPE_CHECKING, Final, Self, TypeVar, final

import trio

from vmm.errors import HostFileRefused, VmmError
from vmm.hw.doorbell import open_doorbell
from vmm.kvm._pages import lib
from vmm.migration.silence import SILENT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmm.hw.doorbell import Doorbell

ResultT = TypeVar("ResultT")

ENDED: Final[int] = lib.TV_ENDED
"""What a step of `Bulk.read_by` returns where nothing comes any more."""

_IOV_MAX: Final = 1024  # pieces of one writev; Source: sysconf(3)
_BROKEN: Final = (errno.EPIPE, errno.ECONNRESET, errno.ECONNABORTED, *SILENT)


class ChannelBroken(Exception):
    """The peer is gone, or has said something while it should listen. For the caller, who knows what that means."""


class Stopped(Exception):
    """The bell has rung."""


@final
class Bulk:
    """A descriptor, read and written by one thread that can be stopped. The descriptor stays the caller's.

    Args:
        fd: a socket that does not block, or a file.
        peer: whether somebody is at its other end, who may speak.
    """

    def __init__(self, fd: int, *, peer: bool) -> None:
        self.fd: Final = fd
        self._bell: Doorbell | None = None
        self._peer = peer
        self.bytes = 0
        """Read or written so far, and what is kept to be written."""
        self._held: bytearray | None = None

    def hold(self) -> None:
        """Keep a copy of what is written from now on, in place of writing it. For little of it, and `write` alone."""
        self._held = bytearray()

    @property
    def holds(self) -> bool:
        """Whether what is written is kept."""
        return self._held is not None

    @property
    def held(self) -> int:
        """Bytes that are kept."""
        return 0 if self._held is None else len(self._held)

    def push(self) -> None:
        """Write what is kept, as far as there is room for it at once, and keep the rest. Does not wait, never raises.

        Whoever writes the rest learns what is wrong, if anything is.
        """
        assert self._held is not None
        with contextlib.suppress(OSError):
            del self._held[: os.write(self.fd, self._held)]

    def release(self) -> bytearray:
        """Do as `push`, keep no more, and return the rest."""
        assert self._held is not None
        self.push()
        rest, self._held = self._held, None
        self.bytes -= len(rest)  # which is counted once it is written
        return rest

    def heed(self, bell: Doorbell) -> Self:
        """Stop where `bell` rings, from now on; return itself."""
        self._bell = bell
        return self

    def write(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Write all of `buffers`.

        Raises:
            ChannelBroken: the peer is gone, or has said something: it refused.
            HostFileRefused: a file could not be written.
        """
        if self._held is not None:
            for buffer in buffers:
                self._held += buffer
                self.bytes += len(buffer)
            return
        left = [memoryview(buffer) for buffer in buffers if len(buffer)]
        while left:
            self._look(select.POLLIN if self._peer else 0)
            try:
                count = os.writev(self.fd, left[:_IOV_MAX])
            except BlockingIOError:
                self._wait(select.POLLOUT)
                continue
            except OSError as error:
                raise self.failure("write", error) from error
            self.bytes += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if count:
                left[0] = left[0][count:]

    def read_into(self, buffer: memoryview) -> int:
        """Read what there is, waiting for the first byte; return how many bytes, 0 at the end.

        Raises:
            ChannelBroken: the peer is gone.
            HostFileRefused: a file could not be read.
        """
        while True:
            self._look(0)
            try:
                count = os.readv(self.fd, [buffer])
            except BlockingIOError:
                self._wait(select.POLLIN)
                continue
            except OSError as error:
                raise self.failure("read", error) from error
            self.bytes += count
            return count

    def read_here(self, buffer: memoryview) -> int | None:
        """Read what there is, without waiting; return how many bytes, 0 at the end, None if there is nothing yet.

        For the loop. Raises as `read_into`.
        """
        try:
            count = os.readv(self.fd, [buffer])
        except BlockingIOError:
            return None
        except OSError as error:
            raise self.failure("read", error) from error
        self.bytes += count
        return count

    def write_by(self, step: Callable[[], int]) -> None:
        """Call `step` until it has written all: it returns 1 then, 0 where there is no room, or minus an errno.

        Raises as `write` does. What it writes is the caller's to add to `bytes`.
        """
        self._look(select.POLLIN if self._peer else 0)
        self._move_by(step, select.POLLOUT, "write")

    def read_by(self, step: Callable[[], int]) -> int:
        """Call `step` until it has read all: it returns 1 then, 0 where nothing has come, `ENDED`, or minus an errno.

        Return 1 or `ENDED`. Raises as `read_into` does.
        """
        self._look(0)
        return self._move_by(step, select.POLLIN, "read")

    def read_here_by(self, step: Callable[[], int]) -> int:
        """Call `step` once, and return what it does. For the loop. Raises as `read_into` does."""
        return self._checked(step(), "read")

    def wait_for(self, events: int) -> None:
        """Wait until one of `events`, of poll(2), is there. In a thread that may be stopped."""
        self._poll(events, None, 0)

    def wait(self, seconds: float) -> None:
        """Wait, unless the bell rings or the peer speaks. Raises as `write` does."""
        self._poll(select.POLLIN if self._peer else 0, round(seconds * 1000), select.POLLIN if self._peer else 0)

    def _move_by(self, step: Callable[[], int], event: int, action: str) -> int:
        while (result := self._checked(step(), action)) == 0:
            self._wait(event)
        return result

    def _checked(self, result: int, action: str) -> int:
        if result < 0 and result != ENDED:
            error = OSError(-result, os.strerror(-result))
            raise self.failure(action, error) from error
        return result

    def failure(self, action: str, error: OSError) -> Exception:
        """Return what is to be raised for `error` of the descriptor."""
        if self._peer and error.errno in _BROKEN:
            return ChannelBroken(os.strerror(error.errno or 0))
        return HostFileRefused(action=action, path=_path_of(self.fd), reason=os.strerror(error.errno or 0))

    def _look(self, unwanted: int) -> None:
        """Raise if the bell has rung, or the peer has done what is `unwanted`. Does not wait."""
        self._poll(unwanted, 0, unwanted)

    def _wait(self, event: int) -> None:
        self._poll(event | (select.POLLIN if self._peer else 0), None, select.POLLIN & ~event if self._peer else 0)

    def _poll(self, events: int, timeout: int | None, unwanted: int) -> None:
        bell = self._bell
        assert bell is not None, "heed() comes first"
        poll = select.poll()
        poll.register(bell.fd, select.POLLIN)
        if events:
            poll.register(self.fd, events)
        for fd, found in poll.poll(timeout):
            if fd == bell.fd:
                raise Stopped
            if found & unwanted:
                raise ChannelBroken("it spoke first")


async def in_thread(work: Callable[[Doorbell], ResultT], limiter: trio.CapacityLimiter | None = None) -> ResultT:
    """Run `work` in a thread and return its result; its `Bulk` heeds the bell that it is given.

    A cancellation stops it at its next piece, and is raised once it has ended.

    Args:
        limiter: of how many threads this is one; by default those of short jobs.
    """
    results: list[ResultT] = []
    failures: list[VmmError | ChannelBroken] = []
    with open_doorbell() as bell:

        def run() -> None:
            try:
                results.append(work(bell))
            except Stopped:
                return
            except (VmmError, ChannelBroken) as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(_ring_at_cancel, bell)
            await trio.to_thread.run_sync(run, limiter=limiter)
            nursery.cancel_scope.cancel()
    if failures:
        raise failures[0]
    if not results:
        await trio.lowlevel.checkpoint_if_cancelled()
    return results[0]


async def _ring_at_cancel(bell: Doorbell) -> None:
    try:
        await trio.sleep_forever()
    finally:
        bell.ring()


def _path_of(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")
