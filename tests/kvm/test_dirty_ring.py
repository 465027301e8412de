"""Rings in which vCPUs say what they write, on the real KVM."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from tests.kvm.rings import skip_without_rings
from tests.kvm.tiny import PROTECTED_MODE, TinyMachine
from vmm.errors import KvmCallFailed, KvmExtensionMissing, Unsupported
from vmm.kvm._kvm import lib
from vmm.kvm.dirty_log import DirtyLog
from vmm.kvm.dirty_ring import DirtyRings, require_working_rings
from vmm.kvm.memory import PAGE_SIZE
from vmm.kvm.page_map import PageMap
from vmm.kvm.system import Kvm

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

SIZE = 16 << 20
PAGES = SIZE // PAGE_SIZE
RING = 1024
AT_ENTRY = 1  # page of the guest's code

STORE = "l: out 0x99, al\n mov byte [ebx], 1\n add ebx, 4096\n dec ecx\n jnz m\n jmp l\nm: jmp l + 2"


@pytest.fixture
def working() -> None:
    """Skip where rings do not work."""
    skip_without_rings()


@pytest.fixture
def machine() -> Iterator[TinyMachine]:
    """A machine whose guest stores into ECX pages from EBX on, and then stops at a port."""
    with TinyMachine(size=SIZE, rings=RING) as machine:
        machine.boot(PROTECTED_MODE + STORE)
        machine.run()
        yield machine


def write_pages(machine: TinyMachine, first: int, count: int = 1) -> None:
    machine.fds[0].set_registers({"rbx": first * PAGE_SIZE + 8, "rcx": count})
    assert machine.run().reason == "kicked"


def pages_of(log: DirtyLog) -> set[int]:
    found = PageMap(PAGES)
    log.collect(found)
    return {page for first, count in found.runs() for page in range(first, first + count)}


def test_what_the_guest_writes_is_collected_once_and_what_this_process_writes_too(machine: TinyMachine) -> None:
    log = DirtyLog(machine.vm, machine.memory)
    log.start()
    pages_of(log)
    write_pages(machine, 300, 3)
    machine.memory.write(900 * PAGE_SIZE, b"x")
    assert pages_of(log) - {AT_ENTRY} == {300, 301, 302, 900}
    assert pages_of(log) == set()
    write_pages(machine, 301)
    log.protect(0, PAGES)
    assert pages_of(log) - {AT_ENTRY} == {301}
    log.stop()


@pytest.mark.usefixtures("working")
def test_a_ring_that_is_full_is_emptied_by_the_vcpu_itself(machine: TinyMachine) -> None:
    log = DirtyLog(machine.vm, machine.memory)
    log.start()
    pages_of(log)
    write_pages(machine, 256, 3 * RING)
    assert pages_of(log) - {AT_ENTRY} == set(range(256, 256 + 3 * RING))
    assert machine.vm.rings is not None
    assert machine.vm.rings.taken()[0] >= 3 * RING
    log.stop()


def test_a_log_can_begin_again_and_forgets_what_was_written_in_between(machine: TinyMachine) -> None:
    log = DirtyLog(machine.vm, machine.memory)
    for page in (300, 500):
        write_pages(machine, page - 1)
        log.start()
        pages_of(log)
        write_pages(machine, page)
        assert pages_of(log) - {AT_ENTRY} == {page}
        write_pages(machine, page + 1)
        log.stop()


def test_each_vcpu_has_its_own_ring() -> None:
    with TinyMachine(2, size=SIZE, rings=RING) as machine:
        machine.boot(PROTECTED_MODE + STORE)
        machine.run()
        log = DirtyLog(machine.vm, machine.memory)
        log.start()
        pages_of(log)
        assert machine.vm.rings is not None
        before = machine.vm.rings.taken()
        write_pages(machine, 300, 5)
        pages_of(log)
        after = machine.vm.rings.taken()
        assert after[0] - before[0] >= 5
        assert after[1] == before[1] == 0
        log.stop()


def test_rings_come_before_vcpus(machine: TinyMachine) -> None:
    with TinyMachine() as machine, pytest.raises(KvmCallFailed, match=r"^KVM_ENABLE_CAP failed for KVM_CAP_DIRTY_LOG"):
        machine.vm.use_dirty_rings(RING)


def test_a_ring_larger_than_this_host_has_is_refused() -> None:
    kvm = Kvm.open()
    vm = kvm.create_vm()
    try:
        with pytest.raises(KvmExtensionMissing) as caught:
            vm.use_dirty_rings(1 << 30)
        assert "KVM_CAP_DIRTY_LOG_RING" in str(caught.value)
        assert "dirty rings of 1073741824 entries" in str(caught.value)
    finally:
        vm.close()
        kvm.close()


def test_rings_that_say_nothing_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    kvm = Kvm.open()
    try:
        monkeypatch.setattr(DirtyRings, "collect", lambda self, into: None)
        with pytest.raises(Unsupported) as caught:
            require_working_rings(kvm)
        assert str(caught.value) == (
            "Accelerator property 'dirty-ring-size' is not supported here; this host's KVM has dirty rings, but they "
            "do not say what a guest writes; leave it out"
        )
    finally:
        kvm.close()


def test_a_ring_in_which_no_entry_was_free_has_lost_some(machine: TinyMachine) -> None:
    log = DirtyLog(machine.vm, machine.memory)
    log.start()
    ring = machine.fds[0].cpu.ring
    write_pages(machine, 300, 5)
    ring.size = 4  # as if it had been written over from its beginning on
    with pytest.raises(KvmCallFailed, match=r"^KVM_RESET_DIRTY_RINGS failed for a ring that was written over, so that"):
        pages_of(log)
    ring.size = RING
    log.stop()


def test_one_that_whoever_collects_has_emptied_in_that_moment_has_lost_nothing(machine: TinyMachine) -> None:
    log = DirtyLog(machine.vm, machine.memory)
    log.start()
    cpu = machine.fds[0].cpu
    for page in (300, 400):
        write_pages(machine, page, 5)
        # KVM has said that it is full; before its own thread empties it, another one does.
        assert pages_of(log) - {AT_ENTRY} == set(range(page, page + 5))
        assert lib.tv_ring_relieve(cpu) == 0
    assert lib.tv_ring_relieve(cpu) == -errno.EOVERFLOW
    log.stop()


@pytest.mark.usefixtures("working")
def test_a_ring_that_was_written_over_ends_the_guest_and_not_in_an_endless_loop(machine: TinyMachine) -> None:
    log = DirtyLog(machine.vm, machine.memory)
    log.start()
    machine.fds[0].set_registers({"rbx": 256 * PAGE_SIZE, "rcx": 3 * RING})
    # It is full and nothing in it can be taken: as if somebody else had given the entries back.
    assert machine.vm.rings is not None
    machine.fds[0].cpu.ring.next = 512
    stop = machine.run()
    assert stop.reason == "unhandled"
    assert "Value too large for defined data type" in stop.detail
    log.stop()
