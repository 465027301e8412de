"""Why a guest cannot go on, in words."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal, final

import attrs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

StopReason = Literal["kicked", "shutdown", "internal-error", "fail-entry", "system-event", "unhandled"]

# linux/kvm.h, KVM_EXIT_*: those that x86 has.
EXIT_NAMES: Final[Mapping[int, str]] = MappingProxyType(
    {
        0: "KVM_EXIT_UNKNOWN",
        1: "KVM_EXIT_EXCEPTION",
        2: "KVM_EXIT_IO",
        3: "KVM_EXIT_HYPERCALL",
        4: "KVM_EXIT_DEBUG",
        5: "KVM_EXIT_HLT",
        6: "KVM_EXIT_MMIO",
        7: "KVM_EXIT_IRQ_WINDOW_OPEN",
        8: "KVM_EXIT_SHUTDOWN",
        9: "KVM_EXIT_FAIL_ENTRY",
        10: "KVM_EXIT_INTR",
        11: "KVM_EXIT_SET_TPR",
        12: "KVM_EXIT_TPR_ACCESS",
        16: "KVM_EXIT_NMI",
        17: "KVM_EXIT_INTERNAL_ERROR",
        24: "KVM_EXIT_SYSTEM_EVENT",
        26: "KVM_EXIT_IOAPIC_EOI",
        27: "KVM_EXIT_HYPERV",
        29: "KVM_EXIT_X86_RDMSR",
        30: "KVM_EXIT_X86_WRMSR",
        31: "KVM_EXIT_DIRTY_RING_FULL",
        32: "KVM_EXIT_AP_RESET_HOLD",
        33: "KVM_EXIT_X86_BUS_LOCK",
        34: "KVM_EXIT_XEN",
        37: "KVM_EXIT_NOTIFY",
        39: "KVM_EXIT_MEMORY_FAULT",
    }
)
SUBERROR_NAMES: Final[Mapping[int, str]] = MappingProxyType(
    {
        1: "KVM_INTERNAL_ERROR_EMULATION, an instruction that KVM cannot emulate",
        2: "KVM_INTERNAL_ERROR_SIMUL_EX, an exception during the delivery of another",
        3: "KVM_INTERNAL_ERROR_DELIVERY_EV, an exit during the delivery of an event",
        4: "KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON",
    }
)
EVENT_NAMES: Final[Mapping[int, str]] = MappingProxyType(
    {
        1: "KVM_SYSTEM_EVENT_SHUTDOWN",
        2: "KVM_SYSTEM_EVENT_RESET",
        3: "KVM_SYSTEM_EVENT_CRASH",
        4: "KVM_SYSTEM_EVENT_WAKEUP",
        5: "KVM_SYSTEM_EVENT_SUSPEND",
        6: "KVM_SYSTEM_EVENT_SEV_TERM",
    }
)


@final
@attrs.frozen
class Stop:
    """Why a vCPU is out of the guest. `registers` is empty after a kick, when they cost time and say nothing."""

    reason: StopReason
    detail: str
    registers: dict[str, int]


def exit_name(number: int) -> str:
    """Name an exit reason as linux/kvm.h does, or by its number."""
    return EXIT_NAMES.get(number, f"exit reason {number}")


def explain_exit(number: int, words: Sequence[int], registers: dict[str, int]) -> Stop:
    """Word the exit `number`, with the data `words` that came with it (see tv_exit_words)."""
    match number, list(words):
        case 8, _:
            return Stop("shutdown", "KVM_EXIT_SHUTDOWN: a triple fault", registers)
        case 17, [suberror, *data]:
            name = SUBERROR_NAMES.get(suberror, f"suberror {suberror}")
            return Stop("internal-error", f"KVM_EXIT_INTERNAL_ERROR: {name}{_data(data)}", registers)
        case 9, [reason, cpu]:
            detail = (
                f"KVM_EXIT_FAIL_ENTRY: the processor refused the guest's state, hardware reason {reason:#x}, CPU {cpu}"
            )
            return Stop("fail-entry", detail, registers)
        case 24, [event, *data]:
            name = EVENT_NAMES.get(event, f"event {event}")
            return Stop("system-event", f"KVM_EXIT_SYSTEM_EVENT: {name}{_data(data)}", registers)
        case 5, _:
            # With the interrupt controllers in the kernel, a halted vCPU waits inside KVM_RUN instead.
            detail = "KVM_EXIT_HLT: halted, with no in-kernel interrupt controller that could wake it"
            return Stop("unhandled", detail, registers)
        case 0, [hardware]:
            return Stop("unhandled", f"KVM_EXIT_UNKNOWN: hardware exit reason {hardware:#x}", registers)
        case _:
            return Stop("unhandled", exit_name(number), registers)


def _data(words: Sequence[int]) -> str:
    return f"; data {' '.join(f'{word:#x}' for word in words)}" if words else ""
