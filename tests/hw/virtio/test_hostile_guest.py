"""Whatever a guest writes into registers and rings, and whenever: nothing is raised, and nothing of this process is
touched; the worst that it gets is a device that needs a reset, which a reset mends."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.conformance.devices import Bench, virtio_rng
from tests.hw.virtio.driver import DESCRIPTORS, DEVICE, DRIVER, Driver
from vmm.hw.codec import StateCodec
from vmm.hw.virtio.mmio import DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET
from vmm.hw.virtio.rng import VirtioRngState

if TYPE_CHECKING:
    from collections.abc import Callable

RAM: Final = 0x1_0000
REGISTERS: Final = tuple(range(0, 0x104, 4))
CODEC: Final = StateCodec.of(VirtioRngState)
"""Compiled once: there are thousands of steps, each of which is checked."""

words = st.one_of(
    st.sampled_from((0, 1, 2, 3, 8, 11, 15, 64, 0x80, DESCRIPTORS, DRIVER, DEVICE, RAM - 1, RAM, 0xFFFF_FFFF)),
    st.integers(0, 0xFFFF_FFFF),
)
halves = st.one_of(st.integers(0, 16), st.integers(0, 0xFFFF))
addresses = st.one_of(st.integers(0, RAM), st.sampled_from((RAM - 1, 1 << 32, (1 << 64) - 1, DEVICE, DESCRIPTORS)))

accesses = st.tuples(st.sampled_from(("read", "write")), st.sampled_from(REGISTERS), words)
descriptors = st.tuples(
    st.just("descriptor"), st.integers(0, 7), st.tuples(addresses, words, st.integers(0, 7), st.integers(0, 9))
)
rings = st.tuples(st.just("ring"), st.sampled_from((DRIVER, DEVICE)), st.tuples(st.integers(0, 12), halves))
steps = st.one_of(
    accesses,
    descriptors,
    rings,
    st.sampled_from((("answer", 0, 1), ("answer", 0, 100), ("start", 0, 0), ("offer", 0, 0), ("offer", 3, 0))),
)


class Guest:
    """A device, and what the guest does to it."""

    def __init__(self) -> None:
        self.bench = Bench()
        self.device = virtio_rng(self.bench)
        self.driver = Driver(self.device, self.bench.ram)

    def act(self, step: tuple[object, ...]) -> None:
        """Carry out one step; whatever it was, the device must be as it should be afterwards."""
        acts: dict[object, Callable[..., None]] = {
            "read": self.read, "write": self.driver.write, "descriptor": self.describe, "ring": self.scribble,
            "answer": self.answer, "start": lambda *_: self.driver.start(), "offer": lambda head, _: self.offer(head),
        }  # fmt: skip
        name, *arguments = step
        acts[name](*arguments)
        self.check()

    def read(self, offset: int, _: int) -> None:
        assert 0 <= self.driver.read(offset) <= 0xFFFF_FFFF

    def describe(self, index: int, fields: tuple[int, int, int, int]) -> None:
        self.driver.describe(index, *fields)

    def scribble(self, ring: int, what: tuple[int, int]) -> None:
        place, value = what
        self.bench.ram.data[ring + 2 * place : ring + 2 * place + 2] = struct.pack("<H", value)

    def offer(self, head: int) -> None:
        self.driver.offer(head)

    def answer(self, _: int, size: int) -> None:
        status = self.device.state.transport.status
        live = status & (DRIVER_OK | FEATURES_OK | NEEDS_RESET | FAILED) == DRIVER_OK | FEATURES_OK
        self.bench.ram.writes.clear()
        got = self.device.answer(0, b"\xa5" * size)
        assert 0 <= got <= size
        if not live:
            assert (got, self.bench.ram.writes) == (0, [])
        # The memory refuses what is outside of it, so all that was written was memory of the guest's.
        assert sum(length for _, length in self.bench.ram.writes) <= got + 8 + 2

    def check(self) -> None:
        assert CODEC.load(CODEC.dump(self.device.state)) == self.device.state
        assert self.bench.line.is_up() is (self.device.state.transport.interrupts != 0)
        assert not self.device.lock.locked()

    def mend(self) -> None:
        """A reset, and memory as a driver would have it: the device works as on the first day."""
        self.bench.ram.data[:] = bytes(RAM)
        self.driver.start()
        self.driver.request(0, 4)
        assert self.device.answer(0, b"abcd") == 4
        assert self.driver.used() == [(0, 4)]


@settings(max_examples=300, deadline=None)
@given(st.lists(steps, max_size=60))
@example([("start", 0, 0), ("offer", 9, 0), ("answer", 0, 1)])
def test_a_hostile_guest_gets_no_further_than_its_own_memory(sequence: list[tuple[object, ...]]) -> None:
    guest = Guest()
    for step in sequence:
        guest.act(step)
    guest.mend()


@settings(max_examples=300, deadline=None)
@given(st.lists(steps, max_size=20), st.lists(steps, max_size=40))
def test_a_guest_that_had_begun_well_gets_no_further_either(
    before: list[tuple[object, ...]], after: list[tuple[object, ...]]
) -> None:
    guest = Guest()
    guest.driver.start()
    guest.driver.request(0)
    guest.driver.request(1)
    guest.device.answer(0, b"abc")
    for step in (*before, ("answer", 0, 16), *after):
        guest.act(step)
    guest.mend()


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=0x80, max_size=0x80), st.binary(min_size=24, max_size=24), st.integers(0, 0xFFFF))
def test_rings_full_of_noise(table: bytes, ring: bytes, next_available: int) -> None:
    guest = Guest()
    guest.driver.start()
    guest.bench.ram.data[DESCRIPTORS : DESCRIPTORS + len(table)] = table
    guest.bench.ram.data[DRIVER : DRIVER + len(ring)] = ring
    guest.device.state.requests.next_available = next_available
    for _ in range(10):
        guest.act(("answer", 0, 16))
    guest.mend()
