"""The virtio entropy device: it fills the guest's buffers with the random bytes of a back end.

A request stays in its queue until there are bytes for it. So at any moment the device may be held, saved, reset or
taken off, and no request is lost. While it is held its back end is not read.

Source: Virtual I/O Device (VIRTIO) Version 1.3, 5.4 (entropy device).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, ClassVar, Final, Protocol, final

import attrs
import trio

from vmm.errors import VmmError
from vmm.hw.state import U64, Integer, Schema, adds
from vmm.hw.virtio.mmio import TransportState
from vmm.hw.virtio.queue import QueueState

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.hw.doorbell import Doorbell
    from vmm.hw.state import Fields
    from vmm.hw.virtio.mmio import VirtioMmio

REQUESTS: Final = 0
"""The number of the only queue."""

_MOST: Final = 4096
"""Bytes for one request. A guest that wants more asks again; the loop serves others in between."""

_TRY_AGAIN: Final = 1.0
"""Seconds after which a back end that failed is asked again. The guest need not ring: its request is in the queue."""


class Source(Protocol):
    """Where random bytes come from."""

    async def read(self, size: int) -> bytes:
        """Return 1 to `size` of them. A checkpoint in every case. `VmmError` where there are none."""


_LONGEST: Final = 1 << 62  # ns


@attrs.define(kw_only=True)
class QuotaState:
    """How much of its quota the guest has left. Up to date while the device is held."""

    left: U64 = 0  # bytes, in the period under way
    ends_in: Annotated[int, Integer(0, _LONGEST)] = 0  # ns until that is over; 0: there is none under way


def _without_quota(fields: Fields) -> Fields:
    # An older destination begins with a whole period, as it always did: the guest gets no more than one quota too much.
    return {name: value for name, value in fields.items() if name != "quota"}


@attrs.define(kw_only=True)
class VirtioRngState:
    """All that there is: the device has no configuration space."""

    SCHEMA: ClassVar[Schema] = Schema(
        "virtio-rng",
        version=2,
        accepts=1,
        upgrades=(adds(quota={"left": 0, "ends_in": 0}),),
        downgrades=(_without_quota,),
    )

    transport: TransportState = attrs.Factory(TransportState)
    requests: QueueState = attrs.Factory(QueueState)
    quota: QuotaState = attrs.Factory(QuotaState)

    @property
    def queues(self) -> tuple[QueueState, ...]:
        """The only queue."""
        return (self.requests,)


@final
class VirtioRng:
    """The function."""

    device_id: ClassVar[int] = 4
    features: ClassVar[int] = 0
    largest: ClassVar[int] = 64

    def new_state(self) -> VirtioRngState:
        """Return the power-on state."""
        return VirtioRngState()


@final
class Quota:
    """How many bytes the guest gets in a period, which begins with the first byte after the last one has ended."""

    def __init__(self, most: int | None, period: float) -> None:
        """`most` bytes in `period` seconds; None for as many as it likes."""
        self._most: Final = most
        self._period: Final = period
        self._left = most or 0
        self._ends = -1.0

    async def wait(self) -> int:
        """Wait until there are bytes to be had; return how many."""
        if self._most is None:
            return _MOST
        if not self._left and trio.current_time() < self._ends:
            await trio.sleep_until(self._ends)
        if trio.current_time() >= self._ends:
            self._left = self._most
        return self._left

    def save(self) -> QuotaState:
        """Return what is left."""
        ends_in = max(0.0, self._ends - trio.current_time())
        if self._most is None or not ends_in:
            return QuotaState()
        return QuotaState(left=self._left, ends_in=min(round(ends_in * 1e9), _LONGEST))

    def load(self, state: QuotaState) -> None:
        """Go on with what is left, as far as this quota allows so much, and for as long as a period of it can last."""
        if self._most is not None:
            self._left = min(state.left, self._most)
            self._ends = trio.current_time() + min(state.ends_in / 1e9, self._period) if state.ends_in else -1.0

    def spend(self, count: int) -> None:
        """Note that the guest has got so many."""
        if self._most is not None and count:
            if trio.current_time() >= self._ends:
                self._left, self._ends = self._most, trio.current_time() + self._period
            self._left -= count


@final
class RngWorker:
    """The task that answers the requests."""

    def __init__(
        self, device: VirtioMmio, bell: Doorbell, source: Source, quota: Quota, complain: Callable[[str], None]
    ) -> None:
        self._device: Final = device
        self._bell: Final = bell
        self._source: Final = source
        self._quota: Final = quota
        self._complain: Final = complain
        self._complaint = ""
        self._reading = trio.CancelScope()
        self._spare = b""
        """Bytes that were read, and then nobody had asked for them any more."""

    async def serve(self) -> None:
        """Answer requests for ever. A back end that fails is told the operator once; the guest waits."""
        patience = math.inf
        while True:
            with trio.move_on_after(patience):
                await self._bell.wait_rung()
            try:
                await self._answer_all()
                patience = math.inf
            except VmmError as error:
                self._tell(f"{error}; the guest's request waits")
                patience = _TRY_AGAIN

    def hold(self) -> None:
        """Touch neither the guest's memory nor the back end from now on."""
        self._device.hold()
        self._reading.cancel()
        self._device.state.quota = self._quota.save()

    def go_on(self) -> None:
        """Go on, with what the guest asked for meanwhile too, and with what it has left of its quota."""
        self._quota.load(self._device.state.quota)
        self._device.go_on()

    async def _answer_all(self) -> None:
        while (chain := self._device.peek(REQUESTS)) is not None:
            if chain.readable or not chain.room:
                self._device.refuse("a request for random bytes must have room for some, and nothing to read")
                return
            data = await self._read(min(chain.room, _MOST, await self._quota.wait()))
            taken = self._device.answer(REQUESTS, data) if data else 0
            self._spare = data[taken:] + self._spare
            self._quota.spend(taken)

    async def _read(self, size: int) -> bytes:
        """Return 1 to `size` bytes; none if the device was held meanwhile."""
        data, self._spare = self._spare[:size], self._spare[size:]
        if not data and not self._device.held:
            with trio.CancelScope() as self._reading:
                data = await self._source.read(size)
                self._complaint = ""
        return data

    def _tell(self, complaint: str) -> None:
        # Each kick of the guest's tries again, as does each second, and the guest is not to fill the operator's log.
        if complaint != self._complaint:
            self._complaint = complaint
            self._complain(complaint)
