"""How fast the passes over RAM go, where they are not to go as fast as they can."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any, cast

import pytest

from vmm import host_sockets, hostio
from vmm.kvm.memory import PAGE_SIZE, GuestMemory
from vmm.kvm.page_map import PageMap
from vmm.migration import precopy
from vmm.migration import ram as ram_module
from vmm.migration.connection import Connection
from vmm.migration.multifd import STRIPE, MultifdSink
from vmm.migration.precopy import Precopy
from vmm.migration.pump import Bulk
from vmm.migration.ram import RamSender
from vmm.migration.stream import StreamWriter
from vmm.migration.stream_records import PAGES_VERSION

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
        Precopy(RamSender(memory, None), parameters, Deaf()).run(
            StreamWriter("test", version=PAGES_VERSION), cast("Bulk", sink), sink
        )
    assert sink.waits == [STRIPE * PAGE_SIZE]
    assert sink.bytes == PAGES * PAGE_SIZE


class Clock:
    """Stands still but for what is done with it."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Writer:
    """A guest that writes the same MiB all the time."""

    def start(self) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""

    def protect(self, first: int, pages: int) -> None:
        """Nothing."""

    def collect(self, into: PageMap) -> None:
        into.add(0, 256)


def test_a_network_that_was_slow_in_the_first_pass_is_measured_again_by_small_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(precopy, "time", clock)
    monkeypatch.setattr(ram_module, "time", clock)

    class Network(Later):
        def flush(self) -> None:
            clock.now += 0.001 if self.bytes else 100.0
            super().flush()

    class Patient(Deaf):
        def passed(self, number: int) -> None:
            assert number < 20, "it goes on for ever"

    parameters = {"max-bandwidth": 0, "avail-switchover-bandwidth": 0, "downtime-limit": 300}
    sink = Network(parameters)
    with ram() as memory:
        sender = RamSender(memory, Writer())
        clock.now += 1000  # while the destination makes the machine
        Precopy(sender, parameters, Patient()).run(
            StreamWriter("test", version=PAGES_VERSION), cast("Bulk", sink), sink
        )
    assert sender.statistics().mbps == round(sink.bytes * 8 / 1e6 / (clock.now - 1100), 3)


async def test_several_channels_say_what_waits_for_them() -> None:
    near, far = host_sockets.connected_pair()
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
