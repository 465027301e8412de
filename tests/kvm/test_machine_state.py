"""Machines saved on one VM and loaded on another over the same memory."""

from __future__ import annotations

import itertools
import os
import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import attrs
import pytest

from tests.kvm.tiny import INTERRUPT_ON_GSI_4, LONG_MODE, PIT_AT_100_HZ, TinyMachine, assemble
from vmm.errors import KvmCallFailed, KvmExtensionMissing, StateRejected
from vmm.kvm.clock import Moment, clock_distance
from vmm.kvm.machine_state import load_machine, save_machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmm.kvm.state import VcpuState

pytestmark = pytest.mark.kvm

WORD = (1 << 64) - 1
RUNNABLE, UNINITIALIZED, INIT_RECEIVED, HALTED = range(4)
"""KVM_MP_STATE_*"""


@contextmanager
def successor(m: TinyMachine) -> Iterator[TinyMachine]:
    """A second machine over the same RAM, which has loaded nothing yet."""
    with TinyMachine(len(m.fds), ram=os.dup(m.memory.fd)) as heir:
        yield heir


def hand_over(m: TinyMachine, heir: TinyMachine) -> None:
    states, chips = save_machine(m.vm, m.fds)
    load_machine(heir.vm, heir.fds, states, chips)


def run_until(m: TinyMachine, wanted: Callable[[int], bool]) -> None:
    """Run vCPU 0 until it writes a wanted value to port 0x80; leave it right after that instruction."""
    m.ports.on_write = lambda at, value: m.vcpus[0].kick() if at == 0x80 and wanted(value) else None
    assert m.run().reason == "kicked"


def kick_when_inside(m: TinyMachine, index: int) -> None:
    """Enter a vCPU on a thread, and kick it."""
    entered = threading.Event()
    thread = threading.Thread(target=m.vcpus[index].enter, args=(entered.set,))
    thread.start()
    entered.wait()
    m.vcpus[index].kick()
    thread.join()


def mp_state(state: VcpuState) -> int:
    return int.from_bytes(state.mp_state, "little")


def run_until_halted(m: TinyMachine) -> list[int]:
    """Run vCPU 0 until a kick finds it halted, and list the ticks that it wrote to port 0x80 meanwhile."""
    before = len(m.outs(0x80))
    for attempt in itertools.count():
        ticked = threading.Event()
        m.ports.on_write = lambda at, value: ticked.set()  # noqa: B023
        thread = threading.Thread(target=m.vcpus[0].enter, args=(lambda: None,))
        thread.start()
        ticked.wait()
        # It halts a few instructions later. Waiting longer only raises the odds that the next look finds it so.
        threading.Event().wait(attempt / 1000)
        m.vcpus[0].kick()
        thread.join()
        if mp_state(m.fds[0].save()) == HALTED:
            break
    return m.outs(0x80)[before:]


def pass_on_ten_times(source: str, halted: bool) -> list[int]:
    """Let a guest that writes its tick's number to port 0x80 tick once on each of ten machines, and list the ticks."""
    ticks: list[int] = []
    with ExitStack() as stack:
        m = stack.enter_context(TinyMachine())
        m.boot(source)
        for _ in range(10):
            run_until(m, lambda value: True)
            ticks += m.outs(0x80)
            if halted:
                ticks += run_until_halted(m)
            heir = stack.enter_context(successor(m))
            hand_over(m, heir)
            m = heir
    return ticks


@pytest.mark.parametrize("halted", [False, True], ids=["in its interrupt", "halted"])
def test_a_guest_on_the_pit_misses_no_number_in_ten_hand_overs(halted: bool) -> None:
    ticks = pass_on_ten_times(PIT_AT_100_HZ, halted)
    assert ticks == list(range(1, len(ticks) + 1))


# Each deadline is the one before plus a period, so a lost interrupt would be the last one. Port 0x81 hears of an
# interrupt that came before its time: the TSC would have stepped back.
TSC_DEADLINE = (
    LONG_MODE
    + """
 PERIOD equ 10000000
 mov eax, isr
 mov [0x20400], ax
 mov word [0x20402], 24
 mov dword [0x20404], 0x8e00
 lidt [idtr]
 mov al, 0xff
 out 0x21, al
 out 0xa1, al
 mov ebx, 0xfee00000
 mov dword [rbx+0xf0], 0x1ff
 mov dword [rbx+0x320], 0x40040
 rdtsc
 shl rdx, 32
 lea rsi, [rdx+rax+PERIOD]
 call arm
 sti
l: hlt
 jmp l
arm: mov rax, rsi
 mov rdx, rsi
 shr rdx, 32
 mov ecx, 0x6e0
 wrmsr
 ret
isr: rdtsc
 shl rdx, 32
 or rax, rdx
 cmp rax, rsi
 jae timely
 out 0x81, al
timely: mov dword [rbx+0xb0], 0
 add rsi, PERIOD
 call arm
 inc dword [0x8000]
 mov eax, [0x8000]
 out 0x80, eax
 iretq
idtr: dw 0xfff
 dq 0x20000
"""
)


@pytest.mark.parametrize("halted", [False, True], ids=["in its interrupt", "halted"])
def test_a_guest_on_the_tsc_deadline_timer_misses_no_tick_in_ten_hand_overs(halted: bool) -> None:
    ticks = pass_on_ten_times(TSC_DEADLINE, halted)
    assert ticks == list(range(1, len(ticks) + 1))


def test_a_deadline_that_passes_during_the_pause_is_kept() -> None:
    with TinyMachine() as m:
        m.boot(TSC_DEADLINE)
        run_until(m, lambda value: value == 1)
        while int.from_bytes(m.fds[0].save().tsc_deadline, "little") > guest_tsc(m):
            m.vm.hold_irqfds()
        with successor(m) as heir:
            hand_over(m, heir)
            run_until(heir, lambda value: True)
            assert heir.outs(0x80) == [2]
            assert heir.outs(0x81) == []


def guest_tsc(m: TinyMachine) -> int:
    """What the guest would read now."""
    states, chips = save_machine(m.vm, m.fds)
    return Moment.from_bytes(chips.moment).host_tsc + int.from_bytes(states[0].tsc_offset, "little") & WORD


@pytest.mark.parametrize(("ticks", "given"), [(0, 0), (1, 1), (3, 1)])
def test_a_pit_tick_that_fell_due_during_the_pause_is_given(ticks: int, given: int) -> None:
    period = 11932 * 10**9 // 1193181
    with TinyMachine() as m:
        m.boot(PIT_AT_100_HZ)
        run_until(m, lambda value: value == 1)
        states, chips = save_machine(m.vm, m.fds)
        # No interrupt requested, and the line of the PIT read while it was high: it must be no worse for that.
        pic0 = chips.pic0[:8] + b"\1\0" + chips.pic0[10:]
        while True:
            with successor(m) as heir:
                # As if the count had been loaded a hundred and a half periods ago, the PIC read `ticks` periods ago.
                now = monotonic_ns(m)
                pit, moment = bytearray(chips.pit), bytearray(chips.moment)
                assert int.from_bytes(pit[0:4], "little") == 11932
                pit[16:24] = (now - 100 * period - period // 2).to_bytes(8, "little")
                moment[24:32] = (now - ticks * period).to_bytes(8, "little")
                made_up = attrs.evolve(chips, pit=bytes(pit), moment=bytes(moment), pic0=pic0)
                load_machine(heir.vm, heir.fds, states, made_up)
                _, loaded = save_machine(heir.vm, heir.fds)
                taken = monotonic_ns(m) - now
            # On a machine too busy for that another tick may have come by itself: then it proves nothing.
            if taken < period // 3:
                break
        assert loaded.pic0[9] & 1 == given


def monotonic_ns(m: TinyMachine) -> int:
    return Moment.from_bytes(m.vm.save_chips().moment).monotonic_ns


def offset(state: VcpuState) -> int:
    return int.from_bytes(state.tsc_offset, "little")


# A hundredth of a second on the slowest and the fastest clock that there is: enough for a busy machine, and far less
# than any wrong formula gives.
TSC_SLACK = 50_000_000
NS_SLACK = 10_000_000


def test_the_tsc_offset_is_the_same_in_the_same_boot_of_the_host() -> None:
    with TinyMachine(2) as m, successor(m) as heir:
        before, _ = save_machine(m.vm, m.fds)
        hand_over(m, heir)
        after, _ = save_machine(heir.vm, heir.fds)
        assert [offset(state) for state in after] == [offset(state) for state in before]


def test_elsewhere_the_tsc_goes_on_from_the_time_of_day() -> None:
    with TinyMachine(2) as m, successor(m) as heir:
        states, chips = save_machine(m.vm, m.fds)
        load_machine(heir.vm, heir.fds, states, attrs.evolve(chips, moment=bytes(16) + chips.moment[16:]))
        after, clock = save_machine(heir.vm, heir.fds)
        # It is the same host after all: so the right offset is the old one, and the right clock the raw clock's.
        for old, new in zip(states, after, strict=True):
            assert abs(clock_distance(offset(new), offset(old))) < TSC_SLACK
        then, now = Moment.from_bytes(chips.moment), Moment.from_bytes(clock.moment)
        assert abs((clock_ns(clock.clock) - clock_ns(chips.clock)) - (now.raw_ns - then.raw_ns)) < NS_SLACK
        assert offset(after[0]) - offset(states[0]) == offset(after[1]) - offset(states[1])


def takes_tsc_offsets(m: TinyMachine) -> bool:
    """False under KVM-PVM, whose guests have the TSC of the host."""
    state = m.fds[0].save()
    m.fds[0].load(attrs.evolve(state, tsc_offset=(offset(state) - 1 & WORD).to_bytes(8, "little")))
    return m.fds[0].save().tsc_offset != state.tsc_offset


def test_a_host_that_cannot_offset_the_tsc_refuses_a_guest_whose_tsc_is_ahead() -> None:
    with TinyMachine() as m, successor(m) as heir:
        states, chips = save_machine(m.vm, m.fds)
        ahead = attrs.evolve(states[0], tsc_offset=(offset(states[0]) + (1 << 40) & WORD).to_bytes(8, "little"))
        if takes_tsc_offsets(m):
            load_machine(heir.vm, heir.fds, [ahead], chips)
            assert heir.fds[0].save().tsc_offset == ahead.tsc_offset
            return
        with pytest.raises(KvmExtensionMissing) as caught:
            load_machine(heir.vm, heir.fds, [ahead], chips)
    assert str(caught.value) == (
        "This host's KVM does not offer a TSC offset that takes effect, "
        "which a guest whose TSC is ahead of the host's needs"
    )


def test_tsc_and_kvmclock_can_stand_still() -> None:
    with TinyMachine() as m, successor(m) as heir:
        states, chips = save_machine(m.vm, m.fds)
        load_machine(heir.vm, heir.fds, states, chips, stood_still=True)
        after, clock = save_machine(heir.vm, heir.fds)
        then, now = Moment.from_bytes(chips.moment), Moment.from_bytes(clock.moment)
        if takes_tsc_offsets(heir):
            gone = clock_distance(now.host_tsc + offset(after[0]), then.host_tsc + offset(states[0]))
            assert 0 <= gone < now.host_tsc - then.host_tsc
        assert 0 <= clock_ns(clock.clock) - clock_ns(chips.clock) < now.raw_ns - then.raw_ns


def clock_ns(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


KVMCLOCK = """
 xor edx, edx
 mov ecx, 0x4b564d01              ; the clock
 mov eax, 0x9001
 wrmsr
 mov ecx, 0x4b564d03              ; stolen time
 mov eax, 0x9041
 wrmsr
 mov ecx, 0x4b564d04              ; end of interrupt by a bit in memory
 mov eax, 0x9081
 wrmsr
l: out 0x80, al
 jmp l
"""


def kvmclock_at(page: bytes, tsc: int) -> int:
    """What a guest makes of struct pvclock_vcpu_time_info at `tsc`. Source: Documentation/virt/kvm/x86/msr.rst."""
    version = int.from_bytes(page[0:4], "little")
    assert version
    assert version % 2 == 0
    timestamp, system_time = (int.from_bytes(page[at : at + 8], "little") for at in (8, 16))
    multiplier = int.from_bytes(page[24:28], "little")
    shift = int.from_bytes(page[28:29], "little", signed=True)
    delta = tsc - timestamp
    return system_time + ((delta << shift if shift >= 0 else delta >> -shift) * multiplier >> 32)


def test_kvmclock_is_the_same_function_of_the_tsc_after_a_hand_over() -> None:
    with TinyMachine() as m, successor(m) as heir:
        m.boot(KVMCLOCK)
        run_until(m, lambda value: True)
        before = m.memory.read(0x9000, 32)
        ram = m.memory.read(0, m.memory.size)
        hand_over(m, heir)
        assert m.memory.read(0, m.memory.size) == ram, "loading wrote to memory that another process may own"
        run_until(heir, lambda value: True)
        after = heir.memory.read(0x9000, 32)
        assert after != before
        tsc = guest_tsc(heir)
        assert abs(kvmclock_at(after, tsc) - kvmclock_at(before, tsc)) < 20_000
        assert after[29] & 2, "the guest is told that it was stopped"
        assert not before[29] & 2


TWO_PROCESSORS = """
 %macro send 1
 mov ecx, 0x830
 mov edx, 1
 mov eax, %1
 wrmsr
 %endmacro
 mov ecx, 0x1b
 rdmsr
 or eax, 0xc00
 wrmsr
 mov ecx, 0x80f
 xor edx, edx
 mov eax, 0x1ff
 wrmsr
 mov al, 1
 out 0x80, al
 send 0x4500
 mov al, 2
 out 0x80, al
 send 0x4602
w: cmp dword [0x8010], 0
 je w
 mov al, 3
 out 0x80, al
 mov ebx, [0x8010]
v: cmp ebx, [0x8010]
 je v
 mov al, 4
 out 0x80, al
 jmp v
"""
SECOND = "xor ax, ax\n mov ds, ax\n l: inc dword [0x8010]\n jmp l"


@contextmanager
def running_second(m: TinyMachine) -> Iterator[None]:
    thread = threading.Thread(target=m.vcpus[1].enter, args=(lambda: None,))
    thread.start()
    try:
        yield
    finally:
        m.vcpus[1].kick()
        thread.join()


def test_a_machine_that_was_loaded_but_never_entered_can_be_handed_on() -> None:
    with TinyMachine() as m, successor(m) as idle, successor(m) as last:
        m.boot(KVMCLOCK)
        run_until(m, lambda value: True)
        hand_over(m, idle)
        states, chips = save_machine(idle.vm, idle.fds)
        assert states[0].msrs == m.fds[0].save().msrs
        load_machine(last.vm, last.fds, states, chips)
        before = m.memory.read(0x9000, 32)
        run_until(last, lambda value: True)
        assert m.memory.read(0x9000, 32) != before


def test_a_second_processor_is_handed_over_waiting_initialized_and_running() -> None:
    with ExitStack() as stack:
        m = stack.enter_context(TinyMachine(2))
        m.boot(TWO_PROCESSORS)
        m.memory.write(0x2000, assemble(SECOND, 0))

        def go_on(until: int, expected: int) -> None:
            nonlocal m
            run_until(m, lambda value: value == until)
            assert mp_state(m.fds[1].save()) == expected
            heir = stack.enter_context(successor(m))
            hand_over(m, heir)
            m = heir

        go_on(1, UNINITIALIZED)
        kick_when_inside(m, 1)
        go_on(2, INIT_RECEIVED)
        kick_when_inside(m, 1)
        with running_second(m):
            run_until(m, lambda value: value == 3)
        assert mp_state(m.fds[1].save()) == RUNNABLE
        heir = stack.enter_context(successor(m))
        hand_over(m, heir)
        with running_second(heir):
            run_until(heir, lambda value: value == 4)
        assert heir.fds[1].registers()["cs_base"] == 0x2000


def test_every_register_of_a_state_is_the_same_after_a_round_trip() -> None:
    with TinyMachine() as m, successor(m) as heir:
        m.boot(TSC_DEADLINE)
        run_until(m, lambda value: value == 2)
        states, chips = save_machine(m.vm, m.fds)
        load_machine(heir.vm, heir.fds, states, chips)
        again, chips_again = save_machine(heir.vm, heir.fds)
        assert again == states
        assert (chips_again.pic0, chips_again.pic1, chips_again.ioapic) == (chips.pic0, chips.pic1, chips.ioapic)


def with_msr(state: VcpuState, index: int, value: int) -> VcpuState:
    entry = index.to_bytes(8, "little") + value.to_bytes(8, "little")
    return attrs.evolve(state, msrs=entry + state.msrs)


def test_an_msr_that_this_host_refuses_is_named_unless_it_is_zero() -> None:
    with TinyMachine() as m, successor(m) as heir:
        (state,), chips = save_machine(m.vm, m.fds)
        load_machine(heir.vm, heir.fds, [with_msr(state, 0xDEAD, 0)], chips)
        with pytest.raises(KvmCallFailed) as caught:
            load_machine(heir.vm, heir.fds, [with_msr(state, 0xDEAD, 5)], chips)
    assert str(caught.value) == "KVM_SET_MSRS failed for MSR 0xdead of vCPU 0: Invalid argument (errno 22)"


def test_msrs_behind_a_refused_one_are_set_all_the_same() -> None:
    star = 0xC0000081
    with TinyMachine() as m, successor(m) as heir:
        (state,), chips = save_machine(m.vm, m.fds)
        entries = {state.msrs[at : at + 4]: state.msrs[at + 8 : at + 16] for at in range(0, len(state.msrs), 16)}
        entries[star.to_bytes(4, "little")] = (0x23 << 48).to_bytes(8, "little")
        msrs = b"".join(index + bytes(4) + value for index, value in entries.items())
        load_machine(heir.vm, heir.fds, [with_msr(attrs.evolve(state, msrs=msrs), 0xDEAD, 0)], chips)
        (after,), _ = save_machine(heir.vm, heir.fds)
        assert after.msrs == msrs


def test_a_state_of_wrong_sizes_is_refused_with_every_fault_and_changes_nothing() -> None:
    with TinyMachine() as m:
        states, chips = save_machine(m.vm, m.fds)
        bad = attrs.evolve(states[0], regs=b"", msrs=b"x", xsave=states[0].xsave + b"\1")
        with pytest.raises(StateRejected) as caught:
            load_machine(m.vm, m.fds, [bad], chips)
        assert str(caught.value) == (
            "Section vCPU 0: 0 bytes, 144 wanted @ regs; 4097 bytes in use, this host has 4096 @ xsave; "
            "1 bytes, a multiple of 16 up to 16384 wanted @ msrs"
        )
        with pytest.raises(StateRejected) as caught:
            load_machine(m.vm, m.fds, states, attrs.evolve(chips, pit=b""))
        assert str(caught.value) == "Section chips: 0 bytes, 112 wanted @ pit"
        with pytest.raises(StateRejected) as caught:
            load_machine(m.vm, m.fds, [], chips)
        assert str(caught.value) == "Section vCPUs: 0 states for 1 vCPUs"
        assert save_machine(m.vm, m.fds)[0] == states


def test_an_xsave_area_of_another_length_is_taken_if_nothing_in_use_is_cut_off() -> None:
    with TinyMachine() as m, successor(m) as heir:
        states, chips = save_machine(m.vm, m.fds)
        longer = attrs.evolve(states[0], xsave=states[0].xsave + bytes(64))
        load_machine(heir.vm, heir.fds, [longer], chips)
        shorter = attrs.evolve(states[0], xsave=states[0].xsave[:1024])
        load_machine(heir.vm, heir.fds, [shorter], chips)
        assert save_machine(heir.vm, heir.fds)[0][0].xsave == states[0].xsave


@contextmanager
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.mark.parametrize("stays", [True, False])
def test_an_irqfd_written_around_the_pause_interrupts_once_for_each_write(stays: bool) -> None:
    for _ in range(20):
        with eventfd() as bell, TinyMachine() as m:
            m.boot(INTERRUPT_ON_GSI_4)
            m.run()  # until it is ready for interrupts
            m.vm.assign_irqfd(bell, 4)
            os.eventfd_write(bell, 1)  # KVM's worker raises it some time after this
            m.vm.hold_irqfds()
            m.vm.hold_irqfds()
            os.eventfd_write(bell, 1)
            if stays:
                assert m.run().reason == "kicked"
                m.vm.release_irqfds()
                m.vm.release_irqfds()
                assert m.run().reason == "kicked"
                assert len(m.outs(0x99)) == 3
                continue
            with successor(m) as heir:
                hand_over(m, heir)
                assert heir.run().reason == "kicked"
                heir.vm.assign_irqfd(bell, 4)
                assert heir.run().reason == "kicked"
                assert len(heir.outs(0x99)) == 2
