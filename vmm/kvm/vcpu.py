"""vCPUs on OS threads, under trio's cancellation.

Facts about KVM_RUN that this rests on (Linux Documentation/virt/kvm/api.rst, KVM_RUN and `immediate_exit`):

- An access of the guest's to a port or to memory that is nobody's RAM makes KVM_RUN return in the middle of the
  instruction. The answer is picked up, and the instruction finished, by the next KVM_RUN.
- With `immediate_exit` set, KVM_RUN finishes such an access and then returns EINTR, without running the guest. The
  kernel never clears the flag.
- A signal makes KVM_RUN return EINTR, but only if it arrives inside; before that it would be lost. So a kick sets the
  flag first and signals second: one of the two holds, wherever the thread is.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Final, Protocol, final

import trio

from vmm.kvm._kvm import ffi, lib
from vmm.kvm.exits import Stop, exit_name, explain_exit

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.kvm.vcpu_fd import VcpuFd


class IoSpace(Protocol):
    """Ports, or physical addresses that are not RAM. Called on vCPU threads, must not block.

    `size` is 1, 2, 4 or 8 bytes (for memory KVM may split an access, and then 1 to 8). Values are little-endian
    and unsigned; of a value that `read` returns the lower `size` bytes count, and it must not exceed 64 bits.
    """

    def read(self, address: int, size: int) -> int:
        """Answer a load."""
        ...

    def write(self, address: int, size: int, value: int) -> None:
        """Carry out a store."""
        ...


@final
class Vcpu:
    """One vCPU. `enter` blocks its thread; `kick` may come from any thread, that one included."""

    has_thread: Final = True

    def __init__(self, index: int, fd: VcpuFd, ports: IoSpace, mmio: IoSpace) -> None:
        self.index = index
        self.fd = fd
        self._ports = ports
        self._mmio = mmio
        self._requested = False
        self._hold = 0.0
        self._stirred = threading.Event()
        self._thread: int | None = None
        self._lock = threading.Lock()

    def enter(self, entered: Callable[[], object]) -> Stop:
        """Run the guest on this thread until it is kicked or cannot go on. Calls `entered` just before.

        On return no instruction is half done, whatever the reason, so the state may be saved. The next `enter` may
        come from another thread. An exception of an `IoSpace` or of `entered` comes out as it is; the guest cannot
        be continued after that, for an instruction of its was not answered.

        Raises:
            KvmCallFailed: KVM refuses the guest's clock page after a load; the guest has not run.
        """
        cpu = self.fd.cpu
        # Locals, because this loop is what a guest's register access costs.
        run = lib.tv_run
        port_read, port_write = self._ports.read, self._ports.write
        mmio_read, mmio_write = self._mmio.read, self._mmio.write
        lib.tv_admit_kick()
        with self._lock:
            self._thread = threading.get_native_id()
            lib.tv_set_immediate_exit(cpu, self._requested)
        try:
            entered()
            # After `entered`, which may be what makes this process the owner of the guest: this writes to its memory.
            self.fd.take_up()
            while True:
                outcome = run(cpu)
                if outcome == 1:  # TV_OUT; by number, since an attribute of `lib` costs as much as the decoding
                    port_write(cpu.address, cpu.size, cpu.value)
                elif outcome == 2:  # TV_IN
                    cpu.value = port_read(cpu.address, cpu.size)
                elif outcome == 3:  # TV_STORE
                    mmio_write(cpu.address, cpu.size, cpu.value)
                elif outcome == 4:  # TV_LOAD
                    cpu.value = mmio_read(cpu.address, cpu.size)
                elif outcome == 0:  # TV_INTERRUPTED
                    # The flag goes first: a kick between these two lines sets it again, and is seen below or by the
                    # next KVM_RUN. The other way round it could be wiped out unseen.
                    lib.tv_set_immediate_exit(cpu, False)
                    if self._hold:
                        self._rest()
                    if self._requested:
                        return Stop("kicked", "", {})
                else:
                    return self._explain(outcome)
        finally:
            # The thread goes back to trio's pool: from here on a signal would hit whatever runs on it next. A kick
            # that came while we were inside has been obeyed, whatever it was that made us leave.
            with self._lock:
                self._thread = None
                self._requested = False
                self._hold = 0.0
                self._stirred.clear()

    async def run(
        self, threads: trio.CapacityLimiter, *, entered: Callable[[], object], left: Callable[[Stop], object]
    ) -> Stop:
        """Run the guest on a thread of `threads` until it stops; see `run_vcpu`."""
        return await run_vcpu(self, threads, entered=entered, left=left)

    @property
    def thread_id(self) -> int:
        """The host thread that is inside `enter`; 0 while none is."""
        return self._thread or 0

    def kick(self) -> None:
        """Make `enter` return soon; if nobody is inside, the next `enter` returns before the guest runs."""
        with self._lock:
            self._requested = True
            self._stirred.set()
            if self._thread is not None:
                lib.tv_kick(self.fd.cpu, self._thread)

    def forget_kick(self) -> None:
        """Take back a kick that found nobody inside."""
        with self._lock:
            if self._thread is None:
                self._requested = False
                self._stirred.clear()

    def hold(self, seconds: float) -> None:
        """Keep the guest from running for `seconds`, on its own thread, which stays inside `enter`. Any thread.

        A kick or `let_go` ends it early. Without effect while nobody is inside, or while it is being held.
        """
        with self._lock:
            if self._thread is not None and not self._hold:
                self._hold = seconds
                lib.tv_kick(self.fd.cpu, self._thread)

    def let_go(self) -> None:
        """End what `hold` has begun, if it has. Any thread."""
        with self._lock:
            if self._hold:
                self._stirred.set()

    def _rest(self) -> None:
        self._stirred.wait(self._hold)
        with self._lock:
            self._hold = 0.0
            if not self._requested:
                self._stirred.clear()

    def _explain(self, outcome: int) -> Stop:
        cpu = self.fd.cpu
        registers = self.fd.registers()
        if outcome == lib.TV_FAILED:
            reason = f"KVM_RUN failed: {os.strerror(cpu.error)} (errno {cpu.error}), exit {exit_name(cpu.exit_reason)}"
            return Stop("unhandled", reason, registers)
        words = ffi.new("uint64_t[]", 32)
        count = lib.tv_exit_words(cpu, words, 32)
        return explain_exit(cpu.exit_reason, list(words[0:count]), registers)


async def run_vcpu(
    vcpu: Vcpu,
    threads: trio.CapacityLimiter,
    *,
    entered: Callable[[], object] = lambda: None,
    left: Callable[[Stop], object] = lambda _: None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> Stop:
    """Run `vcpu` on a thread until it stops. A kick counts from the call on; one that came before does not.

    `threads` must have one token per vCPU: a vCPU keeps its thread for as long as the guest runs, and would starve the
    default limiter. `entered` is called on the thread, just before the guest is first entered, and `left` once it is
    out, earlier than the loop learns of it.

    A cancel kicks the vCPU and waits for it; it leaves the guest between two instructions, and the vCPU fit to run
    again. Started without a hop from the thread to the loop, which would cost more than entering a guest does.
    """
    vcpu.forget_kick()
    out = False

    async def kick_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            if not out:
                vcpu.kick()

    def enter() -> Stop:
        stop = vcpu.enter(entered)
        left(stop)
        return stop

    async with trio.open_nursery() as nursery:
        nursery.start_soon(kick_when_cancelled)
        task_status.started()
        stop = await trio.to_thread.run_sync(enter, limiter=threads, thread_name=f"vcpu{vcpu.index}")
        out = True
        nursery.cancel_scope.cancel()
    return stop
