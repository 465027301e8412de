"""How fast the passes over RAM go, where they are not to go as fast as they can."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any, cast

import pytest

from vmm import hostio
from vmm.kvm.memory import PAGE_SIZE, GuestMemory
from vmm.kvm.page_map import PageMap
from vmm.migration.connection import Connection
from vmm.migration.multifd import STRIPE, MultifdSink
from vmm.migration.precopy import Precopy
from vmm.migration.pump import Bulk
from vmm.migration.ram import RamSender
from vmm.migration.stream import PAGES_VERSION, StreamWriter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.kvm.memory import Region

pytestmark = pytest.mark.usefixtures("no_leaks")

PAGES = 3 * STRIPE


def ram() -> closing[GuestMemory]:
    """Return memory that was used."""
    memory = GuestMemory.from_memfd(hostio.create_ram(PAGES * PAGE_SIZE, "test"), PAGES * PAGE_SIZE)
    for page in range(PAGES):
        memory.write(page * PAGE_SIZE, b"x")
    return closing(memory)


class Later:
    """Takes what it is given, and sends it later; and the channel on which that would be waited for."""

    zero_pages = 0

    def __init__(self, parameters: dict[str, Any]) -> None:
        self.data_pages = self.bytes = self.under_way = 0
        self.waits: list[int] = []
        self._parameters = parameters

    def send(self, todo: PageMap, region: Region, first: int, end: int) -> int:
        end = min(end, first + STRIPE)
        self.under_way += todo.count(first, end) * PAGE_SIZE
        todo.discard(first, end - first)
        return end

    def flush(self) -> None:
        self.bytes, self.under_way = self.bytes + self.under_way, 0

    def write(self, buffers: Sequence[bytes]) -> None:
        """Drop it."""

    def wait(self, seconds: float) -> None:
        """Send what there is, and have no limit from now on."""
        self.waits.append(self.under_way)
        self._parameters["max-bandwidth"] = 0


class Deaf:
    """Hears how it goes."""

    hurries = False

    def passed(self, number: int) -> None:
        """Nothing."""

    def expects(self, downtime: float) -> None:
        """Nothing."""

    def after_pass(self, sent: int, dirtied: int, seconds: float) -> None:
        """Nothing."""


def test_what_was_handed_over_counts_for_the_rate_before_it_was_sent() -> None:
    parameters = {"max-bandwidth": 1, "avail-switchover-bandwidth": 0, "downtime-limit": 300}
    sink = Later(parameters)
    with ram() as memory:
        precopy = Precopy(RamSender(memory, None), parameters, Deaf())
        precopy.run(StreamWriter("test", version=PAGES_VERSION), cast("Bulk", sink), sink)
    assert sink.waits == [STRIPE * PAGE_SIZE]
    assert sink.bytes == PAGES * PAGE_SIZE


async def test_several_channels_say_what_waits_for_them() -> None:
    near, far = hostio.connected_pair()
    with far, ram() as memory:
        connection = Connection(near.detach())
        main = Bulk(connection.fd, peer=False)
        sink = MultifdSink(memory, [connection], main, find_zeros=True, packings=[None], zero_copy=False)
        todo = PageMap(PAGES)
        todo.add(10, 20)
        todo.add(STRIPE)
        with closing(sink):
            for first in (0, STRIPE):
                sink.send(todo, memory.regions[0], first, PAGES)
            assert (sink.bytes, sink.under_way) == (0, 21 * PAGE_SIZE)
