"""The words for exits that no guest here can be made to cause."""

from __future__ import annotations

import pytest

from vmm.kvm.exits import explain_exit


@pytest.mark.parametrize(
    ("number", "words", "reason", "detail"),
    [
        (8, [], "shutdown", "KVM_EXIT_SHUTDOWN: a triple fault"),
        (
            17,
            [3, 0x80000202, 7],
            "internal-error",
            "KVM_EXIT_INTERNAL_ERROR: KVM_INTERNAL_ERROR_DELIVERY_EV, an exit during the delivery of an event; "
            "data 0x80000202 0x7",
        ),
        (17, [9], "internal-error", "KVM_EXIT_INTERNAL_ERROR: suberror 9"),
        (
            9,
            [0x80000021, 1],
            "fail-entry",
            "KVM_EXIT_FAIL_ENTRY: the processor refused the guest's state, hardware reason 0x80000021, CPU 1",
        ),
        (24, [3, 1], "system-event", "KVM_EXIT_SYSTEM_EVENT: KVM_SYSTEM_EVENT_CRASH; data 0x1"),
        (24, [77], "system-event", "KVM_EXIT_SYSTEM_EVENT: event 77"),
        (0, [0x30], "unhandled", "KVM_EXIT_UNKNOWN: hardware exit reason 0x30"),
        (4, [], "unhandled", "KVM_EXIT_DEBUG"),
        (4711, [], "unhandled", "exit reason 4711"),
    ],
)
def test_an_exit_is_worded_with_its_data(number: int, words: list[int], reason: str, detail: str) -> None:
    stop = explain_exit(number, words, {"rip": 5})
    assert (stop.reason, stop.detail, stop.registers) == (reason, detail, {"rip": 5})
