"""How fast the guest writes to its memory, measured over some time.

Two ways: to compare some pages, taken at random, at the beginning and at the end; or to have KVM log what is written,
which holds the guest up a little. Both count a page once, however often it was written.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Final, final
from zlib import crc32

import attrs
import trio

from vmm.errors import InvalidState, VmmError
from vmm.kvm.dirty_log import DirtyLog
from vmm.kvm.memory import PAGE_SIZE
from vmm.kvm.page_map import PageMap
from vmm.migration.dirty_rate import Measurement

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.kvm.dirty_log import LoggingVm
    from vmm.kvm.memory import GuestMemory
    from vmm.residents import Residents

_MIB: Final = 1 << 20
_ZERO: Final = crc32(bytes(PAGE_SIZE))


@final
class DirtyRates:
    """Measures, one at a time. On the loop."""

    def __init__(
        self,
        memory: GuestMemory,
        vm: LoggingVm,
        note: Callable[[Measurement], None],
        complain: Callable[[str], None],
        residents: Residents,
    ) -> None:
        """`note` is told how it goes; `complain` what came in between."""
        self._memory: Final = memory
        self._vm: Final = vm
        self._note: Final = note
        self._complain: Final = complain
        self._residents: Final = residents
        self._logs = False
        self._held = False
        self._scope: trio.CancelScope | None = None
        self._over = trio.Event()

    @property
    def logs(self) -> bool:
        """Whether a measurement by KVM's log is under way."""
        return self._scope is not None and self._logs

    def begin(self, wanted: Measurement) -> None:
        """Begin. Raises as `Measurement.check`, and `InvalidState` while one is under way."""
        wanted.check()
        if self._held:
            instead = "wait until it is over"
            raise InvalidState(what="calc-dirty-rate", state="while a migration begins", instead=instead)
        if self._scope is not None:
            instead = "query-dirty-rate tells when that is over"
            raise InvalidState(what="calc-dirty-rate", state="while another measurement is under way", instead=instead)
        self._logs = wanted.mode == "dirty-bitmap"
        self._scope, self._over = trio.CancelScope(), trio.Event()
        begun = attrs.evolve(wanted, started=time.monotonic(), status="measuring")
        self._note(begun)
        self._residents.start_soon("dirty rate", self._measure, begun)

    async def hold(self) -> None:
        """Call off what is under way, wait until nothing of it is left, and begin nothing until `release`.

        Whoever moves the guest needs KVM's log.
        """
        self._held = True
        if self._scope is not None:
            self._scope.cancel()
            await self._over.wait()

    def release(self) -> None:
        """Undo `hold`; what was called off stays so."""
        self._held = False

    async def _measure(self, begun: Measurement) -> None:
        assert self._scope is not None
        done = Measurement()
        try:
            with self._scope:
                measure = self._by_log if begun.mode == "dirty-bitmap" else self._by_samples
                pages = await measure(begun)
                seconds = max(time.monotonic() - begun.started, 1e-3)
                done = attrs.evolve(begun, status="measured", rate=round(pages * PAGE_SIZE / seconds / _MIB))
        except VmmError as error:
            self._complain(f"calc-dirty-rate came to nothing: {error}")
        finally:
            self._note(done)
            self._scope = None
            self._over.set()

    async def _by_log(self, begun: Measurement) -> float:
        log = DirtyLog(self._vm, self._memory)
        written = PageMap(self._memory.size // PAGE_SIZE)

        def start() -> None:
            log.start()
            log.protect(0, written.pages)
            log.collect(written)  # of the moments between the two
            log.protect(0, written.pages)
            written.clear()

        try:
            await trio.to_thread.run_sync(start)
            await trio.sleep(begun.time / 1000)
            await trio.to_thread.run_sync(log.collect, written)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(log.stop)
        return float(written.count())

    async def _by_samples(self, begun: Measurement) -> float:
        total = self._memory.size // PAGE_SIZE
        count = min(total, max(1, begun.samples * self._memory.size // (1 << 30)))
        pages = random.sample(range(total), count)
        before = await trio.to_thread.run_sync(self._checksums, pages)
        await trio.sleep(begun.time / 1000)
        after = await trio.to_thread.run_sync(self._checksums, pages)
        changed = sum(one != other for one, other in zip(before, after, strict=True))
        return changed / count * total

    def _checksums(self, pages: list[int]) -> list[int]:
        # What was never touched is zero, and stays untouched.
        touched = self._memory.touched()
        return [
            crc32(self._memory.read(self._address(page), PAGE_SIZE)) if page in touched else _ZERO for page in pages
        ]

    def _address(self, page: int) -> int:
        at = page * PAGE_SIZE
        region = next(region for region in reversed(self._memory.regions) if region.offset <= at)
        return region.address + at - region.offset
