"""A split virtqueue: three rings in guest memory, read and written with every value in them under suspicion.

A chain of descriptors is looked at, and copied, before anything is done with it; the guest may change it meanwhile
without effect. It is taken only when it is given back. So between two calls nothing is held that a reset would have to
take back, or a live update to carry: a request that has not been answered is in the guest's memory, and nowhere else.

Source: Virtual I/O Device (VIRTIO) Version 1.3, 2.7 (split virtqueues).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, Protocol, final

import attrs

from vmm.errors import GuestAddressInvalid
from vmm.hw.state import U16, U32, U64

if TYPE_CHECKING:
    from collections.abc import Iterator

_DESCRIPTOR: Final = struct.Struct("<QIHH")
_NEXT: Final = 1
_WRITE: Final = 2
_INDIRECT: Final = 4  # not offered (VIRTIO_F_INDIRECT_DESC)
_NO_INTERRUPT: Final = 1
_LONGEST: Final = 1 << 32  # bytes in a chain


class Ram(Protocol):
    """The guest's memory. Each raises `GuestAddressInvalid` if what is meant is not all RAM."""

    def read(self, address: int, size: int) -> bytes:
        """Copy out."""

    def write(self, address: int, data: bytes) -> None:
        """Copy in."""

    def check(self, address: int, size: int) -> None:
        """Do neither."""


@final
class QueueBroken(Exception):
    """The guest has broken the rules; says how. Never leaves `vmm.hw.virtio`: the device then needs a reset."""


@attrs.define(kw_only=True)
class QueueState:
    """What a queue is beside its rings: where they are, and how far the device has got."""

    size: U32 = 0
    ready: bool = False
    descriptors: U64 = 0  # guest address of the descriptor table
    driver: U64 = 0  # of the available ring
    device: U64 = 0  # of the used ring
    next_available: U16 = 0  # count of chains taken, modulo 65536
    next_used: U16 = 0  # of chains given back


@final
@attrs.frozen
class Chain:
    """One request: parts that the device reads, then parts that it writes, each an address and a length."""

    head: int
    readable: tuple[tuple[int, int], ...]
    writable: tuple[tuple[int, int], ...]

    @property
    def room(self) -> int:
        """How many bytes the device may write."""
        return sum(length for _, length in self.writable)


@final
class Virtqueue:
    """The device's side of a queue that is ready. Not for two threads at a time."""

    def __init__(self, ram: Ram, state: QueueState, largest: int) -> None:
        """`largest` is how many entries the device allows.

        Raises:
            QueueBroken: the rings can't be what and where they are said to be.
        """
        self._ram: Final = ram
        self._state: Final = state
        size = state.size
        if not 0 < size <= largest or size & (size - 1):
            raise QueueBroken(f"a queue of {size} entries; a power of two up to {largest} would be right")
        rings = (
            ("descriptor table", state.descriptors, 16, 16 * size),
            ("available ring", state.driver, 2, 6 + 2 * size),
            ("used ring", state.device, 4, 6 + 8 * size),
        )
        for what, address, align, length in rings:
            if address % align:
                raise QueueBroken(f"the {what} is at {address:#x}, which is no multiple of {align}")
            self._check(address, length, f"the {what}")

    def peek(self) -> Chain | None:
        """Look at the next chain that the driver has made available, if there is one.

        Raises:
            QueueBroken: it can't be one.
        """
        state = self._state
        waiting = self._u16(state.driver + 2) - state.next_available & 0xFFFF
        if not waiting:
            return None
        if waiting > state.size:
            raise QueueBroken(f"{waiting} chains are available in a queue of {state.size} entries")
        head = self._u16(state.driver + 4 + 2 * (state.next_available % state.size))
        parts = list(self._descriptors(head))
        readable = tuple((address, length) for address, length, writable in parts if not writable)
        writable = tuple((address, length) for address, length, writable in parts if writable)
        return Chain(head, readable, writable)

    def fill(self, chain: Chain, data: bytes) -> int:
        """Write `data` to the parts of `chain` that are for it, as far as there is room. Return how much."""
        done = 0
        for address, length in chain.writable:
            part = data[done : done + length]
            if part:
                self._ram.write(address, part)
            done += len(part)
        return done

    def give_back(self, chain: Chain, written: int) -> bool:
        """Take `chain`, the one that `peek` last returned, and tell the driver that it is done with.

        Returns:
            Whether the driver wants an interrupt.
        """
        state = self._state
        entry = state.device + 4 + 8 * (state.next_used % state.size)
        self._ram.write(entry, struct.pack("<II", chain.head, written))
        state.next_available = state.next_available + 1 & 0xFFFF
        state.next_used = state.next_used + 1 & 0xFFFF
        # Last: from here on the guest may use the entry. x86 keeps the order of stores.
        self._ram.write(state.device + 2, struct.pack("<H", state.next_used))
        return not self._u16(state.driver) & _NO_INTERRUPT

    def _descriptors(self, head: int) -> Iterator[tuple[int, int, bool]]:
        """Yield each part of the chain that begins at `head`: address, length, and whether the device writes there."""
        size = self._state.size
        at, total, behind_writable = head, 0, False
        for _ in range(size):
            if at >= size:
                raise QueueBroken(f"descriptor {at} is named, and the queue has {size}")
            raw = self._ram.read(self._state.descriptors + 16 * at, 16)
            address, length, flags, following = _DESCRIPTOR.unpack(raw)
            writable = bool(flags & _WRITE)
            if flags & _INDIRECT:
                raise QueueBroken(f"descriptor {at} is indirect, which was not negotiated")
            if behind_writable and not writable:
                raise QueueBroken(f"descriptor {at} is for reading and comes behind one for writing")
            total += length
            if total > _LONGEST:
                raise QueueBroken(f"a chain of more than {_LONGEST} bytes")
            self._check(address, length, f"descriptor {at}")
            yield address, length, writable
            if not flags & _NEXT:
                return
            at, behind_writable = following, writable
        raise QueueBroken(f"a chain of more than {size} descriptors, so one with a loop")

    def _check(self, address: int, size: int, what: str) -> None:
        try:
            self._ram.check(address, size)
        except GuestAddressInvalid:
            raise QueueBroken(f"{what} is at {address:#x}, {size} bytes long, which is not all RAM") from None

    def _u16(self, address: int) -> int:
        return int.from_bytes(self._ram.read(address, 2), "little")
