"""vCPUs on the real /dev/kvm: what guests ask of the VMM, kicks, and ends."""

from __future__ import annotations

import os
import threading

import pytest
import trio

from tests.kvm.tiny import MMIO, PIT_AT_100_HZ, PROTECTED_MODE, TinyMachine
from vmm.kvm._kvm import lib
from vmm.kvm.machine_state import load_machine, save_machine
from vmm.kvm.vcpu import run_vcpu

pytestmark = pytest.mark.kvm

SPIN = "l: jmp l"
KICK = "mov al, 0\nout 0x99, al\n"


def test_a_guest_writes_ports_of_each_size() -> None:
    with TinyMachine() as m:
        m.boot("mov dx, 0x3f8\n mov eax, 0x12345678\n out dx, al\n out dx, ax\n out dx, eax\n" + KICK)
        assert m.run().reason == "kicked"
    assert m.ports.written == [(0x3F8, 1, 0x78), (0x3F8, 2, 0x5678), (0x3F8, 4, 0x12345678), (0x99, 1, 0)]


def test_a_guest_reads_ports_of_each_size_and_gets_no_more_bits_than_it_asked_for() -> None:
    with TinyMachine() as m:
        m.ports.answer = lambda address, size: 0xCAFE_BABE_8BAD_F00D
        m.boot("mov dx, 0x60\n in eax, dx\n mov ebx, eax\n xor eax, eax\n in ax, dx\n mov ecx, eax\n xor eax, eax\n"
               " in al, dx\n mov esi, eax\n" + KICK)  # fmt: skip
        m.run()
        registers = m.fds[0].registers()
    assert (registers["rbx"], registers["rcx"], registers["rsi"]) == (0x8BADF00D, 0xF00D, 0x0D)
    assert m.ports.reads == [(0x60, 4), (0x60, 2), (0x60, 1)]


def test_string_output_arrives_item_by_item() -> None:
    with TinyMachine() as m:
        m.boot("mov si, data\n mov cx, 6\n mov dx, 0x3f8\n rep outsw\n" + KICK + "data: db 'hello, world'")
        m.run()
    assert b"".join(value.to_bytes(2, "little") for value in m.outs(0x3F8)) == b"hello, world"


def test_string_input_is_asked_for_item_by_item() -> None:
    with TinyMachine() as m:
        source = iter(b"hello")
        m.ports.answer = lambda address, size: next(source)
        m.boot("mov di, 0x2000\n mov cx, 5\n mov dx, 0x3f8\n rep insb\n" + KICK)
        m.run()
        assert m.memory.read(0x2000, 5) == b"hello"
    assert m.ports.reads == [(0x3F8, 1)] * 5


def test_a_guest_stores_and_loads_where_no_ram_is() -> None:
    with TinyMachine() as m:
        m.mmio.answer = lambda address, size: address + size
        m.boot("mov ax, 0xa000\n mov ds, ax\n mov eax, 0x12345678\n mov [0], al\n mov [2], ax\n mov [4], eax\n"
               " mov ebx, [0x20]\n mov cx, [0x30]\n" + KICK)  # fmt: skip
        m.run()
        registers = m.fds[0].registers()
    assert m.mmio.written == [(MMIO, 1, 0x78), (MMIO + 2, 2, 0x5678), (MMIO + 4, 4, 0x12345678)]
    assert registers["rbx"] == MMIO + 0x24
    assert registers["rcx"] & 0xFFFF == (MMIO + 0x32) & 0xFFFF


def test_the_in_kernel_timer_wakes_a_halted_guest() -> None:
    with TinyMachine() as m:
        m.boot(PIT_AT_100_HZ)
        m.ports.on_write = lambda address, value: m.vcpus[0].kick() if value == 5 else None
        assert m.run().reason == "kicked"
    assert m.outs(0x80) == [1, 2, 3, 4, 5]


def spin_until_kicked(m: TinyMachine) -> str:
    """Enter on a thread, kick from this one, and say why it left."""
    entered, reasons = threading.Event(), list[str]()
    thread = threading.Thread(target=lambda: reasons.append(m.vcpus[0].enter(entered.set).reason))
    thread.start()
    entered.wait()
    m.vcpus[0].kick()
    thread.join()
    return reasons[0]


def test_a_kick_gets_a_spinning_guest_out_each_time_from_any_thread() -> None:
    with TinyMachine() as m:
        m.boot("l: inc dword [0x8000]\n jmp l")
        assert [spin_until_kicked(m) for _ in range(100)] == ["kicked"] * 100


def test_a_kick_before_the_entry_stops_it_before_the_guest_runs() -> None:
    with TinyMachine() as m:
        m.boot("out 0x80, al\n" + SPIN)
        m.vcpus[0].kick()
        assert m.run().reason == "kicked"
        assert m.ports.written == []


def test_a_kick_never_leaves_an_output_half_done() -> None:
    # rip tells where the guest stands; an `out` that was answered must be behind it, at every kick.
    with TinyMachine() as m:
        m.boot("l: out 0x80, al\n after: inc ebx\n mov dx, 0x81\n out dx, eax\n jmp l")
        code = {0x1000: 0, 0x1002: 1}  # outs to 0x80 minus increments: 1 only between the two
        for _ in range(100):
            spin_until_kicked(m)
            registers = m.fds[0].registers()
            assert len(m.outs(0x80)) - registers["rbx"] == code.get(registers["rip"], 0)
            assert len(m.outs(0x81)) == registers["rbx"] - (0x1002 < registers["rip"] <= 0x1007)


def test_a_device_that_kicks_while_it_answers_a_read_has_its_answer_in_the_register() -> None:
    with TinyMachine() as m:

        def answer(address: int, size: int) -> int:
            m.vcpus[0].kick()
            return 0x77

        m.ports.answer = m.mmio.answer = answer
        m.boot("in al, 0x60\n mov bx, 0xa000\n mov ds, bx\n mov cl, [0]\n" + SPIN)
        assert m.run().reason == "kicked"
        registers = m.fds[0].registers()
        assert (registers["rax"] & 0xFF, registers["rip"]) == (0x77, 0x1002)
        assert m.run().reason == "kicked"
        registers = m.fds[0].registers()
        assert (registers["rcx"] & 0xFF, registers["rip"]) == (0x77, 0x100B)


def test_a_kick_in_the_middle_of_a_string_leaves_no_item_behind() -> None:
    with TinyMachine() as m:
        m.ports.on_write = lambda address, value: m.vcpus[0].kick() if value == ord("c") else None
        m.boot(
            "mov si, data\n mov cx, 5\n mov dx, 0x3f8\n rep outsb\n mov al, 'x'\n out dx, al\n"
            + KICK
            + "data: db 'abcde'"
        )
        while len(m.ports.written) < 7:
            assert m.run().reason == "kicked"
            # Whatever the guest still counts as to do has not been seen here, and the other way round.
            done = min(len(m.ports.written), 5)
            assert m.fds[0].registers()["rcx"] & 0xFFFF == 5 - done
            m.ports.on_write = lambda address, value: m.vcpus[0].kick() if address == 0x99 else None
    assert bytes(m.outs(0x3F8)) == b"abcdex"


def test_a_triple_fault_is_a_shutdown_with_registers() -> None:
    with TinyMachine() as m:
        m.boot(PROTECTED_MODE + "lidt [none]\n ud2\n none: dw 0\n dd 0")
        stop = m.run()
    assert stop.reason == "shutdown"
    assert stop.detail == "KVM_EXIT_SHUTDOWN: a triple fault"
    # Values too, on Intel; kvm_amd has reset the vCPU by now, since the processor's own record is void.
    assert set(stop.registers) >= {"rip", "rsp", "rflags", "cs", "cs_base", "cr0", "cr2", "cr3", "cr4", "efer", "r15"}


def test_code_where_no_ram_is_is_an_internal_error_with_its_suberror() -> None:
    with TinyMachine() as m:
        m.boot("jmp 0xa000:0")
        stop = m.run()
    assert stop.reason == "internal-error"
    assert stop.detail.startswith("KVM_EXIT_INTERNAL_ERROR: KVM_INTERNAL_ERROR_EMULATION, an instruction that KVM")
    assert stop.registers["cs_base"] + stop.registers["rip"] == MMIO


def test_a_halt_without_interrupt_controllers_is_reported() -> None:
    with TinyMachine(chips=False) as m:
        m.boot("hlt")
        stop = m.run()
    assert (stop.reason, stop.detail) == (
        "unhandled",
        "KVM_EXIT_HLT: halted, with no in-kernel interrupt controller that could wake it",
    )


async def test_a_cancelled_vcpu_leaves_the_guest_and_can_go_on() -> None:
    with TinyMachine() as m:
        m.boot("l: inc dword [0x8000]\n jmp l")
        threads = trio.CapacityLimiter(1)
        for _ in range(20):
            before = m.word(0x8000)
            async with trio.open_nursery() as nursery:
                await nursery.start(run_vcpu, m.vcpus[0], threads)
                while m.word(0x8000) == before:
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            at_rest = m.word(0x8000)
            assert m.word(0x8000) == at_rest
            assert threads.borrowed_tokens == 0


async def test_a_kicked_vcpu_runs_again_and_no_kick_is_left_over() -> None:
    with TinyMachine() as m:
        m.boot("l: out 0x99, al\n jmp l")
        threads = trio.CapacityLimiter(1)
        for n in range(1, 6):
            stop = await run_vcpu(m.vcpus[0], threads)
            assert stop.reason == "kicked"
            assert len(m.ports.written) == n


async def test_a_kick_that_came_too_late_for_one_run_does_not_stop_the_next() -> None:
    with TinyMachine() as m:
        m.boot(KICK + SPIN)
        threads = trio.CapacityLimiter(1)
        await run_vcpu(m.vcpus[0], threads)
        m.vcpus[0].kick()
        m.boot("out 0x80, al\n" + KICK)
        await run_vcpu(m.vcpus[0], threads)
    assert m.outs(0x80) == [0]


async def test_a_failure_in_a_device_comes_out_of_run_vcpu() -> None:
    def fail(address: int, value: int) -> None:
        raise ZeroDivisionError

    with TinyMachine() as m:
        m.ports.on_write = fail
        m.boot("out 0x80, al\n" + SPIN)
        with pytest.RaisesGroup(ZeroDivisionError):
            await run_vcpu(m.vcpus[0], trio.CapacityLimiter(1))


async def test_entered_is_called_on_the_thread_before_the_guest_runs() -> None:
    with TinyMachine() as m:
        m.boot("out 0x80, al\n" + KICK)
        seen: list[int] = []
        await run_vcpu(m.vcpus[0], trio.CapacityLimiter(1), entered=lambda: seen.append(len(m.ports.written)))
    assert seen == [0]


def test_the_numbers_that_the_run_loop_tells_apart_are_the_bindings() -> None:
    assert (lib.TV_INTERRUPTED, lib.TV_OUT, lib.TV_IN, lib.TV_STORE, lib.TV_LOAD) == (0, 1, 2, 3, 4)


async def test_a_loaded_guest_s_clock_page_is_not_touched_before_entered_returns() -> None:
    clock = "xor edx, edx\n mov ecx, 0x4b564d01\n mov eax, 0x9001\n wrmsr\n l: out 0x99, al\n jmp l"
    with TinyMachine() as m, TinyMachine(ram=os.dup(m.memory.fd)) as heir:
        m.boot(clock)
        m.run()
        states, chips = save_machine(m.vm, m.fds)
        before = m.memory.read(0x9000, 32)
        load_machine(heir.vm, heir.fds, states, chips)
        seen: list[bytes] = []
        await run_vcpu(
            heir.vcpus[0], trio.CapacityLimiter(1), entered=lambda: seen.append(heir.memory.read(0x9000, 32))
        )
        assert seen == [before]
        assert heir.memory.read(0x9000, 32) != before
