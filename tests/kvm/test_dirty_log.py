"""The log of written pages: on the real KVM, and by what it asks of one."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, final

import attrs
import pytest

from tests.kvm.tiny import PROTECTED_MODE, TinyMachine
from vmm.errors import GuestAddressInvalid, KvmCallFailed
from vmm.hostio import create_ram
from vmm.kvm._kvm import ffi
from vmm.kvm.dirty_log import CHUNK, DirtyLog
from vmm.kvm.memory import PAGE_SIZE, GuestMemory
from vmm.kvm.page_map import PageMap

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.kvm._kvm import CData

pytestmark = pytest.mark.usefixtures("no_leaks")

BY_HAND, FULL = 1, 2
SIZE = 4 << 20
PAGES = SIZE // PAGE_SIZE
AT_ENTRY = 1  # page of the guest's code, which KVM may count as written


def pages_of(log: DirtyLog, pages: int = PAGES) -> set[int]:
    """Collect, and return the numbers."""
    found = PageMap(pages)
    log.collect(found)
    return {page for first, count in found.runs() for page in range(first, first + count)}


# --- on the real KVM --------------------------------------------------------------------------------------


@pytest.fixture
def machine() -> Iterator[TinyMachine]:
    """A machine of 4 MiB, all of it used."""
    with TinyMachine(size=SIZE) as machine:
        os.pwrite(machine.memory.fd, bytes(SIZE), 0)
        machine.boot(PROTECTED_MODE + "l: out 0x99, al\n mov byte [ebx], 1\n jmp l")
        machine.run()
        yield machine


def write_pages(machine: TinyMachine, *pages: int) -> None:
    """Have the guest write into these pages."""
    for page in pages:
        machine.fds[0].set_registers({"rbx": page * PAGE_SIZE + 8})
        assert machine.run().reason == "kicked"


@pytest.mark.kvm
def test_what_the_guest_writes_is_collected_once(machine: TinyMachine) -> None:
    log = DirtyLog(machine.vm, machine.memory)
    log.start()
    log.protect(0, PAGES)
    pages_of(log)
    log.protect(0, PAGES)
    write_pages(machine, 300, 301, 900)
    assert pages_of(log) - {AT_ENTRY} == {300, 301, 900}
    log.protect(0, PAGES)
    assert pages_of(log) == set()
    log.stop()


@pytest.mark.kvm
def test_a_page_that_is_written_behind_its_protection_is_collected_next(machine: TinyMachine) -> None:
    log = DirtyLog(machine.vm, machine.memory)
    log.start()
    log.protect(0, PAGES)
    write_pages(machine, 300)
    assert pages_of(log) - {AT_ENTRY} == {300}
    write_pages(machine, 300)  # once more before it is read
    log.protect(300, 1)
    write_pages(machine, 300)  # and behind
    assert 300 in pages_of(log)
    log.stop()


@pytest.mark.kvm
def test_what_this_process_writes_is_collected_as_well(machine: TinyMachine) -> None:
    log = DirtyLog(machine.vm, machine.memory)
    log.start()
    log.protect(0, PAGES)
    pages_of(log)
    log.protect(0, PAGES)
    machine.memory.write(300 * PAGE_SIZE - 1, b"ab")
    assert pages_of(log) - {AT_ENTRY} == {299, 300}
    log.stop()


@pytest.mark.kvm
def test_a_log_can_begin_again(machine: TinyMachine) -> None:
    log = DirtyLog(machine.vm, machine.memory)
    for page in (300, 500):
        log.start()
        log.protect(0, PAGES)
        pages_of(log)
        log.protect(0, PAGES)
        write_pages(machine, page)
        assert pages_of(log) - {AT_ENTRY} == {page}
        log.stop()
        log.stop()


@pytest.mark.kvm
def test_what_is_not_on_cannot_be_read(machine: TinyMachine) -> None:
    with pytest.raises(KvmCallFailed) as caught:
        machine.vm.read_dirty_log(0, ffi.new("uint64_t[]", PAGES // 64))
    assert str(caught.value) == "KVM_GET_DIRTY_LOG failed for slot 0: No such file or directory (errno 2)"
    with pytest.raises(KvmCallFailed, match=r"^KVM_CLEAR_DIRTY_LOG failed for slot 0: "):
        machine.vm.clear_dirty_log(0, 0, 64, ffi.new("uint64_t[]", 1))


# --- by what is asked of KVM ------------------------------------------------------------------------------


@final
@attrs.define
class FakeVm:
    """Does what KVM does, with a set of pages in each slot's log."""

    rings = None
    ways: int
    regions: list[tuple[int, int]]  # first page and pages of each slot
    on: bool = False
    written: set[int] = attrs.Factory(set)  # by number in the memory object
    clears: list[tuple[int, int, int]] = attrs.Factory(list)

    def set_memory_slot(self, slot: int, address: int, hva: int, size: int, *, log_dirty: bool = False) -> None:
        _, pages = self.regions[slot]
        assert size == pages * PAGE_SIZE
        if log_dirty and not self.on and self.ways & FULL:
            self.written = {page for begin, count in self.regions for page in range(begin, begin + count)}
        self.on = log_dirty and (self.on or slot == len(self.regions) - 1)

    def protect_by_hand(self) -> int:
        return self.ways

    def read_dirty_log(self, slot: int, bitmap: CData) -> None:
        first, pages = self.regions[slot]
        bits = sum(1 << page - first for page in self.written if first <= page < first + pages)
        ffi.memmove(bitmap, bits.to_bytes(-(-pages // 64) * 8, "little"), -(-pages // 64) * 8)
        if not self.ways:
            self.written -= set(range(first, first + pages))

    def clear_dirty_log(self, slot: int, first: int, pages: int, bitmap: CData) -> None:
        begin, count = self.regions[slot]
        assert first % 64 == 0
        assert pages % 64 == 0 or first + pages == count
        self.clears.append((slot, first, pages))
        bits = int.from_bytes(ffi.buffer(bitmap, -(-pages // 64) * 8)[:], "little")
        self.written -= {begin + first + n for n in range(pages) if bits >> n & 1}


def made(size: int, ways: int) -> tuple[GuestMemory, FakeVm, DirtyLog]:
    """Return RAM of which nothing was ever used, and its log."""
    memory = GuestMemory.from_memfd(create_ram(size, "log"), size)
    vm = FakeVm(ways, [(region.offset // PAGE_SIZE, region.size // PAGE_SIZE) for region in memory.regions])
    return memory, vm, DirtyLog(vm, memory)


@pytest.mark.parametrize("ways", [0, BY_HAND])
def test_a_log_that_begins_empty(ways: int) -> None:
    memory, vm, log = made(SIZE, ways)
    log.start()
    assert pages_of(log) == set()
    vm.written = {5, 1000}
    assert pages_of(log) == {5, 1000}
    log.protect(0, PAGES)
    assert vm.written == set()
    assert vm.clears == ([(0, 0, PAGES)] if ways else [])
    assert pages_of(log) == set()
    log.stop()
    assert not vm.on
    memory.close()


def test_by_hand_only_what_was_collected_is_protected() -> None:
    memory, vm, log = made(SIZE, BY_HAND)
    log.start()
    vm.written = {5}
    pages_of(log)
    vm.written.add(6)  # which is not read now, so must not be forgotten
    log.protect(5, 1)
    assert pages_of(log) == {6}
    memory.close()


def test_each_chunk_is_protected_once_and_only_where_something_was_collected() -> None:
    memory, vm, log = made(4 * CHUNK * PAGE_SIZE, BY_HAND)
    log.start()
    vm.written = {3, CHUNK + 7, 3 * CHUNK}
    pages_of(log, 4 * CHUNK)
    log.protect(3, 1)
    log.protect(5, 100)
    log.protect(CHUNK - 1, 2 * CHUNK)
    assert vm.clears == [(0, 0, CHUNK), (0, CHUNK, CHUNK)]
    assert pages_of(log, 4 * CHUNK) == {3 * CHUNK}
    log.protect(0, 4 * CHUNK)
    assert vm.clears[2:] == [(0, 3 * CHUNK, CHUNK)]
    memory.close()


def test_memory_above_4_gib_has_its_own_slot() -> None:
    low = (3 << 30) // PAGE_SIZE
    size = (3 << 30) + 100 * PAGE_SIZE
    memory, vm, log = made(size, BY_HAND)
    log.start()
    vm.written = {low - 1, low + 99}
    assert pages_of(log, low + 100) == {low - 1, low + 99}
    log.protect(low - 1, 101)
    assert vm.clears == [(0, low - CHUNK, CHUNK), (1, 0, 100)]
    memory.close()


def test_a_log_that_begins_full_names_what_is_used_and_what_was_not_read() -> None:
    memory, vm, log = made(3 * CHUNK * PAGE_SIZE, BY_HAND | FULL)
    os.pwrite(memory.fd, b"used", CHUNK * PAGE_SIZE)
    log.start()
    assert vm.clears == [(0, 0, CHUNK), (0, 2 * CHUNK, CHUNK)]
    log.protect(CHUNK, 1)
    assert vm.written == set()
    vm.written = {7}
    assert pages_of(log, 3 * CHUNK) == {7}
    memory.close()


def test_what_is_used_for_the_first_time_while_a_full_log_begins_is_not_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory, vm, log = made(2 * CHUNK * PAGE_SIZE, BY_HAND | FULL)
    clear = vm.clear_dirty_log

    def write_and_clear(self: FakeVm, slot: int, first: int, pages: int, bitmap: CData) -> None:
        os.pwrite(memory.fd, b"new", (first + 9) * PAGE_SIZE)  # as the guest does, just before
        clear(slot, first, pages, bitmap)

    monkeypatch.setattr(FakeVm, "clear_dirty_log", write_and_clear)
    log.start()
    assert pages_of(log, 2 * CHUNK) == {9, CHUNK + 9}
    memory.close()


def test_what_is_used_for_the_first_time_just_before_it_is_protected_is_not_forgotten() -> None:
    memory, vm, log = made(2 * CHUNK * PAGE_SIZE, BY_HAND | FULL)
    os.pwrite(memory.fd, b"used", 3 * PAGE_SIZE)
    log.start()
    os.pwrite(memory.fd, b"new", 9 * PAGE_SIZE)  # as the guest does, and after its reader has looked what there is
    log.protect(0, CHUNK)
    assert 9 not in vm.written
    assert pages_of(log, 2 * CHUNK) == {9}
    assert pages_of(log, 2 * CHUNK) == set()
    memory.close()


# --- what this process writes -----------------------------------------------------------------------------


def noted(memory: GuestMemory) -> set[int]:
    found = PageMap(memory.size // PAGE_SIZE)
    memory.take_notes(found)
    return {page for first, count in found.runs() for page in range(first, first + count)}


def test_each_way_to_write_is_noted(tmp_path: object) -> None:
    memory, _, _ = made(SIZE, 0)
    memory.write(0, b"before anybody wants to know")
    memory.begin_notes()
    memory.write(5 * PAGE_SIZE - 1, b"12")
    memory.place(7 * PAGE_SIZE, b"x" * PAGE_SIZE)
    source = create_ram(PAGE_SIZE, "source")
    memory.fill(9 * PAGE_SIZE + 5, source, 0, PAGE_SIZE)
    os.close(source)
    memory.note(20 * PAGE_SIZE, 1)
    memory.write(30 * PAGE_SIZE, b"")
    with pytest.raises(GuestAddressInvalid):
        memory.write(SIZE - 1, b"12")
    assert noted(memory) == {4, 5, 7, 9, 10, 20}
    assert noted(memory) == set()
    memory.clear()
    assert noted(memory) == set(range(PAGES))
    memory.end_notes()
    memory.write(0, b"after")
    assert noted(memory) == set()
    memory.close()


def test_no_note_is_lost_between_threads() -> None:
    memory, _, _ = made(SIZE, 0)
    memory.begin_notes()

    def write(first: int) -> None:
        for page in range(first, PAGES, 2):
            memory.write(page * PAGE_SIZE, b"x")

    threads = [threading.Thread(target=write, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    found = set[int]()
    while any(thread.is_alive() for thread in threads):
        found |= noted(memory)
    found |= noted(memory)
    assert found == set(range(PAGES))
    memory.close()
