"""What of the guest's RAM has to go, while others write to it."""

from __future__ import annotations

import os
from contextlib import closing
from typing import TYPE_CHECKING, final

import pytest

from vmm.kvm.memory import PAGE_SIZE, GuestMemory
from vmm.migration.ram import RamSender

if TYPE_CHECKING:
    from vmm.kvm.memory import Region
    from vmm.kvm.page_map import PageMap

pytestmark = pytest.mark.usefixtures("no_leaks")

PAGES = 64


@final
class Log:
    """A log that begins full, into which the guest writes page 9 just before it is emptied for the first time."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._protected = False

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def collect(self, into: PageMap) -> None: ...

    def protect(self, first: int, pages: int) -> None:
        assert (first, pages) == ((3, PAGES - 3) if not self._protected else (9, PAGES - 9))
        if not self._protected:
            self._memory.write(9 * PAGE_SIZE, b"for the first time")
        self._protected = True


@final
class Sink:
    """Notes what it is sent."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.data_pages = self.zero_pages = self.bytes = 0

    def send(self, todo: PageMap, region: Region, first: int, end: int) -> int:
        self.sent.append(first)
        todo.discard(first)
        return first + 1

    def flush(self) -> None: ...


def test_a_page_that_is_used_for_the_first_time_as_it_is_protected_goes_in_the_next_pass() -> None:
    fd = os.memfd_create("ram", os.MFD_CLOEXEC)
    os.ftruncate(fd, PAGES * PAGE_SIZE)
    with closing(GuestMemory.from_memfd(fd, PAGES * PAGE_SIZE)) as memory:
        memory.write(3 * PAGE_SIZE, b"there before")
        sender, sink = RamSender(memory, Log(memory)), Sink()
        sender.begin()
        for _ in sender.pages(sink):
            pass
        assert sink.sent == [3]
        assert sender.collect() == 1
        for _ in sender.pages(sink):
            pass
        assert sink.sent == [3, 9]
        assert sender.collect() == 0
