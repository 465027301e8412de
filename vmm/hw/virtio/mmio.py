"""The virtio transport over memory-mapped registers, version 2.

What is on it is a `Function`: a device type, its features and its queues. The transport does what all have in common:
it negotiates, keeps the queues' state, and answers for a guest that breaks the rules. Such a guest is never an error of
this program: its device gets status DEVICE_NEEDS_RESET, and touches no queue until the guest has reset it.

Queues are worked off by a task on the loop, which `kick` wakes. A register access comes from a vCPU thread.

Source: Virtual I/O Device (VIRTIO) Version 1.3: 4.2.2 (registers), 2.1 (status), 2.2 (features), 2.9 (notifications).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Final, Protocol, final

import attrs

from vmm.hw.irq import Interrupts
from vmm.hw.state import U8, U32, U64, Integer, Schema, host_only
from vmm.hw.virtio.queue import Chain, QueueBroken, QueueState, Ram, Virtqueue

MAGIC: Final = 0x7472_6976  # "virt"
VERSION: Final = 2
_WORD: Final = 0xFFFF_FFFF
VENDOR: Final = 0x4F49_5254  # "TRIO"
NO_DEVICE: Final = 0
QUEUE_NOTIFY: Final = 0x50
REGISTERS: Final = 0x100
"""The size of the control registers; the device's configuration space comes behind them."""


@final
class _Register:
    """Offsets of the control registers."""

    MAGIC: Final = 0x000
    VERSION: Final = 0x004
    DEVICE_ID: Final = 0x008
    VENDOR_ID: Final = 0x00C
    DEVICE_FEATURES: Final = 0x010
    DEVICE_FEATURES_SELECT: Final = 0x014
    DRIVER_FEATURES: Final = 0x020
    DRIVER_FEATURES_SELECT: Final = 0x024
    QUEUE_SELECT: Final = 0x030
    QUEUE_SIZE_MAX: Final = 0x034
    QUEUE_SIZE: Final = 0x038
    QUEUE_READY: Final = 0x044
    QUEUE_NOTIFY: Final = QUEUE_NOTIFY
    INTERRUPT_STATUS: Final = 0x060
    INTERRUPT_ACKNOWLEDGE: Final = 0x064
    STATUS: Final = 0x070


_SHARED_MEMORY: Final = range(0x0B0, 0x0C0)
"""Length and base of a region of shared memory; of one that is not there, all ones."""

_RINGS: Final[Mapping[int, tuple[str, int]]] = {
    0x080: ("descriptors", 0), 0x084: ("descriptors", 32),
    0x090: ("driver", 0), 0x094: ("driver", 32),
    0x0A0: ("device", 0), 0x0A4: ("device", 32),
}  # fmt: skip
"""Which half of which address of the selected queue."""

DRIVER_OK: Final = 0x04
FEATURES_OK: Final = 0x08
NEEDS_RESET: Final = 0x40
FAILED: Final = 0x80
_DRIVER_STATUS: Final = 0x8F  # what a driver may set

USED_BUFFER: Final = 1 << 0
CONFIGURATION_CHANGE: Final = 1 << 1

VERSION_1: Final = 1 << 32
"""The feature without which nothing works here: the guest knows the standard, and not only what was before it."""


@attrs.define(kw_only=True)
class TransportState:
    """What the guest has chosen, and what it is to be told."""

    device_features_select: U32 = 0
    driver_features_select: U32 = 0
    driver_features: U64 = 0
    queue_select: U32 = 0
    status: U8 = 0
    interrupts: Annotated[int, Integer(0, USED_BUFFER | CONFIGURATION_CHANGE)] = 0


class VirtioState(Protocol):
    """A function's declared state."""

    SCHEMA: ClassVar[Schema]
    transport: TransportState

    @property
    def queues(self) -> tuple[QueueState, ...]:
        """The queues, by number."""


class Function(Protocol):
    """What a device is besides its transport."""

    device_id: ClassVar[int]
    features: ClassVar[int]
    """What it offers besides `VERSION_1`."""
    largest: ClassVar[int]
    """Entries that each of its queues can have."""

    def new_state(self) -> Any:
        """Return its power-on state, a `VirtioState`."""


@final
@attrs.define(eq=False, repr=False, kw_only=True)
class VirtioMmio(Interrupts):
    """One virtio device at its registers.

    `peek`, `answer`, `hold` and their like are for the task that works the queues off, on the loop; they take `lock`
    for as long as an access lasts.
    """

    name: str = attrs.field(metadata=host_only("configuration: in the recipe"))
    addresses: tuple[range, ...] = attrs.field(metadata=host_only("configuration: of the board"))
    ram: Ram = attrs.field(metadata=host_only("travels by itself"))
    function: Function = attrs.field(metadata=host_only("configuration: in the recipe"))
    kick: Callable[[], object] = attrs.field(
        metadata=host_only("a task of this process; rung on any thread when there may be work")
    )
    held: bool = attrs.field(
        metadata=host_only("whether the guest's memory is another process's, or stands still: no queue is touched")
    )
    widest: int = attrs.field(metadata=host_only("configuration: registers of 32 bits"), default=4, init=False)
    lock: threading.Lock = attrs.field(
        metadata=host_only("orders this process's threads"), factory=threading.Lock, init=False
    )
    state: Any = attrs.Factory(lambda self: self.function.new_state(), takes_self=True)
    fault: str = attrs.field(
        metadata=host_only("why the device needs a reset, for who looks after this program"), default="", init=False
    )

    # --- the guest's side -------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Read a register. All are 32 bits wide, and read so; anything else, and what is not there, is 0."""
        if size != 4 or offset % 4:
            return 0
        transport: TransportState = self.state.transport
        match offset:
            case _Register.MAGIC:
                return MAGIC
            case _Register.VERSION:
                return VERSION
            case _Register.DEVICE_ID:
                return self.function.device_id
            case _Register.VENDOR_ID:
                return VENDOR
            case _Register.DEVICE_FEATURES:
                # A feature number above 63 is never offered.
                return self._offered() >> 32 * min(transport.device_features_select, 2) & _WORD
            case _Register.QUEUE_SIZE_MAX:
                return self.function.largest if self._selected() is not None else 0
            case _Register.QUEUE_READY:
                queue = self._selected()
                return int(queue is not None and queue.ready)
            case _Register.INTERRUPT_STATUS:
                return transport.interrupts
            case _Register.STATUS:
                return transport.status
        return _WORD if offset in _SHARED_MEMORY else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register. What is not written as 32 bits, or is not there, changes nothing."""
        if size != 4 or offset % 4:
            return
        transport: TransportState = self.state.transport
        match offset:
            case _Register.DEVICE_FEATURES_SELECT:
                transport.device_features_select = value
            case _Register.DRIVER_FEATURES_SELECT:
                transport.driver_features_select = value
            case _Register.DRIVER_FEATURES:
                if transport.driver_features_select < 2 and not transport.status & FEATURES_OK:
                    shift = 32 * transport.driver_features_select
                    transport.driver_features = _with_half(transport.driver_features, shift, value)
            case _Register.QUEUE_SELECT:
                transport.queue_select = value
            case _Register.QUEUE_READY:
                self._set_ready(value)
            case _Register.QUEUE_NOTIFY:
                # Where the kernel takes notice by itself, nothing arrives here but the numbers of queues there are not.
                if value < len(self.state.queues):
                    self.kick()
            case _Register.INTERRUPT_ACKNOWLEDGE:
                transport.interrupts &= ~value
                self._update_irq()
            case _Register.STATUS:
                self._set_status(value)
            case _:
                self._set_queue(offset, value)

    # --- the worker's side ------------------------------------------------------------------------------------------

    def peek(self, number: int) -> Chain | None:
        """Look at the next request in queue `number`; None if there is none, or the queue must not be touched."""
        with self.lock:
            return self._look(number)

    def answer(self, number: int, data: bytes) -> int:
        """Write `data`, as far as there is room, for the next request in queue `number`, and give it back.

        It need not be the one that was looked at: the guest may have reset the device meanwhile.

        Returns:
            How many bytes of `data` the guest has got: 0 if there is no request any more.
        """
        with self.lock:
            chain = self._look(number)
            if chain is None:
                return 0
            queue = self._queue(number)
            written = queue.fill(chain, data)
            if queue.give_back(chain, written):
                self.state.transport.interrupts |= USED_BUFFER
                self._update_irq()
            return written

    def refuse(self, fault: str) -> None:
        """Say that the guest has broken a rule of the function's: the device needs a reset."""
        with self.lock:
            self._break(fault)

    # --- the loop's side --------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Touch no queue, and so nothing of the guest's memory, from now on."""
        with self.lock:
            self.held = True

    def go_on(self) -> None:
        """Work on, with what came meanwhile too: the guest's memory is this process's to write."""
        with self.lock:
            self.held = False
        self.kick()

    def reset(self) -> None:
        """Go to the power-on state."""
        with self.lock:
            self._reset()
            self._drive_irq(self._is_pending())

    def after_load(self) -> None:
        """Drive the interrupt line as the loaded state has it. Looks into no queue: see `go_on`."""
        with self.lock:
            self._drive_irq(self._is_pending())

    # --- status -----------------------------------------------------------------------------------------------------

    def _offered(self) -> int:
        return VERSION_1 | self.function.features

    def _set_status(self, value: int) -> None:
        transport: TransportState = self.state.transport
        if not value:
            self._reset()
            self._update_irq()
            return
        before = transport.status
        # A bit is only ever added: all go together, by a reset.
        status = before | value & _DRIVER_STATUS
        if not before & FEATURES_OK and not self._agrees(transport.driver_features):
            status &= ~FEATURES_OK
        transport.status = status
        if status & ~before & DRIVER_OK:
            self.kick()

    def _agrees(self, features: int) -> bool:
        return bool(features & VERSION_1) and not features & ~self._offered()

    def _reset(self) -> None:
        self.state = self.function.new_state()
        self.fault = ""

    def _break(self, fault: str) -> None:
        transport: TransportState = self.state.transport
        self.fault = fault
        transport.status |= NEEDS_RESET
        if transport.status & DRIVER_OK:
            transport.interrupts |= CONFIGURATION_CHANGE
            self._update_irq()

    # --- queues -----------------------------------------------------------------------------------------------------

    def _selected(self) -> QueueState | None:
        queues, number = self.state.queues, self.state.transport.queue_select
        queue: QueueState | None = queues[number] if number < len(queues) else None
        return queue

    def _set_queue(self, offset: int, value: int) -> None:
        queue = self._selected()
        if queue is None or queue.ready:
            return
        if offset == _Register.QUEUE_SIZE:
            queue.size = value
        elif offset in _RINGS:
            ring, shift = _RINGS[offset]
            setattr(queue, ring, _with_half(getattr(queue, ring), shift, value))

    def _set_ready(self, value: int) -> None:
        queue = self._selected()
        if queue is None:
            return
        if not value:
            queue.ready = False
        elif not queue.ready:
            try:
                Virtqueue(self.ram, queue, self.function.largest)
            except QueueBroken as broken:
                self._break(str(broken))
                return
            queue.ready, queue.next_available, queue.next_used = True, 0, 0

    def _look(self, number: int) -> Chain | None:
        status = self.state.transport.status
        if self.held or status & (DRIVER_OK | FEATURES_OK | NEEDS_RESET | FAILED) != DRIVER_OK | FEATURES_OK:
            return None
        if not self.state.queues[number].ready:
            return None
        try:
            return self._queue(number).peek()
        except QueueBroken as broken:
            self._break(str(broken))
            return None

    def _queue(self, number: int) -> Virtqueue:
        return Virtqueue(self.ram, self.state.queues[number], self.function.largest)

    # --- interrupt --------------------------------------------------------------------------------------------------

    def _is_pending(self) -> bool:
        transport: TransportState = self.state.transport
        return transport.interrupts != 0


def _with_half(whole: int, shift: int, half: int) -> int:
    return whole & ~(_WORD << shift) | half << shift


@final
@attrs.frozen(eq=False, repr=False)
class EmptySlot:
    """The registers of a slot with no device in it: that is what it says, and it swallows what is written."""

    name: str
    addresses: tuple[range, ...]
    widest: int = attrs.field(default=4, init=False)
    lock: threading.Lock = attrs.field(factory=threading.Lock, init=False)

    def read(self, offset: int, size: int) -> int:
        """Read a register: only the first three are there."""
        return _EMPTY.get(offset, 0) if size == 4 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Do nothing."""


_EMPTY: Final[Mapping[int, int]] = {_Register.MAGIC: MAGIC, _Register.VERSION: VERSION, _Register.DEVICE_ID: NO_DEVICE}
