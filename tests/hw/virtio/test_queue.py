from __future__ import annotations

import struct

import pytest

from tests.hw.virtio.driver import BUFFERS, DESCRIPTORS, DEVICE, DRIVER, INDIRECT, NEXT, WRITE, FakeRam
from vmm.hw.virtio.queue import QueueBroken, QueueState, Virtqueue

SIZE = 8


class Rings:
    """A queue of eight entries, and the guest's side of it."""

    def __init__(self) -> None:
        self.ram = FakeRam()
        self.state = QueueState(size=SIZE, ready=True, descriptors=DESCRIPTORS, driver=DRIVER, device=DEVICE)

    @property
    def queue(self) -> Virtqueue:
        return Virtqueue(self.ram, self.state, 64)

    def describe(self, index: int, address: int, length: int, flags: int = 0, following: int = 0) -> None:
        self.ram.write(DESCRIPTORS + 16 * index, struct.pack("<QIHH", address, length, flags, following))

    def offer(self, *heads: int, start: int = 0) -> None:
        for place, head in enumerate(heads, start):
            self.ram.write(DRIVER + 4 + 2 * (place % SIZE), struct.pack("<H", head))
        self.ram.write(DRIVER + 2, struct.pack("<H", start + len(heads) & 0xFFFF))

    def used(self) -> tuple[int, bytes]:
        (count,) = struct.unpack("<H", self.ram.read(DEVICE + 2, 2))
        return count, self.ram.read(DEVICE + 4, 8 * SIZE)


def fault(rings: Rings) -> str:
    with pytest.raises(QueueBroken) as caught:
        rings.queue.peek()
    return str(caught.value)


def test_an_empty_queue_has_no_chain() -> None:
    assert Rings().queue.peek() is None


def test_a_chain_is_its_parts_in_order() -> None:
    rings = Rings()
    rings.describe(3, BUFFERS, 5, NEXT, 1)
    rings.describe(1, BUFFERS + 100, 7, NEXT | WRITE, 6)
    rings.describe(6, BUFFERS + 200, 9, WRITE)
    rings.offer(3)
    chain = rings.queue.peek()
    assert chain is not None
    assert (chain.head, chain.readable) == (3, ((BUFFERS, 5),))
    assert (chain.writable, chain.room) == (((BUFFERS + 100, 7), (BUFFERS + 200, 9)), 16)


def test_a_look_takes_nothing() -> None:
    rings = Rings()
    rings.describe(0, BUFFERS, 4, WRITE)
    rings.offer(0)
    assert rings.queue.peek() == rings.queue.peek()
    assert (rings.state.next_available, rings.state.next_used) == (0, 0)
    assert rings.used()[0] == 0


def test_data_goes_over_the_parts_as_far_as_there_is_room() -> None:
    rings = Rings()
    rings.describe(0, BUFFERS, 3, NEXT | WRITE, 1)
    rings.describe(1, BUFFERS + 100, 4, WRITE)
    rings.offer(0)
    chain = rings.queue.peek()
    assert chain is not None
    assert rings.queue.fill(chain, b"abcde") == 5
    assert rings.ram.read(BUFFERS, 4) == b"abc\0"
    assert rings.ram.read(BUFFERS + 100, 4) == b"de\0\0"
    assert rings.queue.fill(chain, b"0123456789") == 7


def test_what_is_given_back_is_the_next_used_entry_and_the_next_chain_follows() -> None:
    rings = Rings()
    rings.describe(5, BUFFERS, 4, WRITE)
    rings.describe(2, BUFFERS, 4, WRITE)
    rings.offer(5, 2)
    for head, written in ((5, 4), (2, 1)):
        chain = rings.queue.peek()
        assert chain is not None
        assert chain.head == head
        rings.queue.give_back(chain, written)
    count, entries = rings.used()
    assert count == 2
    assert struct.unpack_from("<4I", entries) == (5, 4, 2, 1)
    assert rings.queue.peek() is None


def test_the_rings_go_round_and_their_counts_too() -> None:
    rings = Rings()
    rings.state.next_available = rings.state.next_used = 0xFFFE
    rings.describe(0, BUFFERS, 4, WRITE)
    rings.offer(0, 0, 0, start=0xFFFE)
    for _ in range(3):
        chain = rings.queue.peek()
        assert chain is not None
        rings.queue.give_back(chain, 4)
    assert rings.queue.peek() is None
    assert (rings.state.next_available, rings.state.next_used, rings.used()[0]) == (1, 1, 1)


def test_the_driver_says_whether_it_wants_an_interrupt() -> None:
    rings = Rings()
    rings.describe(0, BUFFERS, 4, WRITE)
    rings.offer(0, 0)
    for flags in (0, 1):
        rings.ram.write(DRIVER, struct.pack("<H", flags))
        chain = rings.queue.peek()
        assert chain is not None
        assert rings.queue.give_back(chain, 4) is not bool(flags)


# --- a guest that breaks the rules ------------------------------------------------------------------------


def test_a_chain_with_a_loop() -> None:
    rings = Rings()
    rings.describe(0, BUFFERS, 4, NEXT | WRITE, 1)
    rings.describe(1, BUFFERS, 4, NEXT | WRITE, 0)
    rings.offer(0)
    assert fault(rings) == "a chain of more than 8 descriptors, so one with a loop"


@pytest.mark.parametrize("head", [8, 0xFFFF])
def test_a_head_that_is_no_descriptor(head: int) -> None:
    rings = Rings()
    rings.offer(head)
    assert fault(rings) == f"descriptor {head} is named, and the queue has 8"


def test_a_chain_that_leads_out_of_the_table() -> None:
    rings = Rings()
    rings.describe(0, BUFFERS, 4, NEXT, 9)
    rings.offer(0)
    assert fault(rings) == "descriptor 9 is named, and the queue has 8"


@pytest.mark.parametrize(
    ("address", "length"), [(0xFFFF, 2), (0x1_0000, 1), ((1 << 64) - 1, 1), (0, 0x1_0001), (1 << 40, 0)]
)
def test_a_buffer_that_is_not_all_ram(address: int, length: int) -> None:
    rings = Rings()
    rings.describe(4, address, length, WRITE)
    rings.offer(4)
    assert fault(rings) == f"descriptor 4 is at {address:#x}, {length} bytes long, which is not all RAM"


def test_an_indirect_descriptor() -> None:
    rings = Rings()
    rings.describe(0, BUFFERS, 16, INDIRECT)
    rings.offer(0)
    assert fault(rings) == "descriptor 0 is indirect, which was not negotiated"


def test_a_part_for_reading_behind_one_for_writing() -> None:
    rings = Rings()
    rings.describe(0, BUFFERS, 4, NEXT | WRITE, 1)
    rings.describe(1, BUFFERS, 4)
    rings.offer(0)
    assert fault(rings) == "descriptor 1 is for reading and comes behind one for writing"


def test_more_chains_than_entries() -> None:
    rings = Rings()
    rings.ram.write(DRIVER + 2, struct.pack("<H", 9))
    assert fault(rings) == "9 chains are available in a queue of 8 entries"


def test_a_count_that_goes_back() -> None:
    rings = Rings()
    rings.state.next_available = 5
    rings.ram.write(DRIVER + 2, struct.pack("<H", 4))
    assert fault(rings) == "65535 chains are available in a queue of 8 entries"


class HugeRam(FakeRam):
    """Memory in which every address is RAM."""

    def check(self, address: int, size: int) -> None:
        pass


def test_a_chain_that_is_longer_than_any_can_be() -> None:
    rings = Rings()
    rings.ram = HugeRam()
    rings.describe(0, BUFFERS, 0xFFFF_FFFF, NEXT | WRITE, 1)
    rings.describe(1, BUFFERS, 2, WRITE)
    rings.offer(0)
    assert fault(rings) == "a chain of more than 4294967296 bytes"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"size": 0}, "a queue of 0 entries; a power of two up to 64 would be right"),
        ({"size": 6}, "a queue of 6 entries; a power of two up to 64 would be right"),
        ({"size": 128}, "a queue of 128 entries; a power of two up to 64 would be right"),
        ({"descriptors": 0x1008}, "the descriptor table is at 0x1008, which is no multiple of 16"),
        ({"driver": 0x2001}, "the available ring is at 0x2001, which is no multiple of 2"),
        ({"device": 0x3002}, "the used ring is at 0x3002, which is no multiple of 4"),
        ({"descriptors": 0xFFF0}, "the descriptor table is at 0xfff0, 128 bytes long, which is not all RAM"),
        ({"driver": 0xFFF0}, "the available ring is at 0xfff0, 22 bytes long, which is not all RAM"),
        ({"device": 1 << 63}, "the used ring is at 0x8000000000000000, 70 bytes long, which is not all RAM"),
    ],
)
def test_rings_that_cannot_be(change: dict[str, int], text: str) -> None:
    rings = Rings()
    for name, value in change.items():
        setattr(rings.state, name, value)
    assert fault(rings) == text
