"""Limits to how fast vCPUs write to memory: each is kept out of the guest for the share of the time that is needed.

Where vCPUs have rings (`vmm.kvm.dirty_ring`) it is known which of them writes what. Elsewhere only what all of them
write together is, so that all are limited alike, each to an even part.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, final

import trio

from vmm.errors import DeviceNotFound, InvalidState, Unsupported, VmmError, leaves
from vmm.kvm.dirty_log import DirtyLog
from vmm.kvm.memory import PAGE_SIZE
from vmm.kvm.page_map import PageMap
from vmm.migration.dirty_rate import LimitedVcpu
from vmm.phases.throttle import MOST, Throttle

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmm.kvm.dirty_log import LoggingVm
    from vmm.kvm.memory import GuestMemory
    from vmm.phases.dirty_rate import DirtyRates
    from vmm.phases.vcpus import GuestCpu
    from vmm.residents import Residents

PERIOD: Final = 1.0
"""Seconds between two looks at what was written."""
_MIB: Final = 1 << 20


@final
class DirtyLimits:
    """The limits of one machine's vCPUs. On the loop."""

    def __init__(
        self,
        memory: GuestMemory,
        vm: LoggingVm,
        vcpus: Sequence[GuestCpu],
        rates: DirtyRates,
        note: Callable[[tuple[LimitedVcpu, ...]], None],
        complain: Callable[[str], None],
        residents: Residents,
    ) -> None:
        """`note` is told what each limited vCPU may write, and writes."""
        self._memory: Final = memory
        self._vm: Final = vm
        self._vcpus: Final = tuple(vcpus)
        self._rates: Final = rates
        self._note: Final = note
        self._complain: Final = complain
        self._residents: Final = residents
        self._quotas: dict[int, int] = {}  # vCPU -> MiB a second
        self._held = False
        self._scope: trio.CancelScope | None = None
        self._over = trio.Event()
        note(())

    @property
    def under_way(self) -> bool:
        """Whether what is written is being logged for it."""
        return self._scope is not None

    def set(self, index: int | None, quota: int) -> None:
        """Limit vCPU `index`, or with None all of them, to `quota` MiB a second each; 0 ends it.

        Raises:
            DeviceNotFound: there is no such vCPU.
            Unsupported: one of several is to be limited, and nobody knows what it writes.
            InvalidState: KVM's log is in use by a measurement.
        """
        chosen = self._chosen(index)
        if quota and self._rates.logs:
            state = "while calc-dirty-rate measures by dirty-bitmap"
            instead = "query-dirty-rate tells when that is over"
            raise InvalidState(what="set-vcpu-dirty-limit", state=state, instead=instead)
        for number in chosen:
            if quota:
                self._quotas[number] = quota
            else:
                self._quotas.pop(number, None)
        self._tell({})
        if not self._quotas and self._scope is not None:
            self._scope.cancel()
        self._begin()

    async def hold(self) -> None:
        """Let every vCPU run freely until `release`; wait until nothing of it is under way."""
        self._held = True
        if self._scope is not None:
            self._scope.cancel()
            await self._over.wait()

    def release(self) -> None:
        """Undo `hold`: limit them again."""
        self._held = False
        self._begin()

    def _begin(self) -> None:
        if self._quotas and self._scope is None and not self._held:
            self._scope, self._over = trio.CancelScope(), trio.Event()
            self._residents.start_soon("dirty limits", self._serve)

    def _chosen(self, index: int | None) -> range:
        count = len(self._vcpus)
        if index is None:
            return range(count)
        if not 0 <= index < count:
            raise DeviceNotFound(
                what="vCPU", name=str(index), known=f"; there are: {', '.join(map(str, range(count)))}"
            )
        if count > 1 and self._vm.rings is None:
            instead = "leave cpu-index out, which limits all alike, or use accel-set with dirty-ring-size"
            raise Unsupported(what="set-vcpu-dirty-limit of one vCPU", name=str(index), instead=instead)
        return range(index, index + 1)

    async def _serve(self) -> None:
        assert self._scope is not None
        failure = ""
        try:
            with self._scope:
                await self._limit()
        except* VmmError as group:
            failure = "; ".join(str(error) for error in leaves(group))
        finally:
            self._scope = None
            self._over.set()
        if failure:
            self._quotas.clear()
            self._complain(f"the limits of set-vcpu-dirty-limit have ended: {failure}")
            self._tell({})
        else:
            self._begin()  # a limit that was set while this one was being ended

    async def _limit(self) -> None:
        log = DirtyLog(self._vm, self._memory)
        written = PageMap(self._memory.size // PAGE_SIZE)
        throttles = [Throttle([vcpu]) for vcpu in self._vcpus]

        def collect() -> None:
            written.clear()
            log.collect(written)
            log.protect(0, written.pages)

        def start() -> None:
            log.start()
            log.protect(0, written.pages)
            collect()

        async with trio.open_nursery() as nursery:
            for throttle in throttles:
                nursery.start_soon(throttle.serve)
            try:
                await trio.to_thread.run_sync(start)
                taken, then = self._taken(), time.monotonic()
                while True:
                    await trio.sleep(PERIOD)
                    await trio.to_thread.run_sync(collect)
                    counts, now = self._taken(), time.monotonic()
                    even = [written.count() / len(throttles)] * len(throttles)
                    pages = [float(count - before) for count, before in zip(counts, taken, strict=True)] or even
                    rates = [count * PAGE_SIZE / _MIB / (now - then) for count in pages]
                    taken, then = counts, now
                    for index, throttle in enumerate(throttles):
                        throttle.set(_share(throttle.percent, self._quotas.get(index), rates[index]))
                    self._tell(dict(enumerate(rates)))
            finally:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(log.stop)

    def _taken(self) -> list[int]:
        return self._vm.rings.taken() if self._vm.rings is not None else []

    def _tell(self, rates: dict[int, float]) -> None:
        self._note(
            tuple(
                LimitedVcpu(cpu_index=index, limit_rate=quota, current_rate=round(rates.get(index, 0.0)))
                for index, quota in sorted(self._quotas.items())
            )
        )


def _share(percent: int, quota: int | None, rate: float) -> int:
    """Return the share of the time in which a vCPU must not run that writes `rate` at `percent`."""
    if quota is None:
        return 0
    runs = (100 - percent) * (quota / rate if rate > 0 else 100.0)
    return max(0, min(round(100 - runs), MOST))
