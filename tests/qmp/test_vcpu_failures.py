"""A guest that cannot go on: the machine stands, the monitor says why, and the process lives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import pytest

from tests.qmp.kit import JUMP_INTO_NOTHING, TRIPLE_FAULT, Done, debug_exit, flat_guest, machine
from vmm.qmp_client import CommandFailed

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.kvm


@attrs.frozen
class Failure:
    """A guest, and what becomes of it."""

    source: str
    reason: str
    detail: str
    status: str


FAILURES = [
    pytest.param(
        Failure(TRIPLE_FAULT, "shutdown", "KVM_EXIT_SHUTDOWN: a triple fault", "guest-panicked"), id="triple fault"
    ),
    pytest.param(
        Failure(JUMP_INTO_NOTHING, "internal-error", "KVM_EXIT_INTERNAL_ERROR: ", "internal-error"), id="internal error"
    ),
]


@pytest.mark.parametrize("cpus", [1, 2])
@pytest.mark.parametrize("failure", FAILURES)
async def test_a_vcpu_that_fails_stops_the_machine_until_a_reset(tmp_path: Path, failure: Failure, cpus: int) -> None:
    kernel = flat_guest(tmp_path, failure.source)
    async with machine(tmp_path, "-kernel", kernel, "-serial", "null", "-m", "2", "-smp", str(cpus), "-S") as m:
        await m.until_phase("running")
        for _ in range(2):
            await m.qmp.execute("cont")
            failed = await m.event("VCPU_FAILED")
            assert failed["cpu-index"] == 0
            assert failed["reason"] == failure.reason
            assert failed["detail"].startswith(failure.detail)
            # No values: kvm_amd has reset the vCPU by now.
            assert set(failed["registers"]) >= {"rip", "rsp", "rflags", "cs", "cr0", "cr3", "efer", "r15"}
            assert all(isinstance(value, int) for value in failed["registers"].values())
            await m.event("STOP")

            status = await m.qmp.execute("query-status")
            why = f"vCPU 0: {failed['detail']}"
            assert status == {"running": False, "status": failure.status, "x-reason": why}
            with pytest.raises(CommandFailed) as caught:
                await m.qmp.execute("cont")
            refused = f"cont is not possible in run state {failure.status}: {why}; system_reset first"
            assert (caught.value.error_class, caught.value.desc) == ("GenericError", refused)
            await m.qmp.execute("stop")
            assert (await m.qmp.execute("query-status"))["status"] == failure.status
            assert len(await m.qmp.execute("query-cpus-fast")) == cpus

            await m.qmp.execute("system_reset")
            assert await m.event("RESET") == {"guest": False, "reason": "host-qmp-system-reset"}
            assert await m.qmp.execute("query-status") == {"running": False, "status": "paused"}
        said = f"trio-vmm: {why}; the machine stands until system_reset\n"
        assert await m.quit() == Done(0, "", 2 * said)


async def test_a_machine_that_failed_can_be_ended_by_a_signal(tmp_path: Path) -> None:
    kernel = flat_guest(tmp_path, TRIPLE_FAULT)
    async with machine(tmp_path, "-kernel", kernel, "-serial", "null", "-m", "2") as m:
        await m.event("VCPU_FAILED")
        m.process.terminate()
        assert await m.event("SHUTDOWN") == {"guest": False, "reason": "host-signal"}
        assert (await m.ended()).status == 0


async def test_a_reset_loads_the_guest_anew(tmp_path: Path) -> None:
    # The guest marks its own code and fails; should it find the mark at its start, it exits instead.
    source = f"""
 cmp byte [cs:mark], 0
 jne spoiled
 mov byte [cs:mark], 1
 jmp fresh
spoiled: {debug_exit(1)}
mark: db 0
fresh: {TRIPLE_FAULT}
"""
    async with machine(tmp_path, "-kernel", flat_guest(tmp_path, source), "-serial", "null", "-m", "2") as m:
        for _ in range(3):
            assert (await m.event("VCPU_FAILED"))["reason"] == "shutdown"
            await m.qmp.execute("system_reset")
            await m.qmp.execute("cont")
        assert (await m.quit()).status == 0


@pytest.mark.parametrize("cpus", [1, 2])
async def test_the_debug_exit_port_ends_the_process_with_the_guests_status(tmp_path: Path, cpus: int) -> None:
    kernel = flat_guest(tmp_path, debug_exit(5))
    async with machine(tmp_path, "-kernel", kernel, "-serial", "null", "-m", "2", "-smp", str(cpus)) as m:
        assert await m.event("SHUTDOWN") == {"guest": True, "reason": "guest-shutdown"}
        assert (await m.ended()).status == (5 << 1) | 1
