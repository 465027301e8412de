"""Precopy: pass after pass over the guest's RAM while it runs, until what is left goes within the guest's pause."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, Protocol, final

from vmm.kvm.memory import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from vmm.migration.page_chunks import PageSink
    from vmm.migration.pump import Bulk
    from vmm.migration.ram import RamSender
    from vmm.migration.stream import StreamWriter

AT_ONCE: Final = 64
"""Pages that take no time to speak of: they are sent, and taken in, on the loop."""
_FEW: Final = AT_ONCE * PAGE_SIZE
_NEXT_TO_NOTHING: Final = 8
"""Pages whose pass would take longer than they do in the guest's pause."""
_BURST: Final = 0.05
"""Seconds by which a limited rate may be exceeded, and afterwards has to be waited for."""
_LOOK: Final = 0.1
"""Seconds after which a wait for a limited rate looks whether that is another one now."""
_MEASURED: Final = 4 << 20
"""Bytes that must have gone for their bandwidth to be believed, in as many passes as that takes."""


class Watcher(Protocol):
    """Hears how it goes. Called in the thread."""

    def passed(self, number: int) -> None:
        """Pass `number` begins."""

    def expects(self, downtime: float) -> None:
        """What is left would take a pause of `downtime` ms."""

    def after_pass(self, sent: int, dirtied: int, seconds: float) -> None:
        """A pass of `sent` bytes has taken `seconds`, and `dirtied` bytes have been written meanwhile."""

    @property
    def hurries(self) -> bool:
        """Whether the passes are to end now, whatever is left."""


@final
class Precopy:
    """The passes of one migration, run in a thread.

    Args:
        parameters: QEMU's migration parameters, read again and again: they may be changed meanwhile.
    """

    def __init__(self, ram: RamSender, parameters: Mapping[str, Any], watcher: Watcher) -> None:
        self.ram: Final = ram
        self._parameters: Final = parameters
        self._watcher: Final = watcher
        self._bandwidth: float | None = None  # bytes a second
        self._sent, self._seconds = 0, 0.0  # since that was found
        self._had = ram.memory.size  # bytes that the present pass has

    def run(self, writer: StreamWriter, bulk: Bulk, sink: PageSink) -> None:
        """Return once what is left goes within the downtime limit, by what was measured; it is in `ram.todo` then.

        Raises:
            ChannelBroken, HostFileRefused: it cannot go there.
            KvmCallFailed: what the guest writes cannot be known.
        """
        self.ram.begin()
        writer.ram_extents(self.ram.extents, in_stream=True)
        self.go_on(writer, bulk, sink)

    def go_on(self, writer: StreamWriter, bulk: Bulk, sink: PageSink) -> None:
        """Do as `run`, when it has returned, with what was written since. Raises as `run`."""
        while not self._one_pass(writer, bulk, sink):
            pass

    @property
    def leaves_little(self) -> bool:
        """Whether what was left when `run` or `go_on` returned goes in no time to speak of."""
        return self._had <= _FEW

    def is_worth_a_pass(self) -> bool:
        """Say whether what was written since `run` had better go before the guest stands. Raises `KvmCallFailed`."""
        return self.ram.collect() > _NEXT_TO_NOTHING and not self._watcher.hurries

    def stand(self) -> bool:
        """Find out what is left, now that the guest stands; return whether it takes no time. Raises `KvmCallFailed`."""
        self.ram.stands()
        return self.ram.passes > 0 and self.ram.collect() <= AT_ONCE

    def finish(self, writer: StreamWriter, bulk: Bulk, sink: PageSink) -> None:
        """Send what is left, after `stand`, with no limit to the rate."""
        if not self.ram.passes:
            self.ram.begin()
            writer.ram_extents(self.ram.extents, in_stream=True)
        self._begin_pass(writer, bulk)
        for _ in self.ram.pages(sink):
            pass
        sink.flush()
        self.ram.note(sink)

    def _begin_pass(self, writer: StreamWriter, bulk: Bulk) -> None:
        number = self.ram.passes + 1
        writer.ram_pass(number)
        bulk.write(writer.take())
        self._watcher.passed(number)

    def _one_pass(self, writer: StreamWriter, bulk: Bulk, sink: PageSink) -> bool:
        """Return whether it was the last with the guest running."""
        self._begin_pass(writer, bulk)
        begun, before = time.monotonic(), sink.bytes
        limiter = _Limiter(before)
        for _ in self.ram.pages(sink):
            limiter.wait(bulk, lambda: sink.bytes + sink.under_way, self._limit)
            if self._watcher.hurries:  # which ends that wait too
                break
        sink.flush()
        self.ram.note(sink)
        seconds, sent = max(time.monotonic() - begun, 1e-6), sink.bytes - before
        self._measure(sent, seconds)
        had, left = self._had, self.ram.collect() * PAGE_SIZE
        self._had = left
        self.ram.dirty_rate = round(left / PAGE_SIZE / seconds)
        self._watcher.expects(self._expected(left))
        fits = self._fits(left)
        # Another pass is worth it, too, as long as it makes the pause much shorter than it has to be.
        if self._watcher.hurries or (fits and (left <= _FEW or left > had / 2)):
            return True
        if fits:
            return False
        self._watcher.after_pass(sent, left, seconds)
        return False

    def _expected(self, left: int) -> float:
        """Return how many ms so many bytes are expected to take."""
        return left / self._rate() * 1000

    def _fits(self, left: int) -> bool:
        return self._expected(left) <= int(self._parameters["downtime-limit"])

    def _measure(self, sent: int, seconds: float) -> None:
        self._sent += sent
        self._seconds += seconds
        if self._sent >= _MEASURED or self._bandwidth is None:
            self._bandwidth = self._sent / self._seconds
            self._sent, self._seconds = 0, 0.0

    def _limit(self) -> int:
        """Return how many bytes a second may go now; 0 is no limit."""
        return 0 if self._watcher.hurries else int(self._parameters["max-bandwidth"])

    def _rate(self) -> float:
        """Return at how many bytes a second the rest is expected to go."""
        return max(float(self._parameters["avail-switchover-bandwidth"]) or self._bandwidth or 0.0, 1.0)


@final
class _Limiter:
    """Holds a rate, by waiting where it was exceeded."""

    def __init__(self, sent: int) -> None:
        self._since = time.monotonic()
        self._sent = sent

    def wait(self, bulk: Bulk, sent: Callable[[], int], limit: Callable[[], int]) -> None:
        """Wait until `sent` bytes may have been sent at `limit` bytes a second, which may change; 0 is no limit.

        What is handed over and not sent yet is among `sent`, by an estimate, so that may change too.
        """
        while rate := limit():
            now, found = time.monotonic(), sent()
            ahead = (found - self._sent) / rate - (now - self._since)
            if ahead <= _BURST:
                if ahead < 0:
                    # What was not used is not saved up.
                    self._since, self._sent = now, found
                return
            bulk.wait(min(ahead, _LOOK))
